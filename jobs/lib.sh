# shellcheck shell=bash
# Functions of the batch scripts in this folder, for SLURM, PBS, LSF and Flux. Scripts source this file.
#
#     launch command ...              run a command on all ranks of the job
#     require_world                   exit with 2 unless the launcher makes one world of all ranks
#     require_time                    exit with 2 if the time limit leaves no time for training
#     stage FILE                      copy a file to every node; the copy's path is in $staged
#     run_to_the_end RUN command ...  launch a command that trains in the folder RUN; requeue the job until it is done
#     train_to_the_end RUN option ... the same for mpitrain train with these options
#     as_folder PATH                  check the path of a folder; in $folder no command takes it for an option
#     split TEXT                      split a text into words as a shell does, into the array $words
#     use_nodes N                     use N of the job's nodes and release the others (SLURM)
#     print_best OUT line ...         print the best of the runs OUT/row-1, OUT/row-2, ..., one for each line
#
# A run is done when rank 0 has written RUN/result.json. The exit code of a launcher is no proof: some return 0 after
# they lost a node. What ends earlier is continued if it can be:
#
#     time limit, preemption   USR1 or TERM reaches the batch script, which asks the ranks to save; then it is requeued
#     lost node, killed rank   the job is requeued if it has saved a checkpoint since it was submitted
#     cancelled                the ranks save; the job is not requeued, and continues when it is submitted again
#     error (exit codes 1, 2)  the job fails
#
# The job fails after RESTARTS restarts (20), or when STALLS starts in a row (3) have saved no new checkpoint.
#
# Environment: LAUNCHER  srun (the default under SLURM) or mpirun (the default for MPICH, unless MPI_TYPE is set)
#              MPI_TYPE  srun --mpi=...; by default pmix for Open MPI and pmi2 for MPICH
#              CONTAINER the command that runs others in a container: "apptainer exec -B /opt/openmpi mpitrain.sif"
#              RESTARTS, STALLS, STAGE_DIR and all of env.sh

# --- signals: a batch script gets them, and bash runs a trap between two commands or during a wait. These come first,
# because SLURM sends USR1 to a job with a short time limit as soon as it has started.

say() {
    echo "${SLURM_JOB_NAME:-job} ${job_id:-}: $*" >&2
}

asked_to_stop='' # USR1 or TERM
child=''
pass_on() {
    [ -n "$asked_to_stop" ] || say "$1: the ranks save and stop"
    asked_to_stop=$1
    [ -z "$child" ] || kill -USR1 "$child" 2> /dev/null || true # the launcher forwards it to all ranks
}
trap 'pass_on USR1' USR1 # ahead of the time limit (--signal=B:USR1@120), and of preemption
trap 'pass_on TERM' TERM # scancel, preemption, and the time limit itself

jobs_folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=jobs/env.sh
source "$jobs_folder/env.sh"

EXIT_USAGE=2
EXIT_STOPPED=3 # of mpitrain: saved and stopped, can be resumed

read -ra container <<< "${CONTAINER:-}"
inside() { # run a command where the ranks run: in the container, if there is one
    ${container[@]+"${container[@]}"} "$@"
}

refuse() {
    say "$*"
    exit "$EXIT_USAGE"
}

as_folder() {
    folder=$1
    [[ $folder != -* ]] || folder=./$folder
    while [[ $folder == ?*/ ]]; do folder=${folder%/}; done
}

# shellcheck disable=SC2034 # the scripts read it
words=()
split() {
    local code='import shlex, sys; print(*map(shlex.quote, shlex.split(sys.argv[1])))' quoted
    quoted=$(inside python -c "$code" "$1" 2> /dev/null) || refuse "these options cannot be split into words: $1"
    eval "words=($quoted)"
}

# --- the batch system: job_id, n_ranks, launcher, restarts, requeue, was_preempted, seconds_left

mpi_of_python() { # print "Open MPI" or "MPICH", without starting it
    inside python -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])' || true
}

use_mpirun() { # it must know the nodes from the batch system: add --hostfile where it does not
    launcher=(mpirun -n "$n_ranks")
    # A job script often runs in containers and on small clusters as root.
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    # MPICH starts its daemons with srun: with another --mpi type they would take themselves for ranks.
    export SLURM_MPI_TYPE=none
}

