# shellcheck shell=bash disable=SC2034
# What a site needs beyond the defaults. Copy to slurm/clusters/<ClusterName>.sh, the name that `scontrol show config` says: every
# job script sources it on the batch node, in the project's root. All of it is optional. Accounts and partitions are better
# given to sbatch, or by SBATCH_ACCOUNT and SBATCH_PARTITION in your shell.

# Modules:
#   module load cuda/12.8

# A container around each process (requeueing stays outside of it); the interpreter inside it:
#   container=(apptainer exec --nv --bind "$PWD" /images/coda.sif)
#   python=/opt/venv/bin/python

# Network interfaces, only where the defaults fail (gloo takes one name, NCCL a prefix or a list):
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib

# Seconds a process waits for the others before the attempt is given up (1800):
#   export CODA_TIMEOUT_SECONDS=600

# Node-local scratch: copy the prepared data there once a node, and train from the copy.
#   srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" rsync -a /project/data/imagenet-224 "$TMPDIR/"
#   overrides=(data.prepared="$TMPDIR")
