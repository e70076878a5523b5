#!/usr/bin/env bash
# cluster.sh - a real, throw-away Slurm cluster on one Debian/Ubuntu box.
#
#   up [N]            install packages if missing, start controller + N nodes (default 2)
#   status            daemons, nodes, queue; exit 0 only if every part is alive
#   kill-node K [--silent]
#                     hard-kill node K: SIGKILL of its pid namespace (slurmd, slurmstepd,
#                     every task). --silent cuts its network first, so that peers see no
#                     FIN/RST (power loss).
#   revive-node K     boot node K again and wait until Slurm sees it IDLE
#   wait JOBID [SECONDS]  wait (0.2 s polls; sbatch --wait polls after 2, 10, 42 s...) until the
#                     job has ended, print "JOBID STATE EXITCODE RESTARTS"; exit 0 for COMPLETED,
#                     1 for another end, 124 when SECONDS (default 300) have passed
#   down [--purge]    stop everything started here (--purge: remove the state folder too)
#   exec CMD...       run CMD on the "login node" (the controller's namespaces, same cwd)
#   node-exec K CMD.. run CMD inside node K's namespaces
#   env               print shell code that puts sbatch/srun/squeue/... on PATH:
#                         eval "$(cluster.sh env)"
#
# Each node is a set of Linux namespaces (net, pid, uts, ipc, mount) of its own: own
# address 10.77.0.K on eth0, own hostname nodeK, own /proc and /dev/shm, shared file
# system. The controller ("ctl", 10.77.0.254) has net/uts/ipc/mount namespaces. Nothing
# listens in the host's network namespace; /etc is not changed (slurm.conf and hosts are
# bind-mounted inside the namespaces). Needs root with CAP_SYS_ADMIN + CAP_NET_ADMIN and
# the veth and bridge drivers; no systemd, no cgroups.
#
# Settings (environment, read by `up` when it starts the controller):
#   SLURMKIT_DIR          state folder                      (/var/tmp/slurmkit)
#   SLURMKIT_CPUS         CPUs advertised per node          (128; 2 sockets)
#   SLURMKIT_MEM_MB       memory advertised per node        (1000000)
#   SLURMKIT_GPUS         gpus advertised per node, 0: none (8)
#   SLURMKIT_CRED_EXPIRE  s; also the least delay before a requeued job starts (5)
#   SLURMKIT_SLURMD_TIMEOUT  s without answer before a node is DOWN (10)
#   SLURMKIT_KILLWAIT     s between SIGTERM and SIGKILL     (5)
#   SLURMKIT_CONF_EXTRA   more lines for slurm.conf (last ones win)
#   SLURMKIT_NICE         niceness of everything            (5)
set -uo pipefail
umask 022
export LC_ALL=C

DIR=${SLURMKIT_DIR:-/var/tmp/slurmkit}
SELF=$(readlink -f "${BASH_SOURCE[0]}")
NET=10.77.0
CTL_IP=$NET.254
SYSBIN=/usr/bin
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CLIENTS="sbatch srun salloc squeue sinfo scontrol scancel sacct sacctmgr sattach sbcast sdiag sprio sreport sshare sstat strigger sview smap"

say() { echo "cluster: $*" >&2; }
die() { say "error: $*"; exit 1; }

