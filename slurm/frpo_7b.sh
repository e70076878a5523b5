#!/usr/bin/env bash
# FRPO on a 7B model, one node of 8 GPUs:  sbatch slurm/frpo_7b.sh [override ...]
#   sbatch slurm/frpo_7b.sh objective.lambda_=0.5 trainer.max_steps=200
#   sbatch --nodes=2 slurm/frpo_7b.sh --config-name experiment/mine parallel=tp4_dp2
# bash slurm/frpo_7b.sh [override ...] checks the configuration on the login node first, and then submits it.
#SBATCH --job-name=frpo_7b
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
frpo_train frpo.py experiment/frpo_7b "$@"
