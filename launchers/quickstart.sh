#!/usr/bin/env bash
# The whole job on toy videos, on whatever this machine has: mp4 clips → latents → ZeRO-3 training on two ranks (or one
# per GPU) → export → sampled mp4 and one picture. Eight to fifteen minutes on two CPU cores after installation.
#   bash launchers/quickstart.sh [--output FOLDER]     default: runs/quickstart of the checkout, replaced at every call
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launchers/setup.sh"
if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" != 1 ]]; then
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
fi
# Nothing here downloads; without this, libraries that look for a hub would wait for a time-out.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python "$root/tools/quickstart.py" "$@"
