#!/usr/bin/env bash
# Sets up (once) and runs the quick tests, several files at a time; words after it go to pytest instead:
# `launchers/test.sh tests/flow -k window`.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launchers/setup.sh"
python="${PYTHON:-python3}"
if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" != 1 ]]; then
    python="$root/.venv/bin/python"
    export PATH="$root/.venv/bin:$PATH" # ninja, for DeepSpeed's extension
fi

# One thread a process: the tests start several, and the sums come out the same on every machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$root"
# A file's tests stay together: they share what they set up. One more at a time than there are cores, since many wait
# (nproc answers OMP_NUM_THREADS where it is set); most start two ranks, so four fill a machine.
if (($# == 0)); then
    workers="$(($(env -u OMP_NUM_THREADS nproc) + 1))"
    set -- -n "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