was_preempted() { false; }
seconds_left() { :; } # print the seconds until the time limit, nothing if there is none
seconds_of() { # print the seconds of [days-][[hours:]minutes:]seconds
    local days=0 clock=$1
    if [[ $1 == *-* ]]; then
        days=${1%%-*} clock=${1#*-}
    fi
    awk -F: -v days="$days" '{ for (i = 1; i <= NF; i++) s = 60 * s + $i; print 86400 * days + s }' <<< "$clock"
}
run=''
restarts_in_folder() { # where the batch system does not count them
    cat "$run/restarts" 2> /dev/null || echo 0
}

if [ -n "${SLURM_JOB_ID:-}" ]; then
    job_id=$SLURM_JOB_ID n_ranks=${SLURM_NTASKS:-1}
    if [ -z "${LAUNCHER:-}${MPI_TYPE:-}" ]; then
        # With UCX, MPICH 5 may send more than SLURM's pmi2 reads: the start then fails or hangs (docs/cluster.md).
        case $(mpi_of_python) in *MPICH*) LAUNCHER=mpirun ;; esac
    fi
    if [ "${LAUNCHER:-srun}" = srun ]; then
        if [ -z "${MPI_TYPE:-}" ]; then
            case $(mpi_of_python) in *MPICH*) MPI_TYPE=pmi2 ;; *) MPI_TYPE=pmix ;; esac
        fi
        # One rank that ends in an error ends all: the others would wait for it until the time limit.
        launcher=(srun "--mpi=$MPI_TYPE" --kill-on-bad-exit=1)
    else
        use_mpirun
    fi
    restarts() { echo "${SLURM_RESTART_COUNT:-0}"; }
    requeue() { scontrol requeue "$job_id"; }
    was_preempted() { scontrol show job -o "$job_id" 2> /dev/null | grep -q ' PreemptTime=[0-9]'; }
    seconds_left() {
        local left
        left=$(squeue -h -j "$job_id" -o %L 2> /dev/null) || return 0
        [[ ! $left =~ ^[0-9:-]+$ ]] || seconds_of "$left" # it may be UNLIMITED or NOT_SET
    }
elif [ -n "${PBS_JOBID:-}" ]; then
    job_id=$PBS_JOBID n_ranks=$(wc -l < "${PBS_NODEFILE:?}")
    use_mpirun
    launcher+=(--hostfile "$PBS_NODEFILE") # MPICH and Open MPI know this option, and not every one was built with PBS
    restarts() { restarts_in_folder; }
    # At most sites users may not rerun a job: submit the script again, with the environment and resources of this one.
    requeue() { qsub -V "${pbs_options[@]}" "$jobs_folder/train.pbs"; }
    pbs_options=()
    pbs_fact() { # print a fact about this job; a long one continues on lines that begin with a tab
        { qstat -f "$job_id" 2> /dev/null || true; } | awk -v name="$1" '
            /^\t/ { if (found) { sub(/^\t/, ""); value = value $0 } next }
            { found = 0 }
            $1 == name { found = 1; sub(/^[^=]*= /, ""); value = $0 }
            END { print value }'
    }
    for pair in -l:Resource_List.select:select= -l:Resource_List.walltime:walltime= -l:Resource_List.place:place= \
        -q:queue: -A:Account_Name: -N:Job_Name:; do
        IFS=: read -r option name prefix <<< "$pair"
        value=$(pbs_fact "$name")
        [ -z "$value" ] || pbs_options+=("$option" "$prefix$value")
    done
    seconds_left() {
        local limit
        limit=$(pbs_fact Resource_List.walltime) || return 0
        [[ $limit =~ ^[0-9:]+$ ]] || return 0
        echo "$(($(seconds_of "$limit") - SECONDS))"
    }
elif [ -n "${LSB_JOBID:-}" ]; then
    job_id=$LSB_JOBID n_ranks=${LSB_DJOB_NUMPROC:-1}
    use_mpirun
    restarts() { restarts_in_folder; }
    requeue() { exit "$EXIT_STOPPED"; } # the script has "#BSUB -Q 3"
elif [ -n "${FLUX_JOB_ID:-}${FLUX_ENCLOSING_ID:-}" ]; then
    job_id=${FLUX_ENCLOSING_ID:-$FLUX_JOB_ID} n_ranks=${N_RANKS:-$(flux resource list -n -o '{ncores}')}
    launcher=(flux run -n "$n_ranks" -o mpi=none)
    restarts() { restarts_in_folder; }
    requeue() { flux --parent batch "${RESUBMIT[@]:-jobs/train.flux}"; }
