# shellcheck shell=bash
# Sourced by the job scripts beside it; all that they share. `sbatch slurm/train_xl.sh` from the
# repository's folder needs nothing more than an account and a partition, where the cluster asks for
# them (sbatch --account=A --partition=P, or SBATCH_ACCOUNT and SBATCH_PARTITION). The rest:
#
#   DIFFMOE_DATA       folder of shards: becomes data.path
#   DIFFMOE_RUN        folder of the run: becomes output; default runs/RECIPE
#   DIFFMOE_RECIPE     a recipe's name or a YAML file instead of the script's own
#   DIFFMOE_VENV       virtual environment, or prefix of a Python; default .venv where there is one
#   DIFFMOE_CONTAINER  command before python, such as "apptainer exec --nv diffmoe.sif"
#   DIFFMOE_HOME       the repository, where it is not the folder that sbatch was called in
#   DIFFMOE_INTERFACE  network interface of NCCL and gloo, such as ib0; default their own choice
#   DIFFMOE_MASTER     address of rank 0; default the first node's name
#   DIFFMOE_PORT       rank 0's port; default from the job's number
#   DIFFMOE_CHAIN      set by tools/submit.py --chain: the chain's name; jobs do not requeue, and
#   DIFFMOE_LINK       NUMBER/ALL, this job's: stopped, it ends well, since the next one goes on; the
#                      last one fails if the run is not done
#
# Arguments of the script go to train.py: sbatch slurm/train_xl.sh training.precision=bf16
# With sbatch --export=NONE, or chosen variables, these too must be chosen; tools/submit.py writes
# them into the script.
#
# Launch: one task per GPU by srun, each becomes the rank of its number. torchrun, one a node, would
# be a second supervisor: it keeps USR1 to itself and turns every exit code into 1, and train.py's
# 85 (saved, asked to stop) is what tells a preemption from a failure.
#
# Ends: 0 finished. USR1 (Slurm sends it before the time limit and before preemption) makes the run
# save, and the job requeues itself. A lost node makes Slurm requeue it. scancel makes the run save
# (within the cluster's KillWait) and ends it. Any other failure ends the job with the traceback in
# its log. Three starts of a job in a row without a new checkpoint end it too, whatever ended them:
# RUN/slurm-starts counts each before anything else is done, and says how the last one ended.

DIFFMOE_STARTS=3           # without a new checkpoint
SAVED=85                   # train.py's exit code
SIGNALLED=$((128 + 10))    # what dies of USR1: not listening for it, or not yet

asked=0
trap 'asked=1' USR1 # it may come before there are ranks to hand it to
cd "${DIFFMOE_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2

# diffmoe_port JOB [LOW HIGH]: a port outside LOW..HIGH, from which the kernel takes ports of its
# own for outgoing connections (default: /proc/sys/net/ipv4/ip_local_port_range). Jobs whose numbers
# differ by less than the count of free ports (22,768 with Linux's 32768..60999) get different ones.
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

# Enters the environment, and exports how the ranks find each other.
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

# diffmoe_ranks LOGS PYTHON_ARGUMENTS...: the same on every task, each rank's output in a file of
# LOGS, rank 0's also here. USR1 is handed on. Returns the ranks' highest exit code; sets `asked`.
diffmoe_ranks() {
    local logs=$1 step follower code
    shift
    ((asked)) && return "$SIGNALLED"
    : >"$logs/rank-0000.log"
    tail -n +1 -F "$logs/rank-0000.log" 2>/dev/null &
    follower=$!
    # Slurm signals the tasks itself when a job is canceled; this shell stays to tell the end.
    trap : TERM
    # Variables of a task's own are expanded by the task. The first rank to fail tells why, and the
    # others end by themselves: --wait is for those that cannot. --export: what was exported here
    # reaches the tasks whatever sbatch was told to export.
    # shellcheck disable=SC2016,SC2086
    srun --mpi=none --export=ALL --kill-on-bad-exit=0 --wait=120 --open-mode=append \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        --output="${logs//%/%%}/rank-%4t.log" bash -c '
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1} GROUP_RANK=$SLURM_NODEID
            exec "$@"' rank ${DIFFMOE_CONTAINER:-} python "$@" &
    step=$!
    trap 'asked=1; kill -USR1 "$step"' USR1
    ((asked)) && kill -USR1 "$step" # it came while srun was started
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
        wait "$step"
        code=$?
    done
    trap '' USR1
    sleep 1 # for the follower to catch up
    kill "$follower"
    wait "$follower" 2>/dev/null
    return "$code"
}

