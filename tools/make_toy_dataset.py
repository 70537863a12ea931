"""Make real H.264 clips of moving shapes with captions: bash launchers/quickstart.sh trains on them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan import cli  # noqa: E402
from megawan.data.toy import ToyOptions, make_dataset  # noqa: E402

PROG = "tools/make_toy_dataset.py"


@dataclass(frozen=True)
class _Flags:
    output: Path
    """Folder for the dataset; new, empty, or this very dataset."""
    clips: int = ToyOptions.clips
    """Number of clips; clip i shows caption i mod 24."""
    seed: int = ToyOptions.seed
    """Start, speed and size of every shape are drawn from it."""
    frames: int = ToyOptions.frames
    """Frames of a clip, 4n+1 and at least 5."""
    size: int = ToyOptions.size
    """Height and width in pixels, a multiple of 16 from 32 to 1024."""
    fps: int = ToyOptions.fps
    """Frames a second."""


def main(argv: Sequence[str]) -> None:
    """Make the dataset that the flags describe, and say where it is."""
    flags = cli.parse(_Flags, argv, prog=PROG, description="Make toy videos with captions and metadata.csv.")
    try:
        options = ToyOptions(**{field.name: getattr(flags, field.name) for field in fields(ToyOptions)})
        made = make_dataset(flags.output, options)
    except (ValueError, OSError) as error:
        raise cli.UserError(str(error)) from error
    if made:
        print(f"{options.clips} clips and metadata.csv are in {flags.output}")
    else:
        print(f"{flags.output} already holds these {options.clips} clips; nothing to do")


if __name__ == "__main__":
    cli.run(main, PROG)
