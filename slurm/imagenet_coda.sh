#!/usr/bin/env bash
# Train a recipe on several nodes, one process per GPU:
#   sbatch slurm/imagenet_coda.sh [RECIPE] [key=value ...]
# Submit from the project's root, after `make setup` there and `coda prepare` with the recipe. Submitted again, or requeued by
# Slurm (not tested yet), it continues from the newest checkpoint.
#SBATCH --job-name=coda
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=coda-%j.out
set -euo pipefail

recipe=${1:-recipes/imagenet_coda_resnet50.yaml}
shift || true
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$MASTER_ADDR" >/dev/null; then # a name that only Slurm knows
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
# Below the kernel's ephemeral ports, and another one after a requeue.
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + ${SLURM_ARRAY_TASK_ID:-0} + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT HF_HUB_OFFLINE=1

# srun does not inherit --cpus-per-task everywhere; --kill-on-bad-exit ends the other ranks when one fails.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    .venv/bin/coda train "$recipe" "$@"
