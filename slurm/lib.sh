# What the job scripts share; they source it from the top of the checkout. Nothing here knows of an algorithm.
#
# From the environment of sbatch:
#   FRPO_CONTAINER     image for enroot/pyxis (srun --container-image); without it, a virtual environment
#   FRPO_MOUNTS        more --container-mounts; the checkout is always mounted, at its own path
#   FRPO_VENV          the virtual environment (default: .venv of the checkout)
#   FRPO_GRACE         seconds that a step may still take after the signal, which comes 300 s before the limit (default 240)
#   FRPO_MAX_FAILURES  give up after so many failed starts without a new checkpoint (default 3)
#
# How a job ends. By itself with 0: done. A wrong configuration ends it before anything starts (exit code 2). After any
# other end, a dead rank, a hang that the watchdog found, a full disk, an exception, the job requeues itself under its id,
# and the recipe continues from the newest checkpoint in its run_dir. Slurm requeues by itself when a node is lost.

set -uo pipefail

FRPO_VENV=${FRPO_VENV:-$PWD/.venv}
FRPO_MAX_FAILURES=${FRPO_MAX_FAILURES:-3}
FRPO_GRACE=${FRPO_GRACE:-240}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# srun with the job's environment: frpo_srun [srun options] -- command. A command's `python` is the environment's.
frpo_srun() {
  local options=() command
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  command=("$@")
  if [ -n "${FRPO_CONTAINER:-}" ]; then
    options+=("--container-image=$FRPO_CONTAINER" "--container-workdir=$PWD" "--container-mounts=$PWD:$PWD${FRPO_MOUNTS:+,$FRPO_MOUNTS}")
  else
    [ "$1" = python ] && command[0]=$FRPO_VENV/bin/python
  fi
  srun --export=ALL --overlap --label --kill-on-bad-exit=1 "${options[@]}" "${command[@]}"
}

# run_dir of the overrides, or one named after the job: the same at every restart.
frpo_run_dir() {
  local argument found=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  for argument in "$@"; do
    case "$argument" in run_dir=*) found=${argument#run_dir=} ;; esac
  done
  echo "$found"
}

frpo_newest_checkpoint() { ls "$RUN_DIR/checkpoints" 2>/dev/null | grep -x 'step_[0-9]*' | tail -n 1; }

# The requeued job keeps its id, its log and its run_dir. Held first, because only a pending job's exclusions can be set.
frpo_requeue() { # [nodes to exclude]
  local nodes=${1:-} before state
  state=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([^ ]*\).*/\1/p')
  [ "$state" = RUNNING ] || { say "not requeued: the job is $state"; exit 1; } # Slurm would revive a cancelled one
  trap '' TERM
  if [ -z "$nodes" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    before=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$before" = "(null)" ] && before=
    scontrol requeuehold "$SLURM_JOB_ID" &&
      scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$nodes"
    scontrol release "$SLURM_JOB_ID"
  fi
  exit 0
}

# After a failed start: requeue, unless the last FRPO_MAX_FAILURES starts all failed at the same checkpoint.
frpo_retry() { # what happened, [nodes to exclude]
  local newest failures=0 file=$RUN_DIR/slurm_failures
  newest=$(frpo_newest_checkpoint)
  [ -s "$file" ] && read -r failures checkpoint <"$file" && [ "$checkpoint" = "${newest:-none}" ] || failures=0
  failures=$((failures + 1))
  echo "$failures ${newest:-none}" >"$file"
  if [ "$failures" -ge "$FRPO_MAX_FAILURES" ]; then
    say "$1; giving up after $failures failed starts without a new checkpoint (newest: ${newest:-none}). The same sbatch command with run_dir=$RUN_DIR continues it."
    rm -f "$file"
    exit 1
  fi
  say "$1; requeued (failed start $failures of $FRPO_MAX_FAILURES without a new checkpoint; newest: ${newest:-none})"
  frpo_requeue "${2:-}"
}

# All nodes, in seconds: GPUs, versions, the shared file system, ports, all-reduce. Names the bad ones.
frpo_preflight() {
  local reports=$RUN_DIR/preflight/restart_${SLURM_RESTART_COUNT:-0}
  rm -rf "$reports"
  mkdir -p "$reports" || { say "run_dir=$RUN_DIR cannot be made here"; exit 2; }
  frpo_srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --time=2 \
    -- python slurm/preflight.py nodes "$reports"
  frpo_judge "$reports"
  frpo_srun --kill-on-bad-exit=0 --time=3 -- python slurm/preflight.py allreduce "$reports"
  frpo_judge "$reports"
}

frpo_judge() { # reports
  frpo_srun --nodes=1 --ntasks=1 --ntasks-per-node=1 -- python slurm/preflight.py judge "$1" ||
    frpo_retry "preflight failed" "$(cat "$1/bad_nodes" 2>/dev/null)"
}

# On a login node: check the configuration for the nodes that the script asks for, then submit it.
frpo_submit() { # recipe configuration [override ...]
  local nodes ranks
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$0") ranks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$0")
  "$FRPO_VENV/bin/python" "recipes/$1" --check --config-name "$2" "trainer.num_nodes=$nodes" "trainer.devices=$ranks" \
    run_dir=runs/checked "${@:3}" && exec sbatch "$0" "${@:3}"
}

