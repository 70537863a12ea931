# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that read this file use what the functions fill in
# The shell functions of slurm/*.sh. A job is one or more worlds; a world is one srun with one torchrun per node.
#
# From the environment (sbatch passes yours on; or sbatch --export=ALL,NAME=VALUE):
#   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT ...   Slurm's own; they win over the #SBATCH lines
#   MEGAWAN_DATA        latent store of tools/encode_dataset.py, or "synthetic"
#   MEGAWAN_INIT        weights to start from, or "random"
#   MEGAWAN_OUTPUT      run folder (runs/JOBNAME); submitting a job with the same one resumes it
#   MEGAWAN_EXTRA_ARGS  more flags, quoted as in a shell; words after the script's name are passed on too
#   MEGAWAN_ROOT        the checkout, when the job is not submitted from it
#   MEGAWAN_PYTHON      interpreter (.venv/bin/python of the checkout; python3 in a container)
#   MEGAWAN_CONTAINER   image for pyxis (srun --container-image); MEGAWAN_MOUNTS: more mounts, as SRC:DST,SRC:DST
#   MEGAWAN_RANKS_PER_NODE  (as many as the node's GPUs)
#   MEGAWAN_GRACE       seconds after Slurm's warning in which a run may save before the job is requeued anyway
#   MEGAWAN_HEALTH_CHECK=0  do not look at all ranks and links before the model is built
#   MEGAWAN_PREFLIGHT=0 start without tools/preflight.py; always: also when a job was requeued, which is not looked at
#                       again
#   MEGAWAN_DRY_RUN=1   or --dry-run: print the commands, start nothing

asked() { sed -n "s/^#SBATCH --$1=//p" "$0"; } # what the #SBATCH line of this script says

job="${SLURM_JOB_ID:-0}"
name="${SLURM_JOB_NAME:-$(asked job-name)}"
dry_run="${MEGAWAN_DRY_RUN:-0}"
worlds=()
before=()
health=()
[[ "${MEGAWAN_HEALTH_CHECK:-1}" != 1 ]] || health=(--health_check)
preflight="${MEGAWAN_PREFLIGHT:-1}"
[[ "${SLURM_RESTART_COUNT:-0}" == 0 || "$preflight" == always ]] || preflight=0
deadline=999999999 # of SECONDS; sooner once Slurm warned

fail() { printf '%s: error: %s\n' "$name" "$1" >&2; exit 2; }

# read_arguments "$@": `extra` = MEGAWAN_EXTRA_ARGS and the script's own words; --dry-run is taken out.
read_arguments() {
    local word
    xargs -r printf '%s\0' <<<"${MEGAWAN_EXTRA_ARGS:-}" &>/dev/null || fail "MEGAWAN_EXTRA_ARGS has an unmatched quote"
    mapfile -d '' -t extra < <(xargs -r printf '%s\0' <<<"${MEGAWAN_EXTRA_ARGS:-}")
    for word in "$@"; do
        if [[ "$word" == --dry-run || "$word" == --dry_run ]]; then dry_run=1; else extra+=("$word"); fi
    done
}

# required NAME MEANING: fails where the variable is empty; a dry run goes on with a stand-in and says so.
required() {
    [[ -z "${!1:-}" ]] || return 0
    [[ "$dry_run" == 1 ]] || fail "set $1 to $2"
    printf '%s: note: set %s to %s\n' "$name" "$1" "$2" >&2
    printf -v "$1" '%s' "/path/of/$1"
}

# read_paths: `data` = the flag for MEGAWAN_DATA; `init` and `output` = the paths.
read_paths() {
    required MEGAWAN_DATA 'a latent store (tools/encode_dataset.py), or to synthetic'
    required MEGAWAN_INIT 'the weights to start from, or to random'
    init="$MEGAWAN_INIT"
    output="${MEGAWAN_OUTPUT:-$root/runs/$name}"
    data=()
    [[ "$MEGAWAN_DATA" == synthetic ]] || data=(--data.path "$MEGAWAN_DATA")
}

# start_from PATH: `start` = the flag for these initial weights.
start_from() {
    start=()
    [[ "$init" == random ]] || start=(--model.init_from "$1")
}

# read_hosts: `hosts` = the nodes of the allocation.
read_hosts() {
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    else
        [[ "$dry_run" == 1 ]] || fail "not inside a Slurm job; use sbatch, or --dry-run to see the commands"
        mapfile -t hosts < <(seq -f 'node%g' "$(asked nodes)")
    fi
}

# address NODE: where Slurm itself reaches a node; a node's name need not be a host name.
address() {
    local found=""
    [[ -z "${SLURM_JOB_NODELIST:-}" ]] ||
        found="$(scontrol --oneliner show node "$1" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')"
    printf '%s\n' "${found:-$1}"
}

