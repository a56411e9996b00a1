#!/usr/bin/env bash
# Evaluate the export of a run on the GPUs of one node:
#   sbatch slurm/evaluate.sh RUN [key=value ...] [--metrics ...] [--methods ...]
#SBATCH --job-name=coda-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=coda-%j.out
set -uo pipefail
source "${SLURM_SUBMIT_DIR:?this script is for sbatch}/slurm/common.sh"

begin_job
launch evaluate "${1:?RUN}" "${@:2}"
finish_job $?
