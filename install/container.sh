#!/bin/sh
# The steps of the container's image, for Dockerfile and apptainer.def: Debian 12 as root, the
# project's files in the working folder. Afterwards the interpreter with everything is
# /opt/coda/bin/python, where slurm/common.sh looks for it.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3 python3-venv make ca-certificates >/dev/null
make setup VENV=/opt/coda
rm -rf /var/lib/apt/lists/* /root/.cache
/opt/coda/bin/coda recipes >/dev/null
