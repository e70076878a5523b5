#!/usr/bin/env bash
# Supervised fine-tuning of a 7B model, one node of 8 GPUs:  sbatch slurm/sft_7b.sh [override ...]
#   sbatch slurm/sft_7b.sh model.path=runs/mine/hf optim.lr=1e-6
#   sbatch --nodes=2 slurm/sft_7b.sh --config-name experiment/mine parallel=tp4_dp2
# bash slurm/sft_7b.sh [override ...] checks the configuration on the login node first, and then submits it.
#SBATCH --job-name=sft_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source slurm/lib.sh
frpo_train sft.py experiment/sft_7b "$@"
