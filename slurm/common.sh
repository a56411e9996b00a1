# shellcheck shell=bash
# Functions that the job scripts share: they set up the environment of a job, start its processes,
# and decide whether to start them again. Sourcing this file only defines functions.

# Go to the project's root, read the site's file, and choose the folder of this attempt's logs.
begin_job() {
    cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}" || exit 2
    python=${CODA_PYTHON:-}
    # Words before the command of a process, such as: apptainer exec --nv image.sif
    container=()
    # key=value for the recipe of a training run; the job script reads it.
    # shellcheck disable=SC2034
    overrides=()
    site=slurm/clusters/${SLURM_CLUSTER_NAME:-none}.sh
    if [ -f "$site" ]; then
        read_site
    fi
    if [ -z "$python" ]; then
        python=.venv/bin/python
        # The image that install/ makes has it elsewhere.
        [ "${#container[@]}" = 0 ] || python=/opt/coda/bin/python
    fi
    logs=logs/$SLURM_JOB_ID
    attempt=${SLURM_RESTART_COUNT:-0}
    export CODA_REPORTS=$PWD/$logs/$attempt
    mkdir -p "$CODA_REPORTS" || exit 2
    # Compute nodes often cannot reach the internet.
    export HF_HUB_OFFLINE=1
    # The program takes the first node's name for the address at which the processes meet. Where
    # only Slurm knows that name, the address comes from Slurm.
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if [ -z "${MASTER_ADDR:-}" ] && ! getent hosts "$first" >/dev/null; then
        MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        export MASTER_ADDR
    fi
    local where="$SLURM_JOB_NODELIST, $SLURM_NTASKS processes, logs in $logs/$attempt"
    echo "$(date '+%F %T') $SLURM_JOB_NAME: attempt $attempt on $where"
}

# Read the site's file as a login shell would: activations of environments use variables that are
# not set. A command of the file that fails ends the job, unless the file itself tests for it;
# whatever the file calls or sources is judged by its result alone.
read_site() {
    local shell_options code
    shell_options=$(set +o)
    set +uo pipefail
    trap 'site_failed $? "$LINENO" "${BASH_SOURCE[0]}"' ERR
    trap 'site_failed $?' EXIT
    # shellcheck disable=SC1090
    source "$site"
    code=$?
    trap - ERR
    [ "$code" = 0 ] || site_failed "$code"
    # The file may have set a trap of its own, which stays.
    [[ $(trap -p EXIT) != *site_failed* ]] || trap - EXIT
    eval "$shell_options"
}

# End the job because of the site's file; a FILE that it sources may go on.
site_failed() { # CODE [LINE FILE]
    [ "${3:-$site}" = "$site" ] || return 0
    trap - ERR EXIT
    local what="ended with code $1"
    [ $# = 1 ] || what="line $2 failed with code $1: $(sed -n "$2s/^ *//p" "$site")"
    echo "coda: $site $what (where a failure does not matter: command || true)"
    exit 2
}

# The modules that import all of what `coda COMMAND` imports.
imports() { # COMMAND
    case $1 in
    train) echo pipeline.training.loop ;;
    prepare) echo pipeline.data.prepare ;;
    evaluate) echo pipeline.reports.run ;;
    esac
}

# Import on this node what `coda COMMAND` imports: an environment that cannot will not do so at
# another attempt either.
import_once() { # COMMAND
    local log=$logs/$attempt/import.log program code what remedy
    program="from pipeline.caches import use_local_caches; use_local_caches(); "
    program+="import $(imports "$1")"
    "${container[@]}" "$python" -c "$program" >"$log" 2>&1
    code=$?
    case $code in
    0) return 0 ;;
    # The shell's codes, and apptainer's, for a program that cannot be started.
    126 | 127 | 255)
        what="cannot be started"
        remedy=$(interpreter_remedy)
        ;;
    *)
        what="cannot import what \`coda $1\` needs"
        remedy="\`make setup\` on the login node makes an environment, "
        remedy+="and $site may load a module or name a container: docs/install.md"
        ;;
    esac
    what="${container[*]:+${container[*]} }$python $what: $(tail -n 1 "$log")"
    echo "coda: $what (all of it: $log); $remedy" >>"$log"
    return 2
}

interpreter_remedy() {
    echo "name the interpreter by CODA_PYTHON=/path/to/python, or by python= in $site;" \
        "\`make setup\` makes .venv/bin/python"
}

# Run `coda ARGUMENTS` as one process per task; each writes its own log. Returns srun's code, or 2
# if the environment cannot import what it needs.
launch() { # ARGUMENTS ...
    # Once a job: a later attempt need not wait for it, and an import that fails in a process is a
    # mistake, too.
    [ "$attempt" != 0 ] || import_once "$1" || return
    # Python takes seconds to come to the signal handlers of a training run, and would die of a
    # signal before: both are held back until then.
    local hold='import os, signal, sys
if sys.argv[1] == "train":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])'
    # srun does not inherit --cpus-per-task everywhere. --kill-on-bad-exit ends the other processes
    # when one fails.
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

