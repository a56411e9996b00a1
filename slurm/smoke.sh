#!/usr/bin/env bash
# Check that the project runs on this cluster at all: train a tiny network on two nodes, which needs
# no data and about a minute.
#   sbatch slurm/smoke.sh
#SBATCH --job-name=coda-smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
#SBATCH --output=coda-%j.out
set -uo pipefail
source "${SLURM_SUBMIT_DIR:?this script is for sbatch}/slurm/common.sh"

begin_job
folder=$PWD/$logs/smoke
launch train digits_coda_resnet20 name=smoke runs="$folder" \
    data.image_size=8 data.prepared="$folder" model.name=coda_s model.args='{rank: 2}' \
    training.epochs=1 training.global_batch_size=128 training.warmup_epochs=0 \
    'evaluation.final_metrics=[accuracy]'
code=$?
if [ "$code" = 0 ]; then
    echo "smoke test passed on $SLURM_JOB_NODELIST in $SECONDS s"
else
    echo "smoke test failed with code $code: see $logs/$attempt and $folder/smoke/first_error.txt"
    first_mistake
fi
exit "$code"