# diffmoe_tracebacks LOGS: of the ranks that told a failure, but rank 0, which was followed.
diffmoe_tracebacks() {
    local log
    grep -lE '^(error:|\[rank [0-9]+\]|Traceback)' "$1"/rank-*.log |
        grep -v 'rank-0000.log$' | head -n 3 | while read -r log; do
        echo "--- end of $log"
        tail -n 40 "$log"
    done
}

# diffmoe_count_start FOLDER PROGRESS: fails if the last DIFFMOE_STARTS starts of this job all found
# the same progress, and says how the last one ended.
diffmoe_count_start() {
    local record=$1/slurm-starts now="${DIFFMOE_CHAIN:-$SLURM_JOB_ID} $2"
    local job='' progress='' starts=0 ended=''
    [ -e "$record" ] && { read -r job progress starts && read -r ended; } <"$record"
    if [ "$job $progress" != "$now" ]; then starts=0; fi
    if ((starts >= DIFFMOE_STARTS)); then
        echo "error: $DIFFMOE_STARTS starts of this job in a row came no further than '$2'." \
            "The last one ${ended:-was ended from outside (a lost node, KILL, out of memory)}." \
            "See $1/logs, then submit it again" >&2
        return 1
    fi
    echo "$now $((starts + 1))" >"$record"
}

# diffmoe_ended FOLDER HOW: what diffmoe_count_start is to tell of this start.
diffmoe_ended() {
    echo "$2" >>"$1/slurm-starts"
}

# diffmoe_reached RUN: samples so far and in all, of the newest checkpoint.
diffmoe_reached() {
    local checkpoint=start samples total
    [ -e "$1/latest" ] && checkpoint=$(<"$1/latest")
    samples=$(sed -n 's/.*"samples": *\([0-9]*\).*/\1/p;T;q' "$1/$checkpoint/run.json" 2>/dev/null)
    total=$(sed -n 's/^ *total_samples: *//p' "$1/config.yaml" 2>/dev/null)
    echo "${samples:-0} of ${total:-all} samples"
}

# diffmoe_job FOLDER PROGRESS PYTHON_ARGUMENTS...: the whole job; does not return.
# FOLDER: for its logs. PROGRESS: a word that changes when the work gets on.
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
            echo "stopped in time, and saved"
        else
            diffmoe_ended "$folder" "was asked to stop (USR1: time limit or preemption) after \
${SECONDS} s, too early to save anything; give it more time (sbatch --time)"
            echo "warning: stopped after $SECONDS s, too early to save anything"
        fi
        if [ -n "${DIFFMOE_CHAIN:-}" ] && [ "${link%/*}" != "${link#*/}" ]; then
            echo "job $link of the chain ends; the next one goes on"
            exit 0
        elif [ -n "${DIFFMOE_CHAIN:-}" ]; then
            echo "error: the chain's last job ends, and the run is not done:" \
                "$(diffmoe_reached "$folder"); submit the same again, it goes on" >&2
            exit "$SAVED"
        fi
        echo "requeueing job $SLURM_JOB_ID"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # until Slurm ends this shell
            exit "$SAVED"
        fi
        echo "error: this cluster does not requeue; submit the same again, it goes on" >&2
    elif ((code == SAVED)); then
        echo "saved; submit the same again and it goes on"
    elif ((code)); then
        diffmoe_ended "$folder" "failed with code $code"
        diffmoe_tracebacks "$logs" >&2
        echo "error: failed with code $code; every rank's log is in $logs" >&2
    fi
    exit "$code"
}

# diffmoe_train RECIPE [train.py's arguments]
diffmoe_train() {
    local recipe=${DIFFMOE_RECIPE:-$1} run latest=start argument
    shift
    run=$(basename "$recipe")
    run=${DIFFMOE_RUN:-runs/${run%.y*ml}}
    for argument; do
        if [[ $argument == output=* ]]; then
            echo "error: $argument: give the run's folder as DIFFMOE_RUN=${argument#output=}" >&2
            exit 2
        fi
    done
    [ -e "$run/latest" ] && latest=$(<"$run/latest")
    diffmoe_job "$run" "$latest" train.py --config "$recipe" --resume auto \
        ${DIFFMOE_DATA:+"data.path=$DIFFMOE_DATA"} "output=$run" "$@"
}

# diffmoe_tool OUT tools/NAME.py ARGUMENTS...: one that goes on by itself. OUT: the folder it fills.
diffmoe_tool() {
    local out=${1%/} files
    shift
    files=$(find "$out" -type f ! -name '*.tmp' 2>/dev/null | wc -l) # those are what kills left
    diffmoe_job "$out-job" "$files-files" "$@"
}
