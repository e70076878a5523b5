#!/usr/bin/env bash
# FRPO on a mixture of experts (30B parameters, 3B active), 2 nodes of 8 GPUs:  sbatch slurm/frpo_30b_a3b.sh [override ...]
#   sbatch slurm/frpo_30b_a3b.sh objective.lambda_=0.5 trainer.max_steps=200
#   sbatch --nodes=1 slurm/frpo_30b_a3b.sh parallel=ep8_dp8 model.lora.rank=32 optim.lr=2e-5   # adapters
# bash slurm/frpo_30b_a3b.sh [override ...] checks the configuration on the login node first, and then submits it.
#SBATCH --job-name=frpo_30b_a3b
#SBATCH --nodes=2
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
frpo_train frpo.py experiment/frpo_30b_a3b "$@"
