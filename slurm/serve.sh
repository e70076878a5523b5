#!/usr/bin/env bash
# vLLM's server for one model, on its own node:  sbatch slurm/serve.sh URL_FILE MODEL [option of vllm serve ...]
#   sbatch slurm/serve.sh runs/servers/reward.url allenai/Llama-3.1-8B-Instruct-RM-RB2 --revision 2 --runner pooling
#   sbatch --gpus=2 slurm/serve.sh runs/servers/judge.url models/judge --tensor-parallel-size 2
# A reward finds it with remote.url=URL_FILE (docs/reward_models.md). FRPO_SERVE_HOST: where it listens, if not where Slurm reaches
# the node. End it with scancel.
#SBATCH --job-name=serve
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source slurm/lib.sh

frpo_heed_signal() { # instead of lib.sh's: there is nothing to save
  [ "$signalled" = 0 ] && return
  say "the time limit is near: requeued"
  frpo_requeue
}

[[ $# -ge 2 && $1 == *.url ]] || stop 2 "give the file for the address, such as runs/servers/judge.url, then the model"
RUN_DIR=$(dirname "$1")
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
trap 'signalled=1' USR1
node=$(try scontrol -o show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
frpo_step -- python slurm/serve.py "${FRPO_SERVE_HOST:-${node:-$SLURMD_NODENAME}}" "$@"
code=$?
stop "$code" "the server ended with exit code $code and is not started again; the reason is above"
