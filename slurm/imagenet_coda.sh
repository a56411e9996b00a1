#!/usr/bin/env bash
# Train a recipe on several nodes, one process per GPU:
#   sbatch slurm/imagenet_coda.sh [RECIPE] [key=value ...]
# Submit from the project's root, after `make setup` there and slurm/prepare_data.sh with the
# recipe. Through time limits, preemption, crashes and dead nodes the job is requeued and goes on
# from its newest checkpoint; see docs/slurm.md.
#SBATCH --job-name=coda
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=coda-%j.out
set -uo pipefail
source "${SLURM_SUBMIT_DIR:?this script is for sbatch}/slurm/common.sh"

begin_job
recipe=${1:-imagenet_coda_resnet50}
# This job is one element of slurm/sweep.sh.
if [ -n "${CODA_SWEEP:-}" ]; then
    # shellcheck disable=SC2086
    read -ra chosen <<<"$(combination "$SLURM_ARRAY_TASK_ID" $CODA_SWEEP)"
    stem=$(basename "$recipe" .yaml)
    overrides+=(
        "${chosen[@]}"
        name="$stem$(printf -- '-%s' "${chosen[@]#*=}")"
        tracking.experiment="$stem-sweep"
        tracking.parent="$stem-sweep-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
    )
fi
launch train "$recipe" "${@:2}" "${overrides[@]}"
end_job $?
