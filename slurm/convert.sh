#!/usr/bin/env bash
# Convert a checkpoint to the Hugging Face format on one node without GPUs:  sbatch slurm/convert.sh option ...
#   sbatch slurm/convert.sh input=runs/frpo_70b-123 checkpoint=best out=runs/frpo_70b-123/hf_best
#   sbatch --mem=300G slurm/convert.sh input=runs/frpo_70b-123 out=runs/frpo_70b-123/hf --verify     (the whole model in memory)
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=48G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source slurm/lib.sh
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
frpo_srun -- python recipes/convert.py "$@"
