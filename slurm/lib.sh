# Shared by the job scripts, which source it from the top of the checkout. Nothing here depends on an algorithm.
#
# From the environment of sbatch:
#   FRPO_CONTAINER     image for enroot/pyxis (srun --container-image); without it, a virtual environment
#   FRPO_MOUNTS        more --container-mounts; checkout and run_dir are mounted at their own paths
#   FRPO_VENV          the virtual environment (default: .venv of the checkout)
#   FRPO_GRACE         seconds that a step may still take after the signal, which comes 300 s before the limit (default 240)
#   FRPO_PATIENCE      seconds in which every node must report in the preflight (default 40)
#   FRPO_MAX_FAILURES  give up after so many failed starts without a new checkpoint (default 3)
#
# How a job ends. Exit code 0: done. A wrong configuration ends it, mostly before anything is loaded (exit code 2). After any
# other end (a dead rank, a hang that the watchdog found, an exception) the job requeues itself under its number, and the
# recipe continues from the newest checkpoint in its run_dir. When a node is lost, Slurm itself requeues the job.

set -uo pipefail

FRPO_VENV=${FRPO_VENV:-$PWD/.venv}
FRPO_MAX_FAILURES=${FRPO_MAX_FAILURES:-3}
FRPO_GRACE=${FRPO_GRACE:-240}
signalled=0 training=0 deadline=0

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

stop() { # exit code, why
  say "$2"
  exit "$1"
}

# Repeats a command that Slurm's controller may refuse while it restarts.
try() {
  local attempt
  for attempt in 1 2 3 4 5 6; do
    "$@" && return
    sleep 5
  done
  return 1
}

# Repeats a query likewise, and prints its answer, which is never empty where it is right.
ask() {
  try frpo_answer "$@"
}

frpo_answer() {
  local answer
  answer=$("$@") && [ -n "$answer" ] && echo "$answer"
}

