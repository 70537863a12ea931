"""Measure whether samples show what their captions say, on the quickstart's toy captions ("a red circle
moving right").

    python tools/check_toy_samples.py --input runs/quickstart/samples

Prints a table and exits with 1 when fewer samples than asked have the right colour or direction.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan.cli import UserError, parse, run
from megawan.data.toy import measure_clip, parse_caption
from megawan.data.video import read_all

PROG = "tools/check_toy_samples.py"


@dataclass(frozen=True)
class Options:
    """Which samples, and how many must be right."""

    input: Path
    """Folder that tools/sample.py wrote."""
    weights: str = "trained"
    """Which of its weights to measure: trained or untrained."""
    colour: int = 10
    """Samples that must have the right dominant colour."""
    direction: int = 8
    """Samples that must move the right way."""


def main(argv: Sequence[str]) -> None:
    """Measure as `argv` says; exits with 1 when too few are right."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        entries = json.loads((options.input / "samples.json").read_text(encoding="utf-8"))
        chosen = [entry for entry in entries if entry["weights"] == options.weights]
        if not chosen:
            raise ValueError(f"{options.input}: no samples of --weights {options.weights}")
        colours = directions = 0
        for entry in chosen:
            said = parse_caption(entry["prompt"])
            seen = measure_clip(read_all(options.input / entry["file"])[0])
            colours += seen.colour == said.colour
            directions += seen.direction == said.direction
            marks = [
                "ok" if seen.colour == said.colour else f"is {seen.colour}",
                "ok" if seen.direction == said.direction else f"moves {seen.direction}",
            ]
            print(f"  {entry['prompt']:32} colour {marks[0]:10} direction {marks[1]}")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{options.input}: {error}") from None
    print(
        f"{options.weights}: colour right in {colours} of {len(chosen)} (wanted {options.colour}),"
        f" direction right in {directions} of {len(chosen)} (wanted {options.direction})"
    )
    if colours < options.colour or directions < options.direction:
        sys.exit(1)


if __name__ == "__main__":
    run(main, PROG)