# --- processes: a pid counts as ours only while its start time is the recorded one -----
starttime() { # field 22 of /proc/PID/stat; the name (field 2) may hold spaces
  local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  s=${s##*) }; set -- $s; echo "${20}"
}
remember() { echo "$2 $(starttime "$2")" > "$DIR/run/$1.proc"; }
pid_of() { # pid recorded under NAME if that very process still lives (zombies do not)
  local p t s
  { read -r p t < "$DIR/run/$1.proc"; } 2>/dev/null || return 1
  [ -n "${t:-}" ] && [ "$(starttime "$p")" = "$t" ] || return 1
  s=$(cat "/proc/$p/stat" 2>/dev/null) || return 1
  s=${s##*) }; [ "${s%% *}" != Z ] || return 1
  echo "$p"
}
stop() { # NAME SIGNAL SECONDS: signal, wait, then SIGKILL
  local p i; p=$(pid_of "$1") || { rm -f "$DIR/run/$1.proc"; return 0; }
  kill -"$2" "$p" 2>/dev/null
  for ((i = 0; i < $3 * 20; i++)); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  if pid_of "$1" >/dev/null; then kill -KILL "$p" 2>/dev/null; sleep 0.1; fi
  rm -f "$DIR/run/$1.proc"
}
child_of() { # first child of PID, waiting for it up to 5 s
  local c i
  for ((i = 0; i < 100; i++)); do
    read -r c _ 2>/dev/null < "/proc/$1/task/$1/children"
    [ -n "${c:-}" ] && { echo "$c"; return 0; }
    sleep 0.05
  done; return 1
}
slurmd_of() { # K: pid of node K's slurmd (a child of the node's pid 1), if it lives
  local p s; p=$(pid_of "node$1") || return 1
  for s in $(cat "/proc/$p/task/$p/children" 2>/dev/null); do
    [ "$(cat "/proc/$s/comm" 2>/dev/null)" = slurmd ] && { echo "$s"; return 0; }
  done; return 1
}
nodes_configured() { cat "$DIR/run/nodes" 2>/dev/null || echo 0; }
ctl_enter() { # run "$@" in the controller's namespaces, keeping the working directory
  local p; p=$(pid_of ctl) || die "the cluster is not up (cluster.sh up)"
  # exec: no process in between, so signals and exit codes are the command's own
  exec nsenter -t "$p" -m -n -u -i -- /bin/sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
}
on_ctl() { ( ctl_enter "$@" ); }

# --- packages -------------------------------------------------------------------------
install_packages() {
  local want=() c
  for c in slurmctld slurmd munged sbatch; do command -v $c >/dev/null || { want=(slurm-wlm munge); break; }; done
  command -v ip >/dev/null || want+=(iproute2)
  for c in unshare nsenter setsid flock; do command -v $c >/dev/null || { want+=(util-linux); break; }; done
  [ ${#want[@]} = 0 ] && return 0
  say "installing ${want[*]}"
  # The packages' services must not start: keep an existing policy, else put one for the time being.
  local pol=/usr/sbin/policy-rc.d mine=0
  [ -e $pol ] || { printf '#!/bin/sh\nexit 101\n' > $pol; chmod 755 $pol; mine=1; }
  local apt="env DEBIAN_FRONTEND=noninteractive nice apt-get -y -qq -o Dpkg::Use-Pty=0"
  $apt install --no-install-recommends "${want[@]}" >>"$DIR/log/apt.log" 2>&1 ||
    { $apt update && $apt install --no-install-recommends "${want[@]}"; } >>"$DIR/log/apt.log" 2>&1
  local rc=$?
  [ $mine = 1 ] && rm -f $pol
  [ $rc = 0 ] || die "apt-get failed, see $DIR/log/apt.log"
}

# --- configuration --------------------------------------------------------------------
write_config() { # N
  local n=$1 k cpus=${SLURMKIT_CPUS:-128} mem=${SLURMKIT_MEM_MB:-1000000} gpus=${SLURMKIT_GPUS:-8}
  local e=$DIR/etc gres=""
  if [ "$gpus" -gt 0 ]; then gres=" Gres=gpu:$gpus"; fi
  {
    cat <<CONF
ClusterName=slurmkit
SlurmctldHost=ctl($CTL_IP)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munged.sock,cred_expire=${SLURMKIT_CRED_EXPIRE:-5}
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no binding: works in a bare sandbox
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none
PropagateResourceLimits=NONE
# quick to notice and to forgive a dead node
SlurmdTimeout=${SLURMKIT_SLURMD_TIMEOUT:-10}
SlurmctldTimeout=30
ReturnToService=2
TreeWidth=65533
JobRequeue=1
EnforcePartLimits=ALL
KillWait=${SLURMKIT_KILLWAIT:-5}
MinJobAge=86400
InactiveLimit=0
BatchStartTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((mem / cpus))
SlurmdParameters=config_overrides
CONF
    [ -n "$gres" ] && echo "GresTypes=gpu"
    for ((k = 1; k <= n; k++)); do
      echo "NodeName=node$k NodeAddr=$NET.$k Boards=1 SocketsPerBoard=2 CoresPerSocket=$((cpus / 2)) ThreadsPerCore=1 RealMemory=$mem$gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    [ -n "${SLURMKIT_CONF_EXTRA:-}" ] && printf '%s\n' "$SLURMKIT_CONF_EXTRA"
  } > "$e/slurm.conf"
  if [ -n "$gres" ]; then
    # 22.05 refuses gpus without File= ("count reported lower than configured (0 < 8)"), and the
    # files must be devices: clones of (or links to) /dev/null, which Slurm never opens
    for ((k = 0; k < gpus; k++)); do [ -c "$DIR/dev/fakegpu$k" ] || { rm -f "$DIR/dev/fakegpu$k"; { [ -z "${SLURMKIT_NO_MKNOD:-}" ] && mknod "$DIR/dev/fakegpu$k" c 1 3; } 2>/dev/null || ln -s /dev/null "$DIR/dev/fakegpu$k"; }; done
    echo "NodeName=node[1-$n] Name=gpu File=$DIR/dev/fakegpu[0-$((gpus - 1))]" > "$e/gres.conf"
    [ "$gpus" = 1 ] && sed -i 's/\[0-0\]$/0/' "$e/gres.conf"
  else
    : > "$e/gres.conf"
  fi
  printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n' > "$e/cgroup.conf"
  : > "$e/plugstack.conf"
  : > "$e/.slurmkit"   # seen at /etc/slurm/.slurmkit only inside the cluster
  {
    echo "127.0.0.1 localhost"
    echo "$CTL_IP ctl"
    for ((k = 1; k <= n; k++)); do echo "$NET.$k node$k"; done
  } > "$e/hosts"
  if [ ! -s "$DIR/munge/munge.key" ]; then
    (umask 077; head -c 1024 /dev/urandom > "$DIR/munge/munge.key")
  fi
  chmod 600 "$DIR/munge/munge.key"
}
write_wrappers() {
  local c
  for c in $CLIENTS; do
    [ -x $SYSBIN/$c ] || continue
    cat > "$DIR/bin/$c" <<W
#!/bin/sh
# made by cluster.sh: on the host go to the login node, inside the cluster run the real one
[ -e /etc/slurm/.slurmkit ] && exec $SYSBIN/$c "\$@"
SLURMKIT_DIR='$DIR' exec '$DIR/bin/cluster.sh' exec $SYSBIN/$c "\$@"
W
    chmod 755 "$DIR/bin/$c"
  done
  cat "$SELF" > "$DIR/bin/.tmp.$$" && chmod 755 "$DIR/bin/.tmp.$$" && mv "$DIR/bin/.tmp.$$" "$DIR/bin/cluster.sh"
}

# --- what runs inside the namespaces --------------------------------------------------
common_init() { # HOSTNAME
  hostname "$1" 2>/dev/null || echo "$1" > /proc/sys/kernel/hostname
  export HOSTNAME=$1
  mount --bind "$DIR/etc/hosts" /etc/hosts && mount --bind "$DIR/etc" /etc/slurm || exit 1
  echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null
  echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 2>/dev/null
  ip link set lo up || exit 1
}
ctl_init() {
  common_init ctl
  ip link add br0 type bridge && ip addr add "$CTL_IP/24" dev br0 && ip link set br0 up || exit 1
  munged --foreground --force --socket="$DIR/munge/munged.sock" --key-file="$DIR/munge/munge.key" \
    --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/munged.seed" \
    >>"$DIR/log/munged.out" 2>&1 &
  remember munged $!
  local i
  for ((i = 0; i < 100; i++)); do [ -S "$DIR/munge/munged.sock" ] && break; sleep 0.05; done
  slurmctld -D -i >/dev/null 2>>"$DIR/log/slurmctld.err" &
  remember slurmctld $!
  exec sleep infinity   # same pid: holds the namespaces, and leaves no child behind when killed
}
node_init() { # K; pid 1 of the node: reaps, ends when slurmd is told to end
  common_init "node$1"
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm 2>/dev/null
  local i
  for ((i = 0; i < 200; i++)); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done
  ip addr add "$NET.$1/24" dev eth0 && ip link set eth0 up || exit 1
  slurmd -D -N "node$1" >/dev/null 2>>"$DIR/log/slurmd-node$1.err" &
  while :; do wait; sleep 3600 & wait $!; done
}

# --- starting parts -------------------------------------------------------------------
clean_env() { # (only in the background: execs) environment of the daemons: nothing from the caller but these
  exec env -i PATH="$PATH" HOME="${HOME:-/root}" LANG=C.UTF-8 SLURMKIT_DIR="$DIR" "$@"
}
start_ctl() {
  local u i
  clean_env setsid nice -n "${SLURMKIT_NICE:-5}" unshare --net --uts --ipc --mount --propagation slave \
    "$DIR/bin/cluster.sh" __ctl_init </dev/null >>"$DIR/log/ctl.out" 2>&1 9>&- &
  u=$!   # setsid, nice, unshare and bash exec one another: the pid stays
  remember ctl $u
  for ((i = 0; i < 200; i++)); do
    pid_of ctl >/dev/null || die "the controller's namespaces did not start, see $DIR/log/ctl.out: $(tail -3 "$DIR/log/ctl.out")"
    pid_of slurmctld >/dev/null && on_ctl $SYSBIN/scontrol ping 2>/dev/null | grep -q 'is UP' && return 0
    sleep 0.1
  done
  die "slurmctld does not answer, see $DIR/log/slurmctld.log: $(tail -3 "$DIR/log/slurmctld.log" "$DIR/log/slurmctld.err" 2>/dev/null)"
}
start_node() { # K
  local k=$1 u c ctl
  pid_of "node$k" >/dev/null && return 0
  ctl=$(pid_of ctl) || die "the cluster is not up"
  mkdir -p "$DIR/spool/node$k"
  clean_env setsid nice -n "${SLURMKIT_NICE:-5}" unshare --fork --kill-child --pid --mount-proc --net --uts --ipc --mount --propagation slave \
    "$DIR/bin/cluster.sh" __node_init "$k" </dev/null >>"$DIR/log/node$k.out" 2>&1 9>&- &
  u=$!
  c=$(child_of $u) || die "node$k did not start, see $DIR/log/node$k.out: $(tail -3 "$DIR/log/node$k.out")"
  remember "node$k" "$c"     # the node's pid 1, seen from outside
  remember "node$k.parent" "$u"
  nsenter -t "$ctl" -n ip link del "v$k" 2>/dev/null
  nsenter -t "$ctl" -n ip link add "v$k" type veth peer name eth0 netns "$c" &&
    nsenter -t "$ctl" -n ip link set "v$k" master br0 up || die "no veth pair for node$k"
}
node_states() { on_ctl $SYSBIN/sinfo -h -N -p "$(awk -F'[= ]' '/^PartitionName/{print $2; exit}' "$DIR/etc/slurm.conf")" -o '%N %T' 2>/dev/null; }
wait_nodes() { # SECONDS NODE...: until each is up and answers
  local t=$1 i ok s n; shift
  for ((i = 0; i < t * 5; i++)); do
    s=$(node_states); ok=1
    for n in "$@"; do grep -qxE "$n (idle|mixed|allocated|completing|reserved)" <<<"$s" || ok=0; done
    [ $ok = 1 ] && return 0
    sleep 0.2
  done
  say "nodes are not ready: $(tr '\n' ';' <<<"$s")"; return 1
}
node_arg() { case "${1:-}" in node[1-9]*) set -- "${1#node}";; esac
  [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] && [ "$1" -le "$(nodes_configured)" ] || die "which node? 1..$(nodes_configured)"; echo "$1"; }

# --- sub-commands ---------------------------------------------------------------------
cmd_up() {
  local had n k names=()
  [ "$(id -u)" = 0 ] || die "needs root"
  mkdir -p "$DIR"/{etc,run,log,state,spool,munge,dev,bin}; chmod 711 "$DIR/munge"
  exec 9>"$DIR/lock"; flock -w 120 9 || die "another cluster.sh is at work"
  had=$(nodes_configured); n=${1:-$([ "$had" -gt 0 ] && echo "$had" || echo 2)}
  [[ "$n" =~ ^[1-9][0-9]*$ ]] && [ "$n" -le 200 ] || die "up [N], N from 1 to 200"
  install_packages
  if pid_of ctl >/dev/null && { [ "$had" != "$n" ] || ! pid_of slurmctld >/dev/null || ! pid_of munged >/dev/null; }; then
    say "restarting ($had -> $n nodes, or a daemon is dead)"; stop_all
  fi
  if ! pid_of ctl >/dev/null; then
    stop_all
    rm -rf "$DIR"/{state,spool}/*
    rm -f "$DIR"/log/*; write_config "$n"; write_wrappers; echo "$n" > "$DIR/run/nodes"
    start_ctl
  fi
  for ((k = 1; k <= n; k++)); do
    slurmd_of $k >/dev/null || { stop "node$k" KILL 5; stop "node$k.parent" TERM 2; }
    start_node $k; names+=("node$k")
  done
  wait_nodes 60 "${names[@]}" || { cmd_status >&2; exit 1; }
  say "up: $n nodes. eval \"\$($SELF env)\" puts sbatch, srun, squeue... on PATH"
}
stop_all() {
  local k n; n=$(nodes_configured)
  for ((k = 1; k <= n; k++)); do stop "node$k" KILL 5; stop "node$k.parent" TERM 2; done
  stop slurmctld TERM 5; stop munged TERM 5; stop ctl KILL 2
  rm -f "$DIR"/run/*.pid "$DIR"/munge/munged.sock "$DIR"/munge/munged.sock.lock "$DIR"/munge/munged.pid
}
cmd_down() {
  [ -d "$DIR/run" ] || return 0
  exec 9>"$DIR/lock"; flock -w 120 9 || die "another cluster.sh is at work"
  stop_all; rm -f "$DIR/run/nodes"
  [ "${1:-}" = --purge ] && rm -rf "$DIR"
  say "down"
}
cmd_status() {
  local k n bad=0 p; n=$(nodes_configured)
  for k in munged slurmctld; do
    if p=$(pid_of $k); then echo "$k: pid $p"; else echo "$k: dead"; bad=1; fi
  done
  for ((k = 1; k <= n; k++)); do
    if p=$(pid_of "node$k") && ! slurmd_of $k >/dev/null; then echo "node$k: pid $p, but its slurmd is dead"; bad=1
    elif [ -n "$p" ]; then echo "node$k: pid $p (host view of its pid 1), $NET.$k"; else echo "node$k: dead"; bad=1; fi
  done
  [ "$n" -gt 0 ] || { echo "cluster: down"; return 1; }
  pid_of ctl >/dev/null || return 1
  on_ctl $SYSBIN/sinfo -N -o '%.8N %.10P %.12T %.5c %.9m %.14G %E' | awk 'NR==1 || !s[$1]++'
  on_ctl $SYSBIN/squeue -o '%.8i %.9P %.20j %.3t %.10M %.5D %R'
  return $bad
}
cmd_kill_node() {
  local k how=${2:-}; k=$(node_arg "${1:-}") || exit 1
  pid_of "node$k" >/dev/null || { say "node$k is dead already"; return 0; }
  case "$how" in
    --silent) nsenter -t "$(pid_of ctl)" -n ip link set "v$k" down || die "cannot cut node$k's link" ;;
    "") ;;
    *) die "kill-node K [--silent]" ;;
  esac
  stop "node$k" KILL 5; stop "node$k.parent" TERM 2
  say "node$k killed"
}
cmd_revive_node() {
  local k; k=$(node_arg "${1:-}") || exit 1
  exec 9>"$DIR/lock"; flock -w 120 9 || die "another cluster.sh is at work"
  # alive with its slurmd gone, or with its link cut: boot it afresh
  if ! slurmd_of "$k" >/dev/null || on_ctl $SYSBIN/sinfo -h -n "node$k" -o %T | grep -qE 'down|\*'; then
    stop "node$k" KILL 5; stop "node$k.parent" TERM 2
  fi
  rm -f "$DIR/run/slurmd-node$k.pid"
  start_node "$k"
  wait_nodes 60 "node$k" || exit 1
  say "node$k is back"
}
cmd_wait() {
  local j=${1:?wait JOBID [SECONDS]} t=${2:-300} s end=$((SECONDS + ${2:-300}))
  while :; do
    s=$(on_ctl $SYSBIN/scontrol -o show job "$j" 2>&1) || die "job $j: $s"
    # one line per array element; the job is over once no line is in a state that can go on
    if ! grep -qE 'JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING|SUSPENDED|RESIZING|REQUEUED|REQUEUE_HOLD|STAGE_OUT|SIGNALING|STOPPED|SPECIAL_EXIT)' <<<"$s"; then
      sed -E 's/^JobId=([0-9]+).* JobState=([A-Z_]+).* Restarts=([0-9]+).* ExitCode=([0-9:]+).*/\1 \2 \4 \3/' <<<"$s"
      ! grep -vqE 'JobState=COMPLETED ' <<<"$s"; return
    fi
    [ $SECONDS -lt "$end" ] || { say "job $j: still $(grep -oE 'JobState=[A-Z_]+ Reason=[^ ]+' <<<"$s" | sort | uniq -c | tr '\n' ';') after $t s"; return 124; }
    sleep 0.2
  done
}
cmd_env() {
  echo "export SLURMKIT_DIR='$DIR'; case \":\$PATH:\" in *':$DIR/bin:'*) ;; *) export PATH='$DIR/bin':\"\$PATH\" ;; esac"
}

cmd=${1:-}; [ $# -gt 0 ] && shift
case "$cmd" in
  up) cmd_up "$@" ;;
  down) cmd_down "$@" ;;
  status) cmd_status ;;
  kill-node) cmd_kill_node "$@" ;;
  revive-node) cmd_revive_node "$@" ;;
  exec) [ $# -gt 0 ] || die "exec CMD..."; ctl_enter "$@" ;;
  node-exec) k=$(node_arg "${1:-}") || exit 1; shift; p=$(pid_of "node$k") || die "node$k is dead"
    exec nsenter -t "$p" -m -n -u -i -p -- /bin/sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@" ;;
  wait) cmd_wait "$@" ;;
  env) cmd_env ;;
  __ctl_init) ctl_init ;;
  __node_init) node_init "$@" ;;
  *) sed -n '2,/^set -uo/{/^#/s/^# \{0,1\}//p}' "$SELF"; [ "$cmd" = help ] || exit 2 ;;
esac
