#!/usr/bin/env bash
# Supervised fine-tuning of a 70B model, 8 nodes of 8 GPUs:  sbatch slurm/sft_70b.sh [override ...]
#   sbatch slurm/sft_70b.sh model.path=runs/mine/hf optim.lr=1e-6
#   sbatch --nodes=16 slurm/sft_70b.sh --config-name experiment/mine
# bash slurm/sft_70b.sh [override ...] checks the configuration on the login node first, and then submits it.
#SBATCH --job-name=sft_70b
#SBATCH --nodes=8
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
frpo_train sft.py experiment/sft_70b "$@"
