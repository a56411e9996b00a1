# shellcheck shell=bash
# What the job scripts share: the environment of a job, starting the processes, and whether to start them again. Only functions.

# Go to the project's root, read the site's file, and choose the folder of this attempt's logs.
begin_job() {
    cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}" || exit 2
    python=${CODA_PYTHON:-.venv/bin/python}
    container=() # words before the command of a process, such as: apptainer exec --nv image.sif
    # shellcheck disable=SC2034
    overrides=() # key=value for the recipe of a training; the job script reads it
    site=slurm/clusters/${SLURM_CLUSTER_NAME:-none}.sh
    if [ -f "$site" ]; then
        # shellcheck disable=SC1090
        source "$site"
    fi
    logs=logs/$SLURM_JOB_ID
    attempt=${SLURM_RESTART_COUNT:-0}
    export CODA_REPORTS=$PWD/$logs/$attempt
    mkdir -p "$CODA_REPORTS"
    export HF_HUB_OFFLINE=1 # compute nodes have no way out
    # The program takes the first node's name for the address at which the processes meet, unless only Slurm knows that name.
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if [ -z "${MASTER_ADDR:-}" ] && ! getent hosts "$first" >/dev/null; then
        MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        export MASTER_ADDR
    fi
    echo "$(date '+%F %T') $SLURM_JOB_NAME: attempt $attempt on $SLURM_JOB_NODELIST, $SLURM_NTASKS processes, logs in $logs/$attempt"
}

# Run `coda ARGUMENTS` as one process per task; each writes its own log. Returns srun's code.
launch() {
    # Python takes seconds to come to a training's signal handlers and would die of a signal before: both are held back until then.
    local hold='import os, signal, sys
if sys.argv[1] == "train":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])'
    # srun does not inherit --cpus-per-task everywhere; --kill-on-bad-exit ends the other processes when one fails.
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --output="$logs/$attempt/rank-%t.log" --open-mode=append \
        "${container[@]}" "$python" -c "$hold" "$@"
}

# Number of combinations of the values in `key=value,value ...`.
combinations() { # AXIS ...
    local count=1 axis values
    for axis in "$@"; do
        IFS=, read -ra values <<<"${axis#*=}"
        count=$((count * ${#values[@]}))
    done
    echo "$count"
}

# The combination with a number from 0, as `key=value key=value`; the last axis changes fastest.
combination() { # INDEX AXIS ...
    local index=$1 position values chosen=()
    for ((position = $#; position > 1; position--)); do
        IFS=, read -ra values <<<"${!position#*=}"
        chosen=("${!position%%=*}=${values[index % ${#values[@]}]}" "${chosen[@]}")
        index=$((index / ${#values[@]}))
    done
    echo "${chosen[*]}"
}

# How many attempts in FOLDER in a row, the last included, have saved nothing newer. Preempted ones do not count.
fruitless() { # FOLDER
    local best=0 count=0 attempt saved
    for attempt in $(find "$1" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort -n); do
        saved=$(find "$1/$attempt" -name 'events-*' -exec cat {} + | awk '$1 == "saved" && $2 > n { n = $2 } END { print n + 0 }')
        if [ "$saved" -gt "$best" ]; then
            best=$saved count=0
        elif [ ! -e "$1/$attempt/preempted" ]; then
            count=$((count + 1))
        fi
    done
    echo "$count"
}

reported() { # FOLDER EVENT
    find "$1" -name 'events-*' -exec cat {} + | grep "^$2" >/dev/null # -q would end before cat, and pipefail take that for a failure
}

# What to do after an attempt: done, mistake, cancelled, requeue, stuck or enough. srun's code alone does not say, so the processes
# report in files: it is 143 where Slurm itself has signalled the step, and was seen to be 0 after the loss of a slurmstepd.
# STATE is the job's, RESTARTS the number so far.
verdict() { # CODE STATE FOLDER RESTARTS
    if reported "$3/$4" finished; then
        echo "done"
    elif reported "$3/$4" mistake || { [ "$1" = 2 ] && ! reported "$3/$4" disk; }; then
        echo mistake
    elif [ "$2" != RUNNING ]; then
        echo cancelled
    elif [ "$4" -ge "${CODA_MAX_RESTARTS:-100}" ]; then
        echo enough
    elif [ "$(fruitless "$3")" -ge 3 ]; then
        echo stuck
    else
        echo requeue
    fi
}

first_mistake() {
    grep -h -m 1 '^coda: ' "$logs/$attempt"/rank-*.log | head -n 1
}

# End a job that is not started again.
finish_job() { # CODE
    echo "$(date '+%F %T') ended with code $1"
    [ "$1" = 0 ] || first_mistake
    exit "$1"
}

# End the job with CODE, or have Slurm start it again. After scancel Slurm has killed this shell: nothing is requeued then.
end_job() { # CODE
    local code=$1 number=$SLURM_JOB_ID job what
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # one element has the number of the whole array
        number=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    job=$(scontrol show job "$number")
    if [[ $job =~ PreemptTime=[0-9] ]]; then # Slurm would not requeue a job that ends early when it is asked to go
        touch "$logs/$attempt/preempted"
    fi
    what=$(verdict "$code" "$(sed -n 's/.*JobState=\([A-Z]*\).*/\1/p' <<<"$job")" "$logs" "$attempt")
    echo "$(date '+%F %T') attempt $attempt ended with code $code: $what"
    case $what in
    "done") exit 0 ;;
    mistake) first_mistake ;;
    stuck) echo "3 attempts have saved nothing new: see $logs and first_error.txt in the run's folder; then submit again" ;;
    enough) echo "started again ${CODA_MAX_RESTARTS:-100} times (CODA_MAX_RESTARTS): submit again to go on" ;;
    requeue)
        scontrol requeue "$number"
        sleep 300 # until Slurm ends this shell
        ;;
    esac
    exit "$((code == 0 ? 1 : code))"
}
