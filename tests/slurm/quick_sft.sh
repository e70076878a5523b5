#!/usr/bin/env bash
# sft_7b.sh for small jobs of tests: without the preflight, which has tests of its own.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=2G
#SBATCH --requeue
#SBATCH --open-mode=append

source slurm/lib.sh
frpo_preflight() { :; }
# This rate stands for a configuration that is wrong on the node alone: the check where it is submitted passes.
case " $* " in *" optim.lr=7 "*) echo "0: sft.py: data source: not on this node" && exit 2 ;; esac
frpo_train sft.py experiment/sft_7b "$@"