# Runs srun with the job's environment: frpo_srun [srun options] -- command. A command's `python` is the environment's.
frpo_srun() {
  local options=() command run_dir
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  command=("$@")
  if [ -n "${FRPO_CONTAINER:-}" ]; then
    run_dir=$(realpath -m -- "${RUN_DIR:-$PWD}")
    [[ $run_dir == "$PWD"/* ]] && run_dir=$PWD # the checkout is mounted
    [[ $run_dir == *[,:]* ]] && stop 2 "$run_dir has a comma or colon, which a container's list of mounts cannot hold; choose another run_dir"
    options+=("--container-image=$FRPO_CONTAINER" "--container-workdir=$PWD"
      "--container-mounts=$PWD:$PWD,$run_dir:$run_dir${FRPO_MOUNTS:+,$FRPO_MOUNTS}")
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this checkout, not one in the image
  else
    [ "$1" = python ] && command[0]=$FRPO_VENV/bin/python
  fi
  srun --export=ALL --overlap --label --kill-on-bad-exit=1 "${options[@]}" "${command[@]}"
}

# Runs frpo_srun in the background, because a shell runs no trap before its foreground command has ended.
frpo_step() {
  local step
  frpo_srun "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    frpo_heed_signal
    sleep 0.5
  done
  wait "$step"
}

# Handles Slurm's signal: the time limit is near.
frpo_heed_signal() {
  [ "$signalled" = 0 ] && return
  [ "$training" = 1 ] || frpo_continue "the time limit came before training began"
  if [ "$signalled" = 1 ]; then
    signalled=2 deadline=$((SECONDS + FRPO_GRACE))
    say "the time limit is near: the run saves after this step, then the job goes on by requeue"
    try scancel --signal=USR1 "$SLURM_JOB_ID" # to the steps, not to this shell
  elif [ "$SECONDS" -ge "$deadline" ]; then
    frpo_continue "the step did not end in $FRPO_GRACE s"
  fi
}

frpo_newest_checkpoint() { ls -- "$RUN_DIR/checkpoints" 2>/dev/null | grep -x 'step_[0-9]*' | tail -n 1; }

# Requeues after the signal; it counts as a failed start if this one made no checkpoint.
frpo_continue() { # what happened
  local newest
  newest=$(frpo_newest_checkpoint)
  [ "$newest" = "$began" ] && frpo_retry "$1"
  say "$1; requeued from $newest"
  frpo_requeue
}

# Requeues after a failed start, unless the last FRPO_MAX_FAILURES starts all failed at the same checkpoint.
frpo_retry() { # what happened
  local newest checkpoint failures=0 file=$RUN_DIR/slurm_failures
  newest=$(frpo_newest_checkpoint)
  newest=${newest:-none}
  [ -s "$file" ] && read -r failures checkpoint <"$file" && [ "$checkpoint" = "$newest" ] || failures=0
  failures=$((failures + 1))
  if [ "$failures" -ge "$FRPO_MAX_FAILURES" ]; then
    rm -f "$file"
    stop 1 "$1; giving up after $failures failed starts without a new checkpoint (newest: $newest). $(frpo_how_to_continue)"
  fi
  mkdir -p -- "$RUN_DIR"
  echo "$failures $newest" >"$file" || stop 1 "$1; $file cannot be written. $(frpo_how_to_continue)"
  say "$1; requeued (failed start $failures of $FRPO_MAX_FAILURES without a new checkpoint; newest: $newest)"
  frpo_requeue
}

frpo_how_to_continue() { echo "To continue: the same sbatch command${OWN_RUN_DIR:+ with ${OWN_RUN_DIR@Q}}"; }

# The requeued job keeps its number, its log and its run_dir.
frpo_requeue() { # [nodes to exclude]
  local nodes=${1:-} job state before left
  job=$(ask scontrol -o show job "$SLURM_JOB_ID")
  state=$(sed -n 's/.* JobState=\([^ ]*\).*/\1/p' <<<"$job")
  [ "$state" = RUNNING ] || stop 1 "not requeued: the job is ${state:-unknown to Slurm}" # Slurm would start a cancelled job again
  if [ -n "$nodes" ]; then
    before=$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<<"$job")
    [ "$before" = "(null)" ] || nodes=$before,$nodes
    left=$(ask sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u | grep -cvxFf <(ask scontrol show hostnames "$nodes"))
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
      frpo_retry "without $nodes the partition has $left nodes, too few for this job: none is excluded"
    fi
  fi
  trap '' TERM # Slurm ends this shell now
  try scontrol requeue "$SLURM_JOB_ID" || stop 1 "Slurm does not requeue this job. $(frpo_how_to_continue)"
  # A pending job's nodes can be changed, and Slurm starts it only some seconds from now.
  [ -z "$nodes" ] || try scontrol update "JobId=$SLURM_JOB_ID" "ReqNodeList=" "ExcNodeList=$nodes"
  exit 0
}

# Checks all nodes in seconds: GPUs, versions, the shared file system, ports, all-reduce. Names the bad ones.
frpo_preflight() {
  local reports=$RUN_DIR/preflight/restart_${SLURM_RESTART_COUNT:-0} each=(--ntasks-per-node=1 --kill-on-bad-exit=0)
  rm -rf "$reports"
  mkdir -p "$reports" || frpo_exclude "$SLURMD_NODENAME" "$RUN_DIR cannot be made on it"
  frpo_step "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" "${each[@]}" --time=3 -- python slurm/preflight.py nodes "$reports"
  frpo_judge nodes "$reports"
  frpo_step --kill-on-bad-exit=0 --time=4 -- python slurm/preflight.py allreduce "$reports"
  frpo_judge ranks "$reports"
}

frpo_judge() { # nodes or ranks, reports
  local bad
  frpo_step --nodes=1 --ntasks=1 --ntasks-per-node=1 -- python slurm/preflight.py "judge-$1" "$2" && return
  bad=$(cat "$2/bad_nodes" 2>/dev/null)
  [ -z "$bad" ] && frpo_retry "preflight failed"
  frpo_exclude "$bad" "preflight failed"
}

# This isn't a failed start: each time one more node is excluded, so it comes to an end.
frpo_exclude() { # nodes, why
  say "$2; requeued without $1"
  frpo_requeue "$1"
}

# Sets RUN_DIR, which only the recipe knows, because it composes the configuration. Where that names none, RUN_DIR is a directory
# with the job's name and number, the same at every restart; OWN_RUN_DIR is then the override that continues it in another job.
frpo_find_run_dir() { # recipe [argument ...]
  local printed code
  RUN_DIR= OWN_RUN_DIR=
  export FRPO_DEFAULT_RUN_DIR=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  printed=$(frpo_srun --nodes=1 --ntasks=1 --ntasks-per-node=1 -- python "recipes/$1" --print-run-dir "${@:2}")
  code=$?
  RUN_DIR=$(sed -n 's/^0: run_dir=//p' <<<"$printed") # srun puts the rank before a line
  [ "$code" = 2 ] && stop 2 "the configuration is wrong, see above; nothing was started"
  if [ -z "$RUN_DIR" ] || [ "$RUN_DIR" = "$FRPO_DEFAULT_RUN_DIR" ]; then
    RUN_DIR=$FRPO_DEFAULT_RUN_DIR
    OWN_RUN_DIR="run_dir='$(sed "s/'/\\\\'/g; s/\\\${/\\\\\${/g" <<<"$RUN_DIR")'" # as Hydra reads a text
  fi
  [ "$code" = 0 ] || frpo_retry "the configuration's run_dir was not found (exit code $code)"
}

# Two jobs in one run_dir would overwrite each other's checkpoints.
frpo_own_run_dir() {
  local other queue
  mkdir -p -- "$RUN_DIR"
  other=$(cat "$RUN_DIR/slurm_job" 2>/dev/null)
  # Asks for the whole queue, which has this job: for a job that has left it, squeue fails as it does when Slurm is unreachable.
  queue=$(ask squeue -h -o %A) || stop 1 "Slurm does not report which jobs are in the queue"
  if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ] && grep -qx "$other" <<<"$queue"; then
    stop 2 "run_dir=$RUN_DIR belongs to job $other, which is still in the queue; cancel it first, or choose another run_dir"
  fi
  echo "$SLURM_JOB_ID" >"$RUN_DIR/slurm_job"
  rm -f "$RUN_DIR/slurm_finished"
}

frpo_finished() { # slurm/forgetting.sh looks for the file
  local file=$RUN_DIR/slurm_finished
  echo "$SLURM_JOB_ID" >"$file" || { rm -f "$file"; stop 1 "finished, but $file cannot be written"; }
  stop 0 "finished"
}

# Outside of a job, checks the configuration for the nodes that the script asks for, then submits it.
frpo_submit() { # recipe configuration [override ...]
  local nodes ranks
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$0") ranks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$0")
  if [ -z "${FRPO_CONTAINER:-}" ]; then
    FRPO_LOGIN_NODE=1 FRPO_DEFAULT_RUN_DIR=runs/checked "$FRPO_VENV/bin/python" "recipes/$1" --check --config-name "$2" \
      "trainer.num_nodes=$nodes" "trainer.devices=$ranks" "${@:3}" || exit
  fi
  exec sbatch "$0" "${@:3}"
}

# Exports what the processes need: where they meet, how many there are, and how to continue the run.
frpo_export() { # [override ...]
  local script restart=${SLURM_RESTART_COUNT:-0}
  FRPO_HOSTS=$(ask scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  MASTER_ADDR=${FRPO_HOSTS%%,*}
  MASTER_PORT=$((20000 + 2 * ((SLURM_JOB_ID + 7 * restart) % 5000))) # the preflight uses the next one
  FRPO_RANKS_PER_NODE=$SLURM_NTASKS_PER_NODE
  SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE > SLURM_NTASKS_PER_NODE ? SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE : 1))
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # else it prints a line per rank where addresses have no names
  script=$(ask scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* Command=\(.*\) WorkDir=.*/\1/p')
  script=${script%" $*"} # Slurm appends the arguments
  FRPO_RESUME_COMMAND="cd ${PWD@Q} && sbatch --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=$SLURM_NTASKS_PER_NODE ${script@Q} ${*@Q}"
  [ -z "${OWN_RUN_DIR:-}" ] || FRPO_RESUME_COMMAND+=" ${OWN_RUN_DIR@Q}"
  export FRPO_HOSTS MASTER_ADDR MASTER_PORT FRPO_RANKS_PER_NODE SRUN_CPUS_PER_TASK OMP_NUM_THREADS TORCH_CPP_LOG_LEVEL
  export FRPO_RESUME_COMMAND
}

# frpo_train recipe configuration [override ...]
frpo_train() {
  [[ $0 == */slurm_script ]] || frpo_submit "$@"
  local recipe=$1 config=$2 arguments code
  shift 2
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || stop 2 "job arrays are not supported: requeue and signals would reach all of their tasks"
  [ -n "${SLURM_NTASKS_PER_NODE:-}" ] || stop 2 "--ntasks-per-node is not set"
  arguments=(--config-name "$config" "trainer.num_nodes=$SLURM_JOB_NUM_NODES" "trainer.devices=$SLURM_NTASKS_PER_NODE" "$@")
  trap '[ "$signalled" = 0 ] && signalled=1' USR1
  frpo_find_run_dir "$recipe" "${arguments[@]}"
  frpo_export "$@"
  frpo_own_run_dir
  began=$(frpo_newest_checkpoint)
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, run_dir=$RUN_DIR, newest checkpoint: ${began:-none}"
  frpo_preflight
  frpo_step --nodes=1 --ntasks=1 --ntasks-per-node=1 -- python "recipes/$recipe" --check "${arguments[@]}"
  code=$?
  [ "$code" = 2 ] && stop 2 "the configuration is wrong, see above; nothing was started"
  [ "$code" = 0 ] || frpo_retry "the check of the configuration ended with exit code $code"
  training=1
  export FRPO_REFUSED=$RUN_DIR/slurm_refused
  rm -f "$FRPO_REFUSED"
  frpo_step -- python "recipes/$recipe" "${arguments[@]}"
  code=$?
  [ "$code" = 0 ] && frpo_finished
  # One rank may refuse what others do not see; srun then ends the others and returns their exit code. ls shows what another
  # node has just written, where a lookup of the file's name may still be cached as absent.
  [ "$code" = 2 ] || ls -- "$RUN_DIR" | grep -qx slurm_refused && stop 2 "the configuration is wrong, see above"
  [ "$signalled" = 2 ] && frpo_continue "stopped by the signal"
  frpo_retry "srun ended with exit code $code"
}
