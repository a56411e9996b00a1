#!/usr/bin/env bash
# A real two-node Slurm on this machine, to try a job script before the cluster sees it:
#   slurm/local_cluster.sh start    then  export SLURM_CONF=...  as it says, and use sbatch, squeue, scancel as usual
#   slurm/local_cluster.sh status | stop
# Needs Debian's packages slurm-wlm and munge; no GPU, no systemd; runs as root, also in a container. Everything (configuration,
# keys, sockets, logs) stands in CODA_LOCAL_CLUSTER, a folder with a short path; the ports count up from CODA_LOCAL_CLUSTER_PORT.
# A Slurm of the system is not touched. Each node claims 4 GPUs (empty files stand in for them) and 32 processors, so that GPU
# requests are accepted as they are. Partitions: `gpu`, whose jobs are preempted and requeued, and `urgent`, which preempts them.
set -euo pipefail

folder=${CODA_LOCAL_CLUSTER:-/tmp/coda-cluster-$(id -u)}
port=${CODA_LOCAL_CLUSTER_PORT:-16817}
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
nodes=(n1 n2)

fail() {
    printf 'local_cluster: %s\n' "$*" >&2
    exit 2
}

write_configuration() {
    local user host
    user=$(id -un)
    host=$(hostname -s)
    mkdir -p "$folder"/{state,spool-n1,spool-n2}
    chmod 755 "$folder"
    touch "$folder"/gpu{0..3}
    [ -s "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-3]" >"$folder/gres.conf"
    # cred_expire: a requeued job may start that many seconds later (Slurm's default means 121). config_overrides: the
    # nodes claim more processors than there are.
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
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
SlurmdTimeout=20
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=32 RealMemory=256000 Gres=gpu:4
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=32 RealMemory=256000 Gres=gpu:4
PartitionName=gpu Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
CONF
}

running() { # PIDFILE
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

start_node() { # NODE
    running "$folder/slurmd-$1.pid" || slurmd -N "$1"
}

start() {
    local program
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
    done
    [ ${#folder} -lt 80 ] || fail "$folder is too long for a socket: set CODA_LOCAL_CLUSTER to a shorter path"
    write_configuration
    # --force: the folder may stand in one that others may write to, such as /tmp
    running "$folder/munged.pid" || munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/munged.log"
    running "$folder/slurmctld.pid" || slurmctld
    for node in "${nodes[@]}"; do start_node "$node"; done
    for _ in {1..60}; do
        [ "$(sinfo --noheader --format=%D --states=idle --partition=gpu 2>/dev/null)" != 2 ] || break
        sleep 0.5
    done
    status || fail "the nodes are not ready: see the logs in $folder"
    printf 'ready; now:  export SLURM_CONF=%s\n' "$SLURM_CONF"
}

status() {
    [ -s "$SLURM_CONF" ] || fail "not started"
    sinfo --Node --format='%.6N %.10P %.12t %.4c %G'
    squeue --format='%.10i %.12P %.20j %.12T %.10M %R'
    [ "$(sinfo --noheader --format=%D --states=idle,alloc,mix,comp --partition=gpu | awk '{s += $1} END {print s}')" = 2 ]
}

stop() {
    [ -s "$SLURM_CONF" ] || fail "not started"
    if running "$folder/slurmctld.pid"; then
        scancel --user="$(id -un)" || true
        for _ in {1..40}; do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        ! running "$folder/$name.pid" || kill "$(cat "$folder/$name.pid")"
    done
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        for _ in {1..40}; do
            running "$folder/$name.pid" || break
            sleep 0.25
        done
    done
    rm -rf "$folder"
}

case ${1:-} in
start) start ;;
status) status ;;
stop) stop ;;
start-node) start_node "${2:?NODE}" ;; # bring a node back that has died
*) fail "usage: $0 start | status | stop | start-node NODE" ;;
esac