# in_container PATH...: `container` = srun's flags for pyxis, the paths that exist mounted; `python` = its interpreter.
in_container() {
    local path mounts="$root:$root"
    container=()
    python="${MEGAWAN_PYTHON:-$root/.venv/bin/python}"
    [[ -n "${MEGAWAN_CONTAINER:-}" ]] || return 0
    for path in "$@"; do
        [[ ! -e "$path" ]] || mounts+=",$path:$path"
    done
    container=(--container-image="$MEGAWAN_CONTAINER" --container-workdir="$root")
    container+=(--container-mounts="$mounts${MEGAWAN_MOUNTS:+,$MEGAWAN_MOUNTS}")
    python="${MEGAWAN_PYTHON:-python3}"
}

# start_world COMMAND...: prints the command; starts it in the background unless this is a dry run. Where `before` has
# words, that command goes first, and when it fails it is the last.
start_world() {
    [[ -z "${before[*]}" ]] || { printf '%q ' "${before[@]}" && printf '\n'; }
    printf '%q ' "$@" && printf '\n'
    [[ "$dry_run" != 1 ]] || return 0
    [[ -n "${MEGAWAN_CONTAINER:-}" ]] || command -v "$python" >/dev/null || fail "no $python; run bash launchers/setup.sh"
    # exec: the signals of `warned` are for srun.
    (
        # The working directory is not to stand in PATH.
        [[ "$python" != */* ]] || PATH="$(dirname "$python"):$PATH"
        [[ -z "${before[*]}" ]] || "${before[@]}" || exit "$?"
        exec "$@"
    ) </dev/null &
    worlds+=("$!")
}

# world INDEX HOST... -- FLAG...: starts one training on these nodes.
world() {
    local index="$1" nodes=() list
    shift
    while [[ "$1" != -- ]]; do nodes+=("$1"); shift; done
    shift
    list="$(IFS=, && printf '%s' "${nodes[*]}")"
    # Two ports a job, 20000 to 31999: below those that the kernel hands out, different for jobs that share a node.
    local port=$((20000 + job % 6000 * 2 + index))
    [[ "$dry_run" == 1 ]] || mkdir -p "$output"
    in_container "$output" "$MEGAWAN_DATA" "$init"
    # The warning is for the training processes, which handle it; torchrun itself would die of it.
    local launch=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --nodelist="$list" \
        --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" \
        bash -c 'trap "" USR1; exec "$@"' torchrun \
        "$python" -m torch.distributed.run --nnodes="${#nodes[@]}" \
        --nproc_per_node="${MEGAWAN_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(asked gpus-per-node)}}" \
        --rdzv_backend=c10d --rdzv_endpoint="$(address "${nodes[0]}"):$port")
    [[ "$preflight" == 0 ]] || before=("${launch[@]}" --rdzv_id="$job-$index-preflight" "$root/tools/preflight.py" "$@")
    start_world "${launch[@]}" --rdzv_id="$job-$index" "$root/megawan/train.py" "${health[@]}" "$@"
}

# warned: the trap of USR1, which Slurm sends ahead of the time limit (--signal) or a person with scancel --batch.
warned() {
    printf '%s: warned: saving, then requeueing job %s\n' "$name" "$job"
    deadline=$((SECONDS + ${MEGAWAN_GRACE:-90}))
    kill -USR1 "${worlds[@]}" 2>/dev/null || true
}
trap warned USR1

# nodes_answer: whether every node of the job still starts a task.
nodes_answer() {
    local count="${#hosts[@]}"
    timeout 60 srun --overlap --nodes="$count" --ntasks="$count" --ntasks-per-node=1 true &>/dev/null
}

# finish: waits for the worlds; after a warning, or when a node was lost, requeues the job; exits with the first failure.
finish() {
    local world code status=0
    for world in "${worlds[@]}"; do
        while kill -0 "$world" 2>/dev/null && ((SECONDS < deadline)); do
            sleep 1 &
            wait "$!" || true # a signal interrupts wait, not sleep
        done
        ((SECONDS < deadline)) || break
        code=0
        wait "$world" || code="$?"
        ((status != 0)) || status="$code"
    done
    ((deadline == 999999999)) || exec scontrol requeue "$job"
    # The ranks on the other nodes fail before Slurm itself notices that a node is gone.
    if ((status != 0)) && [[ -n "${hosts[*]:-}" ]] && ! nodes_answer; then
        printf '%s: a node of job %s does not answer any more; requeueing the job\n' "$name" "$job"
        exec scontrol requeue "$job"
    fi
    exit "$status"
}
