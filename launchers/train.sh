#!/usr/bin/env bash
# Trains on this machine: one rank per GPU, or two CPU ranks where there is none. Words after it go to megawan/train.py:
#   bash launchers/train.sh --deepspeed ds_configs/zero3.json --model.variant t2v-1.3B --data.path DIR --output DIR
#   NUM_GPUS=4    so many ranks; CUDA_VISIBLE_DEVICES chooses which GPUs (without NUM_GPUS)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" != 1 ]]; then
    [[ -x "$root/.venv/bin/deepspeed" ]] ||
        { printf 'launchers/train.sh: error: no .venv yet; run bash launchers/setup.sh\n' >&2; exit 2; }
    export PATH="$root/.venv/bin:$PATH"
fi

ranks=()
if [[ -n "${NUM_GPUS:-}" ]]; then
    ranks=(--num_gpus "$NUM_GPUS")
elif ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    ranks=(--num_gpus 2)
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec deepspeed "${ranks[@]}" "$root/megawan/train.py" "$@"
