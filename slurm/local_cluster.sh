#!/usr/bin/env bash
# A real two-node Slurm on this machine, to try a job script before the cluster sees it:
#   slurm/local_cluster.sh start
#   slurm/local_cluster.sh status | stop
# After `start`, export SLURM_CONF=... as it says, and use sbatch, squeue and scancel as usual.
#
# Needs Debian's packages slurm-wlm and munge, but neither a GPU nor systemd; runs as root, also in
# a container. Everything (configuration, keys, sockets, logs) is in the folder CODA_LOCAL_CLUSTER,
# whose path must be short; the ports count up from CODA_LOCAL_CLUSTER_PORT. A Slurm of the system
# is not touched. Each node claims 4 GPUs, for which there are empty files, and 32 processors, so
# that GPU requests are accepted as they are. Partitions: `gpu`, whose jobs are preempted and
# requeued, and `urgent`, which preempts them.
#
# `start --networks` gives each node a network and a host name of its own, so that it can be cut
# off; root only, one such cluster per machine. Its nodes cannot write in the folder
# CODA_LOCAL_CLUSTER_READ_ONLY, such as a home, if that is set.
# To break things: cut NODE, heal NODE, kill-node NODE (with all its processes; --networks only),
# start-node NODE.
set -euo pipefail

folder=${CODA_LOCAL_CLUSTER:-/tmp/coda-cluster-$(id -u)}
port=${CODA_LOCAL_CLUSTER_PORT:-16817}
read_only=${CODA_LOCAL_CLUSTER_READ_ONLY:-}
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
nodes=(n1 n2)
# Of the range that is reserved for tests of networks.
network=198.18.77

fail() {
    printf 'local_cluster: %s\n' "$*" >&2
    exit 2
}

# Whether each node has a network of its own.
networks() {
    [ -e "$folder/hosts" ]
}

start_networks() {
    local number
    ! ip link show coda >/dev/null 2>&1 ||
        fail "another cluster has networks already: stop it, or  ip link delete coda"
    [ -z "$(ip -4 route show "$network.0/24")" ] ||
        fail "the network $network.0 is in use on this machine"
    printf '%s\n' '127.0.0.1 localhost' "$network.1 $(hostname -s)" \
        "$network.11 n1" "$network.12 n2" >"$folder/hosts"
    ip link add coda type bridge
    ip address add "$network.1/24" dev coda
    ip link set coda up
    for number in 1 2; do
        ip netns add "coda-n$number"
        ip link add "coda-n$number" type veth peer name eth0 netns "coda-n$number"
        ip link set "coda-n$number" master coda up
        ip -n "coda-n$number" address add "$network.1$number/24" dev eth0
        ip -n "coda-n$number" link set lo up
        ip -n "coda-n$number" link set eth0 up
    done
}

stop_networks() {
    local node
    for node in "${nodes[@]}"; do
        ip link delete "coda-$node" 2>/dev/null || true
        ip netns delete "coda-$node" 2>/dev/null || true
    done
    ip link delete coda 2>/dev/null || true
}

write_configuration() {
    local user host address=127.0.0.1 of_node="CPUs=32 RealMemory=256000 Gres=gpu:4" first second
    user=$(id -un)
    host=$(hostname -s)
    first="NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1))"
    second="NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2))"
    if networks; then
        address=$network.1
        first="NodeAddr=$network.11 Port=$((port + 1))"
        second="NodeAddr=$network.12 Port=$((port + 1))"
    fi
    mkdir -p "$folder"/{state,spool-n1,spool-n2}
    touch "$folder"/gpu{0..3}
    [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-3]" >"$folder/gres.conf"
    # cred_expire: a requeued job may start that many seconds later (Slurm's default means 121).
    # MinJobAge: an ended job is shown for a day. config_overrides: the nodes claim more processors
    # than there are. MessageTimeout: above KillWait, see docs/slurm.md.
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host($address)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=3,sched_interval=3
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
MinJobAge=86400
SlurmdTimeout=20
KillWait=10
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 $first $of_node
NodeName=n2 $second $of_node
PartitionName=gpu Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
CONF
}

