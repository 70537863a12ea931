#!/usr/bin/env bash
# Full finetune of both experts of Wan2.2-A14B in one job: sbatch slurm/train_a14b.sh [FLAGS OF train.py]
# The nodes are divided between two independent trainings, each with its own window of noise levels. What it reads from
# the environment stands in slurm/common.sh, and:
#   MEGAWAN_TASK=t2v|i2v       which A14B (t2v); its experts change over at sigma 0.875 (t2v) or 0.900 (i2v);
#                              debug, debug-i2v: a tiny one, to try the script (with --parallel.ulysses_degree 1)
#   MEGAWAN_HIGH_NODES=N       nodes of the high-noise expert (half: a step costs both experts the same)
#   MEGAWAN_INIT=DIR           holds high_noise_model/ and low_noise_model/, as the released weights do
# Output: MEGAWAN_OUTPUT/high and MEGAWAN_OUTPUT/low, which one command makes one model (--layout diffusers or native):
#   python tools/export_checkpoint.py --input MEGAWAN_OUTPUT --output DIR --layout diffusers
#SBATCH --job-name=wan-a14b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x_%j.out
set -euo pipefail

# sbatch runs a copy of this file elsewhere: the checkout is where the job was submitted, or MEGAWAN_ROOT.
root="${MEGAWAN_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
if [[ ! -f "$root/slurm/common.sh" ]]; then
    printf "slurm: error: %s is not the MegaWan checkout; submit from it or set MEGAWAN_ROOT\n" "$root" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
. "$root/slurm/common.sh"

export MEGAWAN_GRACE="${MEGAWAN_GRACE:-270}"
read_arguments "$@"
read_paths
read_hosts
task="${MEGAWAN_TASK:-t2v}"
[[ "$task" =~ ^(debug|t2v|i2v|debug-i2v)$ ]] || fail "MEGAWAN_TASK=$task is unknown; legal: t2v, i2v, debug, debug-i2v"
high="${MEGAWAN_HIGH_NODES:-$((${#hosts[@]} / 2))}"
if [[ ! "$high" =~ ^[1-9][0-9]*$ ]] || ((high >= ${#hosts[@]})); then
    fail "$high of ${#hosts[@]} nodes for the high-noise expert; each expert needs one or more (MEGAWAN_HIGH_NODES)"
fi

expert() { # NAME INDEX HOST...
    local expert="$1" index="$2"
    shift 2
    start_from "$init/${expert}_noise_model"
    # The variant says which noise levels; the flag keeps them under another --model.variant.
    local window=(--flow.expert "$task-A14B-$expert")
    [[ "$task" != debug* ]] || window=()
    world "$index" "$@" -- \
        --deepspeed ds_configs/zero3.json --model.variant "$task-A14B-$expert" "${window[@]}" \
        "${start[@]}" "${data[@]}" --output "$output/$expert" \
        --parallel.ulysses_degree 8 --model.recompute full \
        --steps 5000 --micro_batch 1 --accumulation 4 --optim.learning_rate 1e-5 "${extra[@]}"
}
expert high 0 "${hosts[@]:0:high}"
expert low 1 "${hosts[@]:high}"
finish
