#!/usr/bin/env bash
# Makes .venv at the repository root with everything in constraints.txt; a second call takes a second.
#   PYTHON=python3.12          another interpreter than python3.11 or python3; 3.10 or newer
#   MEGAWAN_SYSTEM_PYTHON=1    no .venv: install into the present python3 (or PYTHON) and keep its torch, for containers
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, a proxy) apply.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { printf 'launchers/setup.sh: error: %s\n' "$1" >&2; exit 2; }
say() { printf 'setup: %s\n' "$1"; }

python="${PYTHON:-python3}"
if [[ -z "${PYTHON:-}${MEGAWAN_SYSTEM_PYTHON:-}" ]] && command -v python3.11 >/dev/null; then
    python=python3.11
fi
command -v "$python" >/dev/null || fail "no $python on PATH; install Python 3.10 or newer, or set PYTHON to one"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is $("$python" -V 2>&1); MegaWan needs Python 3.10 or newer (set PYTHON to one)"
for compiler in gcc g++; do
    command -v "$compiler" >/dev/null ||
        fail "no $compiler on PATH; DeepSpeed compiles a small extension with it (Debian: apt-get install g++)"
done

install() { "$bin" -m pip install -qq --disable-pip-version-check "$@"; }

if [[ "${MEGAWAN_SYSTEM_PYTHON:-}" == 1 ]]; then
    bin="$(command -v "$python")"
    constraints="$(mktemp)"
    trap 'rm -f "$constraints"' EXIT
    if torch="$("$bin" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null)"; then
        say "keeping torch $torch of $bin"
        { grep -v '^torch==' "$root/constraints.txt"; printf 'torch==%s\n' "$torch"; } >"$constraints"
    else
        cp "$root/constraints.txt" "$constraints"
        say "installing torch into $bin"
        install torch -c "$constraints"
    fi
    say "installing the rest and megawan itself"
    install -c "$constraints" -e "${root}[dev]"
    say "done; commands use $bin"
    exit 0
fi

bin="$root/.venv/bin/python"
stamp="$root/.venv/megawan-setup"
wanted="$(cat "$root/constraints.txt" "$root/setup.py" "$root/launchers/setup.sh" | cksum) $root"
if [[ -x "$bin" && -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    say "$root/.venv is up to date"
    exit 0
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments (Debian: apt-get install python3-venv)"
if [[ ! -x "$bin" ]]; then
    say "making $root/.venv with $("$python" -V)"
    "$python" -m venv --clear "$root/.venv"
fi
rm -f "$stamp"
say "installing torch (on a machine with GPUs: several gigabytes, minutes)"
install --no-compile torch -c "$root/constraints.txt"
say "installing the rest and megawan itself"
install --no-compile -c "$root/constraints.txt" -e "${root}[dev]"
# pip would compile 13,000 modules on one core, a minute. One of torch's is for a newer Python, and may fail.
"$bin" -m compileall -q -j 0 "$root/.venv/lib" >/dev/null || true
printf '%s\n' "$wanted" >"$stamp"
say "done: . \"$root/.venv/bin/activate\", or run launchers/quickstart.sh"
