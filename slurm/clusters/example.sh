# shellcheck shell=bash disable=SC2034
# An example of a site's file: settings beyond the defaults. Copy it to
# slurm/clusters/<ClusterName>.sh, with the name that `scontrol show config` says: every job script
# sources that file on the batch node, in the project's root. All of it is optional. Accounts and
# partitions are better given to sbatch, or by SBATCH_ACCOUNT and SBATCH_PARTITION in your shell.
#
# A command that fails ends the job at once, and the job names its line. One that is tested (if, &&,
# ||) may fail, and so may what other files and functions do before they succeed. Variables may be
# unset, as in a login shell.

# Modules, or an environment that is activated:
#   module load cuda/12.8
#   source /opt/miniforge/bin/activate coda; python=$CONDA_PREFIX/bin/python

# A container around each process; requeueing stays outside of it. Its interpreter is
# /opt/coda/bin/python, as in the image of install/, unless python=... names another one.
#   container=(apptainer exec --nv --bind "$PWD" /images/coda.sif)

# The interpreter, where it is not .venv/bin/python; CODA_PYTHON in your shell names it for one job:
#   python=/shared/envs/coda/bin/python

# Where libraries keep what they compile: a folder on the node's own disk, by default coda-<uid> in
# TMPDIR, or in /tmp:
#   export CODA_CACHE=/scratch/$USER/coda-cache

# Network interfaces, only where the defaults fail (gloo takes one name, NCCL a prefix or a list):
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib

# Seconds for which a process waits for the others before the attempt is given up, by default 1800:
#   export CODA_TIMEOUT_SECONDS=600

# Node-local scratch: copy the prepared data there once per node, and train from the copy:
#   srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" rsync -a /project/data/imagenet-224 "$TMPDIR/"
#   overrides=(data.prepared="$TMPDIR")