# frpo_train recipe configuration [override ...]
frpo_train() {
  [ -n "${SLURM_JOB_ID:-}" ] || { frpo_submit "$@"; exit; }
  local recipe=$1 config=$2 script arguments step code signalled=0 deadline=0
  shift 2
  RUN_DIR=$(frpo_run_dir "$@")
  arguments=("trainer.num_nodes=$SLURM_JOB_NUM_NODES" "trainer.devices=$SLURM_NTASKS_PER_NODE" "run_dir=$RUN_DIR" "$@")
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) CUDA_DEVICE_MAX_CONNECTIONS=1
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # a line per rank where addresses have no names
  export FRPO_HOSTS FRPO_RANKS_PER_NODE=$SLURM_NTASKS_PER_NODE
  FRPO_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  MASTER_ADDR=${FRPO_HOSTS%%,*}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  script=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
  FRPO_RESUME_COMMAND="cd ${PWD@Q} && sbatch --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=$SLURM_NTASKS_PER_NODE ${script@Q} ${*@Q}"
  case " $*" in *" run_dir="*) ;; *) FRPO_RESUME_COMMAND+=" run_dir=$RUN_DIR" ;; esac
  export FRPO_RESUME_COMMAND
  trap 'signalled=1' USR1
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, run_dir=$RUN_DIR, newest checkpoint: $(frpo_newest_checkpoint | grep . || echo none)"
  frpo_srun --nodes=1 --ntasks=1 --ntasks-per-node=1 -- python "recipes/$recipe" --check --config-name "$config" "${arguments[@]}"
  [ $? = 2 ] && { say "the configuration is wrong, see above; nothing was started"; exit 2; }
  frpo_preflight
  # In the background, because a shell runs no trap before its foreground command has ended.
  frpo_srun -- python "recipes/$recipe" --config-name "$config" "${arguments[@]}" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    if [ "$signalled" = 1 ]; then
      signalled=2 deadline=$((SECONDS + FRPO_GRACE))
      say "the time limit is near: the run saves after this step, then the job goes on by requeue"
      scancel --signal=USR1 "$SLURM_JOB_ID" # to the steps, not to this shell
    elif [ "$signalled" = 2 ] && [ "$SECONDS" -ge "$deadline" ]; then
      say "the step did not end in $FRPO_GRACE s; requeued from $(frpo_newest_checkpoint | grep . || echo the beginning)"
      frpo_requeue
    fi
    sleep 1
  done
  wait "$step"
  code=$?
  [ "$code" = 0 ] && { say "finished"; exit 0; }
  [ "$code" = 2 ] && { say "the configuration is wrong, see above"; exit 2; }
  [ "$signalled" = 2 ] && { say "stopped by the signal after $(frpo_newest_checkpoint); requeued"; frpo_requeue; }
  frpo_retry "srun ended with exit code $code"
}
