#!/usr/bin/env bash
# What the jobs of this folder share; each sources it with its clone in $root.

say() { printf '%(%T)T %s: %s\n' -1 "${SLURM_JOB_NAME:-slurm/pipeline.sh}" "$*" >&2; }
fail() {
    say "$*"
    exit 2
}

: "${root:?}"
# shellcheck source=slurm/site.sh
source "$root/slurm/site.sh"
if [ -n "$MNIST_PROFILE" ]; then
    [ -r "$MNIST_PROFILE" ] || fail "MNIST_PROFILE: no file $MNIST_PROFILE that can be read"
    set +u # such files seldom pass
    # shellcheck disable=SC1090
    source "$MNIST_PROFILE"
    set -u
fi
[[ $root != *:* ]] ||
    fail "Python finds nothing below $root, for its colon: give a link without one as MNIST_ROOT"
export MNIST_DATA_DIR PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Torch warns where an address has no name.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
if [ -z "$MNIST_PYTHON" ]; then
    python=("$root/.venv/bin/python")
elif [ -f "$MNIST_PYTHON" ]; then # one word, whatever is in it
    python=("$MNIST_PYTHON")
else # xargs knows a shell's quotes, and expands nothing
    words=$(xargs -r printf '%s\n' <<<"$MNIST_PYTHON" 2>&1) || fail "MNIST_PYTHON: $words"
    mapfile -t python <<<"$words"
fi
command -v "${python[0]}" >/dev/null ||
    fail "no command ${python[0]}: run scripts/setup in the clone, or name a Python in MNIST_PYTHON, \
words with spaces in quotes"

# A task of an array may be started again under another $SLURM_JOB_ID.
job_id=${SLURM_JOB_ID:-} # none in pipeline.sh
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Nothing waits in a trap, and $(…) in one would crash this shell. Told SIGTERM, srun kills; told
# SIGUSR1, it passes that on to all processes of the step.
asked='' step=''
stop_step() {
    asked=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

# Not one that the kernel hands out by itself, and another for every job, as all look at the same
# moment; should it be taken all the same, the job fails, and is started again.
choose_port() {
    port=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
    while (: <>"/dev/tcp/$1/$port") 2>/dev/null; do port=$((port + 1)); done
}

# Runs jobs/$1 with the other options, by one launcher per node of the allocation.
#
# Returns the job's own code: 0 done, 2 bad input, 75 interrupted and saved, 1 a failure. Does not
# return where SLURM is to start the whole batch job again: after 75, and after a failure, unless
# there were $MNIST_FAILURES in a row.
run_job() {
    local job=$1 state=$MNIST_RUNS_DIR/.slurm/$job_id processes node_processes threads code port
    local node=${SLURMD_NODENAME:-$(hostname)}
    shift
    node_processes=$((${SLURM_GPUS_ON_NODE:-0} > 0 ? SLURM_GPUS_ON_NODE : 1))
    processes=$((SLURM_NNODES * node_processes))
    threads=$((SLURM_CPUS_ON_NODE > node_processes ? SLURM_CPUS_ON_NODE / node_processes : 1))
    mkdir -p -- "$MNIST_RUNS_DIR/.slurm"
    : >"$state.code"
    export MNIST_EXIT_CODE_FILE=$state.code
    say "$processes process(es) on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"

    trap stop_step USR1 TERM
    choose_port "$node"
    # --wait, not --kill-on-bad-exit: with that, a job that had lost a node was killed once more after
    # its requeue. The processes of a job end by themselves when one of them is gone.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none \
        --mpi=none --export=ALL --input=none --unbuffered --quiet --wait=90 \
        "${python[@]}" -P -m mnist.launch "$root/jobs/$job" --processes "$processes" \
        --rendezvous "$node:$port" --threads "$threads" "$@" &
    step=$!
    [ -z "$asked" ] || stop_step
    code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a trap has ended the wait, not the step
        code=0
        wait "$step" || code=$?
    done
    step=''
    [ ! -s "$state.code" ] || code=$(<"$state.code")

    local how='interrupted and saved'
    case $asked$code in
        # Of the signal itself, while the processes still waited for one another.
        yes138 | yes143) code=75 how='interrupted with nothing to save' ;;
    esac
    case $code in
        0 | 2)
            rm -f "$state.failures"
            ;;
        75)
            rm -f "$state.failures"
            start_again 75 "$how"
            ;;
        *)
            echo "$code" >>"$state.failures"
            if [ "$(wc -l <"$state.failures")" -lt "$MNIST_FAILURES" ]; then
                start_again "$code" "failed with code $code"
            else
                say "failed $MNIST_FAILURES times in a row: given up"
                rm -f "$state.failures"
            fi
            ;;
    esac
    # The count of failures stays where SLURM ended this script in the middle of requeuing it.
    rm -f "$state.code"
    return "$code"
}

# Unless the job is ending anyway: cancelled by its user, or requeued already.
start_again() {
    if [ "$(squeue -h -j "$job_id" -o %T)" = RUNNING ]; then
        say "$2: requeued"
        scontrol requeue "$job_id" && exit "$1" # if SLURM has not ended it before
    fi
    say "$2: not requeued from here"
}
