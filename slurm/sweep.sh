#!/usr/bin/env bash
# Train a recipe with every combination of some values, each as one element of a job array, all
# below one parent run of one MLflow experiment:
#   slurm/sweep.sh RECIPE model.args.temperature=100,1000 model.args.conv_stages=2,3 \
#       [-- sbatch options]
# Runs are called <recipe>-<value>-<value>; the experiment is called like the recipe, with -sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh

recipe=${1:?RECIPE key=value,value ... [-- sbatch options]}
shift
axes=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    axes+=("$1")
    shift
done
count=$(combinations "${axes[@]}")
for ((index = 0; index < count; index++)); do
    echo "$index: $(combination "$index" "${axes[@]}")"
done
CODA_SWEEP="${axes[*]}" sbatch --array="0-$((count - 1))" "${@:2}" slurm/imagenet_coda.sh "$recipe"
