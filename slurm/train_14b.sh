#!/usr/bin/env bash
# Full finetune of Wan2.1-T2V-14B: sbatch slurm/train_14b.sh [FLAGS OF train.py]
# What it reads from the environment stands in slurm/common.sh. The GPUs of a node share a video;
# --parallel.ulysses_degree may be 1, 2, 4, 5, 8, 10, 20 or 40 (of 40 heads). Model states are 229 GB over all GPUs.
#SBATCH --job-name=wan-14b
#SBATCH --nodes=2
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
start_from "$init"
world 0 "${hosts[@]}" -- \
    --deepspeed ds_configs/zero3.json --model.variant t2v-14B "${start[@]}" "${data[@]}" --output "$output" \
    --parallel.ulysses_degree 8 --model.recompute full \
    --steps 5000 --micro_batch 1 --accumulation 4 --optim.learning_rate 1e-5 "${extra[@]}"
finish
