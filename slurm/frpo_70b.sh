#!/usr/bin/env bash
# FRPO on a 70B model, 8 nodes of 8 GPUs:  sbatch slurm/frpo_70b.sh [override ...]
#   sbatch slurm/frpo_70b.sh objective.lambda_=0.5 trainer.max_steps=200
#   sbatch --nodes=16 slurm/frpo_70b.sh --config-name experiment/mine
# bash slurm/frpo_70b.sh [override ...] checks the configuration on the login node first, and then submits it.
#SBATCH --job-name=frpo_70b
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
frpo_train frpo.py experiment/frpo_70b "$@"
