# shellcheck shell=bash
# Shared by the job scripts in this folder, which source it. `sbatch slurm/train_xl.sh` from the
# repository's folder needs only an account and a partition, if the cluster requires them (sbatch
# --account=A --partition=P, or SBATCH_ACCOUNT and SBATCH_PARTITION). Optional variables:
#
#   DIFFMOE_DATA       folder of shards; sets data.path
#   DIFFMOE_RUN        folder of the run; sets output; default runs/RECIPE
#   DIFFMOE_RECIPE     recipe name or YAML file; default the script's own recipe
#   DIFFMOE_VENV       virtual environment, or prefix of a Python; default .venv if it exists
#   DIFFMOE_CONTAINER  command before python, such as "apptainer exec --nv diffmoe.sif"
#   DIFFMOE_HOME       the repository; default the folder that sbatch was called in
#   DIFFMOE_INTERFACE  network interface for NCCL and gloo, such as ib0; default their own choice
#   DIFFMOE_MASTER     address of rank 0; default the first node's name
#   DIFFMOE_PORT       port of rank 0; default derived from the job's number
#   DIFFMOE_CHAIN      name of the chain, set by tools/submit.py --chain; its jobs do not requeue
#   DIFFMOE_LINK       this job's place in the chain, NUMBER/COUNT. A job that is stopped early
#                      succeeds, as the next one resumes; the last one fails if work is left
#
# Arguments of the script go to train.py: sbatch slurm/train_xl.sh training.precision=bf16
# With sbatch --export=NONE, or a list of variables, these have to be exported explicitly;
# tools/submit.py writes them into the script instead.
#
# Launch: srun starts one task per GPU, and each is the rank of the same number. torchrun on every
# node would not do: it does not forward USR1 and turns every exit code into 1, but train.py's exit
# code 85 (saved because it was asked to stop) is what tells a preemption from a failure.
#
# How a job ends: 0 finished. On USR1 (sent by Slurm before the time limit and before preemption)
# the run saves and the job requeues itself. If a node is lost, Slurm requeues the job. On scancel
# the run saves (within the cluster's KillWait) and the job ends. On any other failure the job ends
# with the traceback in its log. It also ends after three starts in a row without a new checkpoint,
# whatever stopped them: RUN/slurm-starts counts a start before anything else is done, and records
# how the last one ended.

DIFFMOE_STARTS=3           # allowed without a new checkpoint
SAVED=85                   # exit code of train.py
SIGNALLED=$((128 + 10))    # exit code of a process that USR1 killed: it had no handler (yet)

asked=0
trap 'asked=1' USR1 # may arrive before there are ranks to forward it to
cd "${DIFFMOE_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2

# diffmoe_port JOB [LOW HIGH]: a port outside of LOW..HIGH, the range that the kernel uses for
# outgoing connections (default: /proc/sys/net/ipv4/ip_local_port_range). Jobs whose numbers differ
# by less than the number of remaining ports (22,768 for Linux's 32768..60999) get different ports.
diffmoe_port() {
    local job=$1 low=${2:-} high=${3:-} first=10000 last=65535
    [ -n "$low" ] || read -r low high </proc/sys/net/ipv4/ip_local_port_range
    if ((low - first >= last - high)); then last=$((low - 1)); else first=$((high + 1)); fi
    ((first < 1024)) && first=1024
    if ((last - first < 999)); then
        echo "error: ip_local_port_range=$low $high leaves fewer than 1,000 ports;" \
            "set DIFFMOE_PORT" >&2
        return 2
    fi
    echo $((first + job % (last - first + 1)))
}

