#!/usr/bin/env bash
# A study as a chain of jobs, from a login node:  bash slurm/forgetting.sh [--dry-run] --config-name study/mine [override ...]
#   bash slurm/forgetting.sh --config-name study/safety_7b out=runs/safety num_seeds=1
# Checks its parts as far as possible, then submits those that have neither finished nor are in the queue, each after the
# one that it needs: preparation, stage one of every arm, the later tasks, evaluations; then this script as the job that
# writes the report when all of them have ended (docs/slurm.md). Options: docs/options.md.
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source slurm/lib.sh
[[ $0 == */slurm_script ]] || exec "$FRPO_VENV/bin/python" slurm/forgetting.py submit "$@"

servers=
[[ ${1:-} == --end=* ]] && servers=${1#--end=} && shift
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
frpo_srun -- python slurm/forgetting.py report "$@"
code=$?
[ -z "$servers" ] || try scancel ${servers//,/ }
stop "$code" "the report ended with exit code $code"