else
    echo "this is a batch script: submit it with sbatch, qsub, bsub or flux batch (see jobs/README.md)" >&2
    exit 2
fi

launcher+=(${container[@]+"${container[@]}"})

# --- the time limit

usr1_before_the_limit() { # for batch systems that send no signal ahead of the time limit
    local left
    left=$(seconds_left)
    if [ -n "$left" ]; then
        # With its output closed: the batch system waits for whoever has it open.
        (sleep $((left - ${SIGNAL_SECONDS:-120})) && kill -USR1 $$) > /dev/null 2>&1 &
        timer=$!
        trap 'kill "$timer" 2> /dev/null || true' EXIT
    fi
}

launch() {
    "${launcher[@]}" "$@"
}

wait_for_child() { # return its exit code; a signal interrupts a wait
    local status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2> /dev/null; do
        status=0
        wait "$child" || status=$?
    done
    return "$status"
}

# --- checks before anything is computed

require_world() {
    # With a wrong --mpi, or the mpirun of another MPI, every task becomes a world of size 1, without an error.
    local check='import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.size != int(sys.argv[1]))'
    if ! launch python -c "$check" "$n_ranks"; then
        [ -z "$asked_to_stop" ] || return 0
        if [ "${launcher[0]}" = srun ]; then
            say "srun --mpi=$MPI_TYPE does not make one world of $n_ranks ranks: set MPI_TYPE (srun --mpi=list shows them)"
        else
            say "${launcher[0]} does not make one world of $n_ranks ranks: it must belong to the MPI of Python's mpi4py"
        fi
        exit 1
    fi
}

require_time() {
    local left needed=$((${SIGNAL_SECONDS:-120} + ${START_SECONDS:-60}))
    left=$(seconds_left)
    if [ -n "$left" ] && [ "$left" -lt "$needed" ]; then
        refuse "the time limit leaves $left s, but USR1 comes ${SIGNAL_SECONDS:-120} s before it and starting takes up to" \
            "${START_SECONDS:-60} s: set --time to $((needed / 60 + 1)) minutes or more, or change --signal and SIGNAL_SECONDS"
    fi
}

stage() {
    staged=$STAGE_DIR/$(basename -- "$1")
    # One task of each node copies. Another job of the same user may copy the same file at this moment.
    # shellcheck disable=SC2016
    launch bash -c '
        [ "${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-0}}}" = 0 ] || exit 0
        mkdir -p -- "$3"
        if [ "$1" -nt "$2" ] || [ ! -e "$2" ]; then cp -- "$1" "$2.$$" && mv -- "$2.$$" "$2"; fi
    ' stage "$1" "$staged" "$STAGE_DIR" || refuse "STAGE=$1 cannot be copied to $STAGE_DIR on every node"
}

# --- a run and its restarts

newest_checkpoint() { # print its time and name, if there is one
    [ ! -e "$run/checkpoints" ] ||
        find "$run/checkpoints" -mindepth 1 -maxdepth 1 ! -name '.*' -printf '%T@ %f\n' | sort -n | tail -n 1
}

is_in_use() { # whether another job has held the lock of the run in the last two minutes; mpitrain says so, and ends
    [ -n "$(find "$run/lock" -mmin -2 2> /dev/null)" ] && ! grep -qF "\"job\": \"$job_id\"" "$run/lock"
}

keep_unsaved_run() { # a run that ended before its first checkpoint starts again; its folder is kept
    if [ -e "$run/config.json" ] && ! is_in_use; then
        mv -- "$run" "$run.without-checkpoint-$job_id-$(restarts)"
    fi
}

run_to_the_end() {
    as_folder "$1"
    run=$folder
    shift
    local before status=0 stalls
    if [ -e "$run/result.json" ]; then
        echo "$run has finished already: see $run/result.json"
        exit 0
    fi
    before=$(newest_checkpoint)
    stalls=$(cat "$run/stalls" 2> /dev/null || echo 0)
    if [ -n "$asked_to_stop" ]; then
        status=$EXIT_STOPPED
    else
        [ -n "$before" ] || keep_unsaved_run
        "${launcher[@]}" "$@" & # in the background, so that the trap runs; no function: $! is the launcher itself
        child=$!
        [ -z "$asked_to_stop" ] || kill -USR1 "$child" # it came since the test above
        wait_for_child || status=$?
        child=''
    fi
    if [ -e "$run/result.json" ]; then
        rm -f -- "$run/stalls" "$run/restarts"
        echo "finished: $run"
        exit 0
    fi
    stalls=$((stalls + 1))
    [ "$(newest_checkpoint)" = "$before" ] || stalls=0
    go_on_or_fail "$status" "$stalls"
}

