#!/usr/bin/env bash
# @title@. Made by:
#   @command@
# Submit it from the folder that the config's paths start from. docs/slurm.md says what it does.
@directives@
# Ranks get ten minutes to save before the time limit, where SLURM gives 30 s (KillWait). B: to this
# script alone, which passes the signal on and knows then why they end.
#SBATCH --signal=B:USR1@600
# A lost node takes its step down, not the job: what is left of the allocation goes on.
#SBATCH --no-kill
#SBATCH --requeue
set -uo pipefail

# In a container: MEGALLAMA="apptainer exec --nv megallama.sif megallama"
read -ra megallama <<<"${MEGALLAMA:-megallama}"
config=(@config@)
work=@directory@/slurm
command -v "${megallama[0]}" >/dev/null ||
    { echo "job: ${megallama[0]} not found; activate its environment or set MEGALLAMA" >&2; exit 78; }

export PYTHONUNBUFFERED=1 # the last words of a killed rank reach its log
# A thread a core in each rank would be too many; and equal bits need equal numbers of threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The largest models leave no room for gaps between blocks.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Names the link or the peer that failed. INFO is a hundred lines a rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# 4 us * 2^22 = 17 s a try (default 20: 4 s): a link that flaps costs a pause, not the job.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

asked= step=
# srun hands USR1 to every rank; they save and end with 75. Its own TERM would kill them.
trap 'asked=USR1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
# scancel, a preemption, the time limit: SLURM has told the ranks, and decides about the job.
trap 'asked=TERM' TERM

run() { # a command, to its end: a signal ends a `wait` early
    "$@" & step=$!
    [ "$asked" != USR1 ] || kill -USR1 "$step" # it came just before
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    local code=$?
    step=
    return $code
}
allocated() { # without SLURM's controller: what it said at the start
    local nodes
    nodes=$(squeue -h -j "$SLURM_JOB_ID" -o %N 2>/dev/null)
    scontrol show hostnames "${nodes:-$SLURM_JOB_NODELIST}" | paste -sd,
}
try() { # a command that needs SLURM's controller, which may be away for minutes
    local count
    for ((count = 1; ; count++)); do
        "$@" && return
        ((count < 16)) || return 1
        sleep 20
    done
}
decide() { # megallama launch choose|after …: one line, the action
    "${megallama[@]}" launch "$1" "$attempt" --nodes @nodes@ --allocated "$(allocated)" \
        --asked "$asked" --state "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" "${@:2}"
}
steps() { squeue -h -s -j "$SLURM_JOB_ID" -o %i | grep '\.[0-9]*$'; }
address() { scontrol show node "$1" -o | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'; }
# Each task runs in a shell that outlives it, to write how it ended. SLURM signals both.
task='trap : USR1 TERM INT
[ "$SLURM_LOCALID" != 0 ] || echo "$SLURMD_NODENAME" >"$ATTEMPT/started/$SLURM_NODEID"
"$@"
code=$?
[ $code = 0 ] || echo "$code $SLURMD_NODENAME" >"$ATTEMPT/ended/$SLURM_PROCID"
exit $code'

for ((number = 1; ; number++)); do
    export ATTEMPT=$work/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$number
    attempt=$ATTEMPT
    mkdir -p "$attempt"/{started,ended,health} || exit 78
    ask=$("${megallama[@]}" launch usable "$attempt" --allocated "$(allocated)") || exit
    count=$(tr , '\n' <<<"$ask" | wc -l)
    # Every node says how it is, and how its network is; the first healthy ones train.
    MASTER_ADDR=$(address "${ask%%,*}")
    export MASTER_ADDR # where tasks meet; the port follows from the job and the step
    run srun --overlap --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --nodelist="$ask" \
        --time=9 --wait=240 --kill-on-bad-exit=0 --cpu-bind=none --output="$attempt/health-%N.log" \
        "${megallama[@]}" launch health "$attempt" --gpus @gpus@
    action=$(decide choose)
    if [ "${action%% *}" = train ]; then
        chosen=${action#* }
        MASTER_ADDR=$(address "${chosen%%,*}")
        echo "job: attempt $number on $chosen, logs in $attempt"
        # Not --kill-on-bad-exit: the first rank that ends with 75 would have the others killed. Who
        # is there two minutes after the first one ended hangs. --overlap: SLURM may hold a step that
        # lost a node for running.
        run srun --overlap --nodes=@nodes@ --ntasks=@tasks@ --ntasks-per-node=@tasks_per_node@ \
            --nodelist="$chosen" --distribution=block --no-kill=off --kill-on-bad-exit=0 \
            --wait=120 --cpu-bind=none --output="$attempt/rank-%t.log" \
            bash -c "$task" task "${megallama[@]}" train "${config[@]}"@nproc@
        action=$(decide after --code $? --ranks-per-node @ranks_per_node@)
    fi
    read -r verb detail <<<"$action"
    case $verb in
    relaunch) # once nothing is left of this attempt's tasks: they hold their GPUs' memory
        steps | xargs -r scancel --signal=KILL
        for ((look = 0; look < 30; look++)); do # a step that lost its node may never end
            [ -n "$(steps)" ] || break
            sleep 2
        done
        ;;
    requeue)
        # SLURM ends this script while it is at it. Only a job that waits takes other nodes.
        trap '' TERM
        old=$(try scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')
        try scontrol requeue "$SLURM_JOB_ID" ||
            { echo "job: cannot be requeued; scontrol requeue $SLURM_JOB_ID" >&2; exit 75; }
        [ -z "$detail" ] ||
            try scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${old:+$old,}$detail"
        exit 75
        ;;
    stop) exit "$detail" ;;
    *) exit 1 ;; # no decision: it was killed, or failed and has said why
    esac
done
