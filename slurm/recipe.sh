#!/usr/bin/env bash
# A recipe that trains nothing, in one process on one GPU:  sbatch slurm/recipe.sh DIRECTORY RECIPE [option ...]
#   sbatch slurm/recipe.sh runs/first/eval evaluate model.path=runs/first benchmarks=[math500] out=runs/first/eval
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 --mem=0 slurm/recipe.sh runs/70b/eval evaluate tensor_parallel_size=8 ...
# DIRECTORY belongs to this job while it is in the queue; the job writes slurm_finished there when it succeeds. A recipe that
# failed is not started again automatically.
#SBATCH --job-name=recipe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source slurm/lib.sh
[[ $# -ge 2 && -f recipes/$2.py ]] || stop 2 "give a directory, then the name of a recipe in recipes/, without .py"
RUN_DIR=$1
frpo_export
frpo_own_run_dir
frpo_srun -- python "recipes/$2.py" "${@:3}"
code=$?
[ "$code" = 0 ] && frpo_finished
stop "$code" "recipes/$2.py ended with exit code $code"
