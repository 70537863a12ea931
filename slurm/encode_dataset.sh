#!/usr/bin/env bash
# Videos to latents on many GPUs: sbatch slurm/encode_dataset.sh [FLAGS OF tools/encode_dataset.py]
# An array of independent one-GPU tasks; task I encodes share I of N, so any of them may fail and be submitted again
# (sbatch --array=3,5 ...): finished samples are not redone. When all have ended, one call of tools/encode_dataset.py
# with the same flags and without --shard writes the index; it encodes and copies nothing. What it reads from the environment stands in
# slurm/common.sh, and:
#   MEGAWAN_VIDEOS      the folder or manifest to encode
#   MEGAWAN_DATA        the latent store to write
#   MEGAWAN_SHARDS=N    number of shares, when it is not that of the #SBATCH --array line
#SBATCH --job-name=wan-encode
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x_%A_%a.out
set -euo pipefail

# sbatch runs a copy of this file elsewhere: the checkout is where the job was submitted, or MEGAWAN_ROOT.
root="${MEGAWAN_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}"
if [[ ! -f "$root/slurm/common.sh" ]]; then
    printf "slurm: error: %s is not the MegaWan checkout; submit from it or set MEGAWAN_ROOT\n" "$root" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
. "$root/slurm/common.sh"

read_arguments "$@"
required MEGAWAN_VIDEOS "the folder or manifest of videos to encode"
required MEGAWAN_DATA "the latent store to write"
last="$(asked array)"
shards="${MEGAWAN_SHARDS:-$((${last#*-} + 1))}"
share="${SLURM_ARRAY_TASK_ID:-0}"
if [[ ! "$shards" =~ ^[1-9][0-9]*$ ]] || ((share >= shards)); then
    fail "array task $share is not one of $shards shares (counted from 0); set MEGAWAN_SHARDS to the number of shares"
fi

in_container "$MEGAWAN_VIDEOS" "$MEGAWAN_DATA"
start_world srun --nodes=1 --ntasks=1 "${container[@]}" \
    "$python" "$root/tools/encode_dataset.py" \
    --input "$MEGAWAN_VIDEOS" --output "$MEGAWAN_DATA" --shard "$share/$shards" "${extra[@]}"
finish