train_to_the_end() {
    as_folder "$1"
    run=$folder
    shift
    if [ -n "${STAGE:-}" ]; then # --data names a file that every node gets a copy of
        local word options=() named=''
        stage "$STAGE"
        for word in "$@"; do
            case $word in
                "$STAGE") word=$staged named=1 ;;
                "--data=$STAGE") word=--data=$staged named=1 ;;
            esac
            options+=("$word")
        done
        [ -n "$named" ] || refuse "STAGE=$STAGE is not the file of --data: the copy would not be read"
        set -- "${options[@]}"
    fi
    local place=(--out "$run")
    [ -z "$(newest_checkpoint)" ] || place=(--resume "$run")
    run_to_the_end "$run" mpitrain train "${place[@]}" "$@"
}

go_on_or_fail() { # arguments: exit code, restarts in a row without a new checkpoint
    local status=$1 stalls=$2 failure
    failure=$((status == 0 ? 1 : status))
    if [ "$asked_to_stop" = TERM ] && ! was_preempted; then
        say "cancelled; submit the job again with RUN=$run to continue from the last checkpoint"
    elif [ "$status" -eq 1 ] || [ "$status" -eq 2 ]; then
        say "$run did not finish (the launcher returned $status)"
    elif [ -z "$asked_to_stop" ] && [ "$status" -ne "$EXIT_STOPPED" ] && [ "$stalls" -gt 0 ] && [ "$(restarts)" -eq 0 ]; then
        say "$run did not finish (the launcher returned $status), and has saved nothing new since the job started"
    elif [ "$stalls" -ge "${STALLS:-3}" ]; then
        say "$run was restarted $stalls times in a row without a new checkpoint: raise the time limit, or save more often"
    elif [ "$(restarts)" -ge "${RESTARTS:-20}" ]; then
        say "$run did not finish after $(restarts) restarts: submit the job again with RUN=$run, or raise RESTARTS"
    else
        mkdir -p -- "$run"
        echo "$stalls" > "$run/stalls"
        echo "$(($(restarts) + 1))" > "$run/restarts"
        if requeue; then
            exit 0
        fi
        [ "$asked_to_stop" != TERM ] || exit "$failure" # SLURM is requeueing it already
        say "the job cannot be requeued: submit it again with RUN=$run"
    fi
    rm -f -- "$run/stalls" "$run/restarts" # a job that a person submits is counted anew
    exit "$failure"
}

# --- arrays

use_nodes() {
    local n_nodes=$1 script
    if [ "$n_nodes" -lt 1 ] || [ "$n_nodes" -gt "$SLURM_JOB_NUM_NODES" ]; then
        refuse "task $n_nodes needs $n_nodes nodes, and the job has $SLURM_JOB_NUM_NODES: submit with --array=1,2,... up to --nodes"
    fi
    n_ranks=$((n_ranks * n_nodes / SLURM_JOB_NUM_NODES)) # as many on every node
    [ "$n_nodes" -lt "$SLURM_JOB_NUM_NODES" ] || return 0
    # A site may forbid the release; the job then keeps idle nodes.
    script=slurm_job_${job_id}_resize.sh
    if scontrol update "JobId=$job_id" "NumNodes=$n_nodes" > /dev/null 2>&1 && [ -e "$script" ]; then
        # shellcheck disable=SC1090
        source "$script"
    fi
    rm -f -- "slurm_job_${job_id}_resize".{sh,csh}
    if [ "${launcher[0]}" = srun ]; then
        launcher=(srun "--nodes=$n_nodes" "--ntasks=$n_ranks" "${launcher[@]:1}")
    fi
}

print_best() {
    inside python - "$@" << 'PYTHON'
import json, pathlib, sys

out, *lines = sys.argv[1:]
rows = []
for k, line in enumerate(lines, 1):
    file = pathlib.Path(out, f"row-{k}", "result.json")
    if file.exists():
        result = json.loads(file.read_text())
        rows.append((result["test_accuracy"], -result["test_loss"], k, line))
if rows:
    accuracy, loss, k, line = max(rows)
    print(f"best of {len(rows)} of {len(lines)} rows: row {k}, test accuracy {accuracy:.2%}, test loss {-loss:.4g}: {line}")
PYTHON
}
