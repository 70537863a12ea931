#!/usr/bin/env bash
# Trains on the machines of a hostfile (lines such as "node1 slots=8"), over pdsh and ssh without passwords, with the
# same checkout at the same path on each. Words after it go to train.py:
#   HOSTFILE=hosts.txt bash launchers/train_multinode.sh --deepspeed ds_configs/zero3.json --model.variant t2v-14B ...
#   MASTER_PORT=29500    a free port of the first machine
#   MEGAWAN_PREFLIGHT=1    look first whether the run would start (tools/preflight.py), and start only then
# Under Slurm use slurm/*.sh instead.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { printf 'launchers/train_multinode.sh: error: %s\n' "$1" >&2; exit 2; }
[[ -n "${HOSTFILE:-}" ]] || fail 'set HOSTFILE to a file of lines such as "node1 slots=8"'
[[ -f "$HOSTFILE" ]] || fail "HOSTFILE $HOSTFILE is not a file"
# The launcher of DeepSpeed pastes these two into a remote shell line without quotes.
[[ "$root$PWD" != *[[:space:]]* ]] || fail "neither the checkout nor the working directory may have a space in its path"
python="${PYTHON:-python3}"
if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" != 1 ]]; then
    python="$root/.venv/bin/python"
    export PATH="$root/.venv/bin:$PATH"
fi
command -v "$python" >/dev/null || fail "no $python; run bash launchers/setup.sh"
launch=("$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
[[ "${MEGAWAN_PREFLIGHT:-0}" == 0 ]] || "${launch[@]}" "$root/tools/preflight.py" "$@"
exec "${launch[@]}" "$root/megawan/train.py" "$@"
