#!/usr/bin/env bash
# Trains on this machine: one rank per GPU, or two CPU ranks where there is none. Words after it go to train.py:
#   bash launchers/train.sh --deepspeed ds_configs/zero3.json --model.variant t2v-1.3B --data.path DIR --output DIR
#   NUM_GPUS=4    so many ranks; without it CUDA_VISIBLE_DEVICES chooses which GPUs
#   MEGAWAN_PREFLIGHT=1    look first whether the run would start (tools/preflight.py), and start only then
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" != 1 ]]; then
    python="$root/.venv/bin/python"
    export PATH="$root/.venv/bin:$PATH" # ninja, for DeepSpeed's extension
fi
command -v "$python" >/dev/null ||
    { printf 'launchers/train.sh: error: no %s; run bash launchers/setup.sh\n' "$python" >&2; exit 2; }

ranks=()
if [[ -n "${NUM_GPUS:-}" ]]; then
    ranks=(--num_gpus "$NUM_GPUS")
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    ranks=(--num_gpus 2)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
# Not bin/deepspeed: the first line of that script breaks in a checkout whose path has a space.
launch=("$python" -m deepspeed.launcher.runner "${ranks[@]}")
[[ "${MEGAWAN_PREFLIGHT:-0}" == 0 ]] || "${launch[@]}" "$root/tools/preflight.py" "$@"
exec "${launch[@]}" "$root/megawan/train.py" "$@"
