#!/usr/bin/env bash
# Write a recipe's data set as .beton files, once, on one node:
#   sbatch slurm/prepare_data.sh RECIPE [key=value ...]
#SBATCH --job-name=coda-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=coda-%j.out
set -uo pipefail
source "${SLURM_SUBMIT_DIR:?this script is for sbatch}/slurm/common.sh"

begin_job
launch prepare "${1:?RECIPE}" "${@:2}"
finish_job $?
