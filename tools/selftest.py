"""Check that no layout changes the numbers on this machine: ring, Ulysses, data parallel, recompute, ZeRO.

    python tools/selftest.py --ranks 2

A tiny Wan takes three training steps in each layout, on GPUs over NCCL or on CPUs over gloo; loss, weights
and every gradient must equal those of one rank alone. Exits with 1 when any differs.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan import selftest
from megawan.cli import UserError, parse, run

PROG = "tools/selftest.py"


@dataclass(frozen=True)
class Options:
    """How many ranks, and for how long."""

    ranks: int | None = None
    """Ranks to start on this machine; by default one for each GPU, or 2 without GPUs."""
    zero: bool = True
    """Also run the layouts through DeepSpeed at ZeRO 3, 2 and 1."""
    time_limit: float = 300.0
    """Seconds after which everything is ended."""


def main(argv: Sequence[str]) -> None:
    """Run and print the table; exits with 1 when a layout differs or the ranks fail."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    ranks = selftest.default_ranks() if options.ranks is None else options.ranks
    try:
        selftest.check(ranks, options.time_limit)
    except ValueError as error:
        raise UserError(str(error)) from None
    began, rows = time.monotonic(), list[selftest.Row]()
    print(selftest.HEADING, flush=True)
    try:
        launched = selftest.launch(ranks, zero=options.zero, time_limit=options.time_limit)
        with contextlib.closing(launched) as entries:  # an interrupt ends the ranks
            for entry in entries:
                if isinstance(entry, selftest.Row):
                    rows.append(entry)
                    print(entry.line(), flush=True)
                else:
                    print(entry, flush=True)
    except selftest.SelftestError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    wrong = sum(not row.ok for row in rows)
    verdict = f"{wrong} of {len(rows)} layouts DIFFER from" if wrong else f"all {len(rows)} layouts equal"
    print(f"selftest: {verdict} one rank alone, {ranks} ranks, {time.monotonic() - began:.0f} s")
    if wrong or not rows:
        sys.exit(1)


if __name__ == "__main__":
    run(main, PROG)