# The combination number INDEX, from 0, as `key=value key=value`. The last axis changes fastest.
combination() { # INDEX AXIS ...
    local index=$1 position values chosen=()
    for ((position = $#; position > 1; position--)); do
        IFS=, read -ra values <<<"${!position#*=}"
        chosen=("${!position%%=*}=${values[index % ${#values[@]}]}" "${chosen[@]}")
        index=$((index / ${#values[@]}))
    done
    echo "${chosen[*]}"
}

# The number of attempts in a row, the last included, that have saved nothing newer. Preempted ones
# do not count. FOLDER holds a folder of each attempt.
fruitless() { # FOLDER
    local best=0 count=0 attempt saved
    for attempt in $(find "$1" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort -n); do
        saved=$(find "$1/$attempt" -name 'events-*' -exec cat {} + |
            awk '$1 == "saved" && $2 > n { n = $2 } END { print n + 0 }')
        if [ "$saved" -gt "$best" ]; then
            best=$saved count=0
        elif [ ! -e "$1/$attempt/preempted" ]; then
            count=$((count + 1))
        fi
    done
    echo "$count"
}

# Whether a process of an attempt has reported an event.
reported() { # FOLDER EVENT
    # With -q grep would end before cat, which pipefail would take for a failure.
    find "$1" -name 'events-*' -exec cat {} + | grep "^$2" >/dev/null
}

# The line in which Slurm or Python says that a node does not have the program or cannot run it, if
# there is one. srun's code does not say so: it is an errno, or 143 where another process was ended
# for it.
unstarted() { # FOLDER
    local missing='(No such file or directory|Permission denied|Exec format error)' said
    said="^slurmstepd.*error: execve\(\): .*$missing\$|: No module named pipeline\$"
    cat "$1"/rank-*.log 2>/dev/null | grep -aE -m 1 "$said"
}

# What to do after an attempt: done, mistake, cancelled, requeue, stuck or enough. srun's code alone
# does not say: it is 143 where Slurm itself has signalled the step, and was seen to be 0 after the
# loss of a slurmstepd. So the processes report events in files (pipeline/slurm.py). STATE is the
# job's, RESTARTS the number so far.
verdict() { # CODE STATE FOLDER RESTARTS
    if reported "$3/$4" finished; then
        echo "done"
    elif reported "$3/$4" mistake || { [ "$1" = 2 ] && ! reported "$3/$4" disk; } ||
        [ "$1" = 126 ] || [ "$1" = 127 ] || [ -n "$(unstarted "$3/$4")" ]; then
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

# Print the first line in which a process names the user's mistake, if there is one.
first_mistake() {
    local line
    line=$(grep -hs -m 1 '^coda: ' "$logs/$attempt"/{import,rank-*}.log | head -n 1)
    if [ -z "$line" ]; then
        line=$(unstarted "$logs/$attempt")
        line=${line:+coda: $line; $(interpreter_remedy)}
    fi
    [ -z "$line" ] || echo "$line"
}

# End a job that is not started again.
finish_job() { # CODE
    echo "$(date '+%F %T') ended with code $1"
    [ "$1" = 0 ] || first_mistake
    exit "$1"
}

# End the job with CODE, or have Slurm start it again. After scancel Slurm has killed this shell:
# nothing is requeued then.
end_job() { # CODE
    local code=$1 number=$SLURM_JOB_ID job state what
    # One element of an array has the number of the whole array.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        number=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    job=$(scontrol show job "$number")
    # An attempt that was preempted does not count as fruitless. It is requeued here: Slurm does not
    # requeue a job that ends early when it is asked to go.
    if [[ $job =~ PreemptTime=[0-9] ]]; then
        touch "$logs/$attempt/preempted"
    fi
    state=$(sed -n 's/.*JobState=\([A-Z]*\).*/\1/p' <<<"$job")
    what=$(verdict "$code" "$state" "$logs" "$attempt")
    echo "$(date '+%F %T') attempt $attempt ended with code $code: $what"
    case $what in
    "done") exit 0 ;;
    mistake) first_mistake ;;
    stuck)
        echo "3 attempts have saved nothing new: see $logs and first_error.txt" \
            "in the run's folder; then submit again"
        ;;
    enough)
        echo "started again ${CODA_MAX_RESTARTS:-100} times (CODA_MAX_RESTARTS):" \
            "submit again to go on"
        ;;
    requeue)
        scontrol requeue "$number"
        # Slurm ends this shell before the time is over.
        sleep 300
        ;;
    esac
    exit "$((code == 0 ? 1 : code))"
}
