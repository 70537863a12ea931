"""Measure what a checkpoint costs: how long training waits, how fast the rest is written, how fast it loads.

    python tools/benchmark_saving.py --folder /scratch/me --gib 4

Saves and loads states of this many GiB on one rank several times, in turn with plain writes (one file, one
fsync) and plain reads of as many bytes, and prints medians. Before a read the files leave the page cache.
All files are removed again.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan import checkpoint, dist
from megawan.benchmark.disk import BLOCK, plain_write
from megawan.checkpoint import MOMENTS, CheckpointOptions, Fragment
from megawan.cli import UserError, parse, run
from megawan.saving import Saver

PROG = "tools/benchmark_saving.py"


@dataclass(frozen=True)
class Options:
    """What to write where."""

    folder: Path
    """Folder on the file system that checkpoints will lie on; a new folder is made in it and removed."""
    gib: float = 1.0
    """Size of one checkpoint; make it larger than the file system's caches to measure the disk."""
    rounds: int = 5
    """How often each way is taken."""


def main(argv: Sequence[str]) -> None:
    """Measure as `argv` says. Raises UserError for a folder without room."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    if not options.gib > 0 or options.rounds < 1:
        raise UserError(f"--gib {options.gib} must be above 0, --rounds {options.rounds} 1 or more")
    folder = options.folder / f"benchmark_saving_{os.getpid()}"
    try:
        free = shutil.disk_usage(options.folder).free
        if free < 3 * options.gib * 2**30:
            raise UserError(
                f"--folder {options.folder} has {free / 2**30:.1f} GiB free, 3 times --gib are needed"
            )
        folder.mkdir()
    except OSError as error:
        raise UserError(f"--folder {options.folder}: {error.strerror or error}") from None
    dist.initialize(dist.environment(), torch.device("cpu"), 600)
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    dist.shutdown()


def measure(folder: Path, options: Options) -> None:
    """Alternate the two ways and print medians."""
    # Parameters of 4 million elements, as the blocks of 1.3B have; their values do not compress.
    count = max(1, round(options.gib * 2**30 / (3 * 4 * 2**22)))
    pieces = [
        Fragment(kind, f"blocks.{index}.weight", (2**22,), 0, torch.randn(2**22))
        for index in range(count)
        for kind in ("master", *MOMENTS)
    ]
    size = sum(piece.values.nbytes for piece in pieces)
    saver = Saver(folder / "checkpoints", CheckpointOptions(keep_last=0), 600)
    saver.start(0, pieces, {})  # it makes the host buffers, once a run
    saver.finish()
    first = saver.ended()[0]
    shutil.rmtree(first.folder)
    rows: dict[str, list[float]] = {
        name: []
        for name in (
            "training waited for the copy",
            "written, hashed, committed aside",
            "plain write of the same bytes",
            "verified before a resume",
            "loaded: verified, then read",
            "plain read of the same bytes",
        )
    }
    for number in tqdm(range(1, options.rounds + 1), unit="round", disable=None):
        saver.start(number, pieces, {})
        saver.finish()
        (saved,) = saver.ended()
        if saved.problem:
            raise UserError(f"--folder: {saved.problem}")
        plain = folder / "plain"
        seconds = [saved.copy_seconds, saved.write_seconds, plain_write(plain, contents(pieces))]
        forget(*saved.folder.iterdir(), plain)
        seconds += [*load(saved.folder, pieces), plain_read(plain)]
        shutil.rmtree(saved.folder)
        for values, one in zip(rows.values(), seconds, strict=True):
            values.append(one)
    gib = size / 2**30
    print(
        f"{gib:.2f} GiB a checkpoint, {options.rounds} rounds, medians; first copy {first.copy_seconds:.2f} s"
    )
    medians = [statistics.median(values) for values in rows.values()]
    for name, median in zip(rows, medians, strict=True):
        print(f"{name:34} {median:8.2f} s {gib / median:8.2f} GiB/s")
    _, written, plainly_written, _, loaded, plainly_read = medians
    print(f"bandwidth of a save: {plainly_written / written:.0%} of a plain write")
    print(f"bandwidth of a load: {plainly_read / loaded:.0%} of a plain read")


def load(folder: Path, pieces: Sequence[Fragment]) -> tuple[float, float]:
    """Return the seconds until the checkpoint is verified and until its tensors are read too, one at a time
    into the same memory, as a resume does."""
    into = torch.empty(2**22)
    began = time.perf_counter()
    checkpoint.verify(folder)
    verified = time.perf_counter() - began
    saved = checkpoint.StepWeights(folder)
    for piece in pieces:
        into.copy_(saved.load_range(piece.kind, piece.name, 0, 2**22))
    return verified, time.perf_counter() - began


def forget(*files: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(file: Path) -> float:
    """Return the seconds that reading the file takes, and remove it."""
    block = memoryview(bytearray(BLOCK))
    began = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(block):
            pass
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def contents(pieces: Sequence[Fragment]) -> Iterator[memoryview]:
    """Yield the bytes of the pieces in blocks."""
    for piece in pieces:
        content = piece.values.view(torch.uint8).numpy().data
        yield from (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))


if __name__ == "__main__":
    run(main, PROG, leave=dist.leave)
