# shellcheck shell=bash
# The cluster of slurm/local_cluster.sh: both nodes are this machine.
[ -e "${SLURM_CONF%/*}/hosts" ] || export GLOO_SOCKET_IFNAME=lo # with --networks each node has its own
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several processes share few processors: threads would only be in each other's way