# Whether the process of a PIDFILE is alive.
running() { # PIDFILE
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

start_node() { # NODE
    ! running "$folder/slurmd-$1.pid" || return 0
    if networks; then
        # Not by `ip netns exec`, which hides the cgroups that slurmd looks for.
        # shellcheck disable=SC2016
        nsenter --net="/run/netns/coda-$1" unshare --uts --mount bash -c \
            'hostname "$1" && mount --bind "$2" /etc/hosts &&
                { [ -z "$3" ] || mount --bind --options ro "$3" "$3"; } && exec slurmd -N "$1"' \
            - "$1" "$folder/hosts" "$read_only"
    else
        slurmd -N "$1"
    fi
}

start() { # [--networks]
    local program node
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null ||
            fail "$program is missing: apt-get install slurm-wlm munge"
    done
    [ ${#folder} -lt 80 ] ||
        fail "$folder is too long for a socket: set CODA_LOCAL_CLUSTER to a shorter path"
    [ ! -e "$SLURM_CONF" ] || fail "$folder holds a cluster already: $0 status, or stop"
    mkdir -p "$folder"
    chmod 755 "$folder"
    # What has started is stopped if the rest does not start.
    trap 'stop' EXIT
    [ "${1:-}" != --networks ] || start_networks
    write_configuration
    # --force: the folder may be in one that others may write to, such as /tmp.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge.seed" 2>>"$folder/munged.log"
    slurmctld
    for node in "${nodes[@]}"; do start_node "$node"; done
    for _ in {1..60}; do
        [ "$(nodes_in idle 2>/dev/null)" != 2 ] || break
        sleep 0.5
    done
    status || fail "the nodes are not ready:"$'\n'"$(tail -n 5 "$folder"/*.log)"
    trap - EXIT
    printf 'ready; now:  export SLURM_CONF=%s\n' "$SLURM_CONF"
}

# The number of nodes that are in one of some states, such as idle,alloc.
nodes_in() { # STATES
    sinfo --noheader --format=%D --states="$1" --partition=gpu | awk '{ s += $1 } END { print s }'
}

status() {
    [ -s "$SLURM_CONF" ] || fail "not started"
    sinfo --Node --format='%.6N %.10P %.12t %.4c %G'
    squeue --format='%.10i %.12P %.20j %.12T %.10M %R'
    [ "$(nodes_in idle,alloc,mix,comp)" = 2 ]
}

# Numbers of the processes of a NAME whose environment names this cluster.
of_this_cluster() { # NAME
    local process
    for process in $(pgrep -x "$1"); do
        ! grep -qsz "^SLURM_CONF=$SLURM_CONF\$" "/proc/$process/environ" || echo "$process"
    done
}

stop() {
    local name process
    [ -d "$folder" ] || fail "not started"
    if running "$folder/slurmctld.pid"; then
        scancel --user="$(id -un)" || true
        for _ in {1..40}; do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    # Those of jobs that did not end.
    for process in $(of_this_cluster slurmstepd); do
        pkill -KILL -P "$process" || true
        kill -KILL "$process" 2>/dev/null || true
    done
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        ! running "$folder/$name.pid" || kill "$(cat "$folder/$name.pid")"
    done
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        for _ in {1..40}; do
            running "$folder/$name.pid" || break
            sleep 0.25
        done
    done
    ! networks || stop_networks
    rm -rf "$folder"
}

# Kill all processes of a node, as when its power fails.
kill_node() { # NODE
    ip netns pids "coda-$1" | xargs --no-run-if-empty kill -KILL
    # A start-node right after it would find a slurmd that is still there.
    while running "$folder/slurmd-$1.pid"; do sleep 0.1; done
}

case ${1:-} in
start) start "${2:-}" ;;
status) status ;;
stop) stop ;;
cut) ip link set "coda-${2:?NODE}" down ;;
heal) ip link set "coda-${2:?NODE}" up ;;
kill-node) kill_node "${2:?NODE}" ;;
start-node) start_node "${2:?NODE}" ;;
*) fail "usage: $0 start [--networks] | status | stop | cut, heal, kill-node or start-node NODE" ;;
esac