# diffmoe_environment: activates the environment and exports the rendezvous address.
diffmoe_environment() {
    local venv=${DIFFMOE_VENV:-}
    [ -z "$venv" ] && [ -e .venv/bin/activate ] && venv=.venv
    if [ -e "$venv/bin/activate" ]; then
        # shellcheck disable=SC1091
        source "$venv/bin/activate" || exit 2
    elif [ -n "$venv" ]; then
        export PATH="$venv/bin:$PATH"
    fi
    MASTER_ADDR=${DIFFMOE_MASTER:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${DIFFMOE_PORT:-$(diffmoe_port "$SLURM_JOB_ID")} || exit 2
    export MASTER_ADDR MASTER_PORT
    if [ -n "${DIFFMOE_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$DIFFMOE_INTERFACE GLOO_SOCKET_IFNAME=$DIFFMOE_INTERFACE
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export PYTHONUNBUFFERED=1
}

# diffmoe_ranks LOGS PYTHON_ARGUMENTS...: runs the same command on every task. Each rank's output
# goes to a file in LOGS, that of rank 0 also to this job's log. Forwards USR1, after which `asked`
# is set. Returns the highest exit code of the ranks.
diffmoe_ranks() {
    local logs=$1 step follower code
    shift
    ((asked)) && return "$SIGNALLED"
    : >"$logs/rank-0000.log"
    tail -n +1 -F "$logs/rank-0000.log" 2>/dev/null &
    follower=$!
    # When a job is canceled, Slurm signals the tasks itself; this shell stays to report the end.
    trap : TERM
    # Per-task variables are expanded in the task. The first rank to fail reports why, and the
    # others exit by themselves; --wait is for those that cannot. --export=ALL: what was exported
    # here reaches the tasks even if sbatch was given another --export.
    # shellcheck disable=SC2016,SC2086
    srun --mpi=none --export=ALL --kill-on-bad-exit=0 --wait=120 --open-mode=append \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        --output="${logs//%/%%}/rank-%4t.log" bash -c '
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1} GROUP_RANK=$SLURM_NODEID
            exec "$@"' rank ${DIFFMOE_CONTAINER:-} python "$@" &
    step=$!
    trap 'asked=1; kill -USR1 "$step"' USR1
    ((asked)) && kill -USR1 "$step" # arrived while srun was being started
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal interrupts `wait`, not the step
        wait "$step"
        code=$?
    done
    trap '' USR1
    sleep 1 # let the follower catch up
    kill "$follower"
    wait "$follower" 2>/dev/null
    return "$code"
}

# diffmoe_tracebacks LOGS: prints the ends of the logs of failed ranks, except rank 0's, which is in
# this job's log already.
diffmoe_tracebacks() {
    local log
    grep -lE '^(error:|\[rank [0-9]+\]|Traceback)' "$1"/rank-*.log |
        grep -v 'rank-0000.log$' | head -n 3 | while read -r log; do
        echo "--- end of $log"
        tail -n 40 "$log"
    done
}

# diffmoe_count_start FOLDER PROGRESS: counts this start. Fails if the last DIFFMOE_STARTS starts of
# this job all began at the same progress, and prints how the last one ended.
diffmoe_count_start() {
    local record=$1/slurm-starts now="${DIFFMOE_CHAIN:-$SLURM_JOB_ID} $2"
    local job='' progress='' starts=0 ended=''
    [ -e "$record" ] && { read -r job progress starts && read -r ended; } <"$record"
    if [ "$job $progress" != "$now" ]; then starts=0; fi
    if ((starts >= DIFFMOE_STARTS)); then
        echo "error: $DIFFMOE_STARTS starts of this job in a row made no progress beyond '$2'." \
            "The last one ${ended:-was killed from outside (lost node, SIGKILL, out of memory)}." \
            "See $1/logs, then submit the job again" >&2
        return 1
    fi
    echo "$now $((starts + 1))" >"$record"
}

# diffmoe_ended FOLDER HOW: records how this start ended, for diffmoe_count_start.
diffmoe_ended() {
    echo "$2" >>"$1/slurm-starts"
}

# diffmoe_reached RUN: prints the samples of the newest checkpoint and of the whole run.
diffmoe_reached() {
    local checkpoint=start samples total
    [ -e "$1/latest" ] && checkpoint=$(<"$1/latest")
    samples=$(sed -n 's/.*"samples": *\([0-9]*\).*/\1/p;T;q' "$1/$checkpoint/run.json" 2>/dev/null)
    total=$(sed -n 's/^ *total_samples: *//p' "$1/config.yaml" 2>/dev/null)
    echo "${samples:-0} of ${total:-all} samples"
}

# diffmoe_job FOLDER PROGRESS PYTHON_ARGUMENTS...: the whole job; does not return.
# FOLDER: for its logs. PROGRESS: a word that changes whenever the job makes progress.
diffmoe_job() {
    local folder=$1 progress=$2 code
    local logs=$folder/logs/job-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} link=${DIFFMOE_LINK:-}
    shift 2
    mkdir -p "$logs" || exit 2
    diffmoe_count_start "$folder" "$progress" || exit 1
    diffmoe_environment
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on" \
        "$SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT, logs in $logs"
    diffmoe_ranks "$logs" "$@"
    code=$?
    if ((asked)) && ((code == SAVED || code == SIGNALLED)); then
        if ((code == SAVED)); then
            echo "stopped early, progress is saved"
        else
            diffmoe_ended "$folder" "was asked to stop (USR1: time limit or preemption) after \
${SECONDS} s, before it could save anything; give it more time (sbatch --time)"
            echo "warning: stopped after $SECONDS s, before anything could be saved"
        fi
        if [ -n "${DIFFMOE_CHAIN:-}" ] && [ "${link%/*}" != "${link#*/}" ]; then
            echo "job $link of the chain ends; the next one resumes"
            exit 0
        elif [ -n "${DIFFMOE_CHAIN:-}" ]; then
            echo "error: the chain's last job ends, and the run is not finished:" \
                "$(diffmoe_reached "$folder"); submit the same command again to resume" >&2
            exit "$SAVED"
        fi
        echo "requeueing job $SLURM_JOB_ID"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # until Slurm ends this shell
            exit "$SAVED"
        fi
        echo "error: this cluster does not requeue; submit the same command again to resume" >&2
    elif ((code == SAVED)); then
        echo "saved; submit the same command again to resume"
    elif ((code)); then
        diffmoe_ended "$folder" "failed with code $code"
        diffmoe_tracebacks "$logs" >&2
        echo "error: failed with code $code; every rank's log is in $logs" >&2
    fi
    exit "$code"
}

# diffmoe_train RECIPE [ARGUMENTS OF train.py]
diffmoe_train() {
    local recipe=${DIFFMOE_RECIPE:-$1} run latest=start argument
    shift
    run=$(basename "$recipe")
    run=${DIFFMOE_RUN:-runs/${run%.y*ml}}
    for argument; do
        if [[ $argument == output=* ]]; then
            echo "error: $argument: set the run's folder by DIFFMOE_RUN=${argument#output=}" >&2
            exit 2
        fi
    done
    [ -e "$run/latest" ] && latest=$(<"$run/latest")
    diffmoe_job "$run" "$latest" train.py --config "$recipe" --resume auto \
        ${DIFFMOE_DATA:+"data.path=$DIFFMOE_DATA"} "output=$run" "$@"
}

# diffmoe_tool OUT tools/NAME.py ARGUMENTS...: runs a tool that resumes by itself. OUT: its output.
diffmoe_tool() {
    local out=${1%/} files
    shift
    files=$(find "$out" -type f ! -name '*.tmp' 2>/dev/null | wc -l) # *.tmp: unfinished
    diffmoe_job "$out-job" "$files-files" "$@"
}
