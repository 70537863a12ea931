"""Make sure, before hours of GPUs depend on it, that a run would start: its own launch line without training.

    torchrun --nproc_per_node 8 tools/preflight.py THE FLAGS OF megawan/train.py
    python tools/preflight.py --world_size 16 THE FLAGS OF megawan/train.py

Takes the launcher and the words of the training and prints a row for every check, ✓, ✗ or – (does not apply
here), and how to mend each ✗. Nothing is trained and nothing stays behind. Exits with 1 when any row is ✗, 2
for bad flags.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan import cli, dist
from megawan.preflight import table
from megawan.preflight.run import examine, leave_together, parse

PROG = "tools/preflight.py"


def main(argv: Sequence[str]) -> None:
    """Look, print on rank 0, and end every rank with the exit code."""
    dist.end_with_launcher()
    options = parse(argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        place = dist.environment()
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    # Standard output is for the answer; what libraries and the checks say on the way goes beside it.
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(options, place)
    if place.rank == 0:
        encoding = sys.stdout.encoding or "ascii"
        as_json = table.as_json(report.rows, report.world_size)
        print(as_json if options.json else table.as_text(report.rows, encoding), flush=True)
    leave_together(report)


if __name__ == "__main__":
    cli.run(main, PROG, rank=dist.environment().rank, leave=dist.leave)
