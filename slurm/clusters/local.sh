# shellcheck shell=bash
# The cluster of slurm/local_cluster.sh: both nodes are this machine.
# With --networks each node has a network of its own, and the file of their hosts is there.
[ -e "${SLURM_CONF%/*}/hosts" ] || export GLOO_SOCKET_IFNAME=lo
# Several processes share few processors: more threads would only be in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
