"""Writing and rewriting weights against plain writes of as many bytes."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megawan.benchmark.problem import cut
from megawan.benchmark.report import Table
from megawan.benchmark.timing import Spread, paired_ratio
from megawan.models.initial import InitialWeights
from megawan.models.layouts import open_weights, write_weights

BLOCK = 2**24


class MemoryWeights(InitialWeights):
    """Weights in memory as the source of an export: one buffer cut into every tensor, so that reading costs
    nothing."""

    def __init__(self, layers: int) -> None:
        super().__init__(cut("t2v-1.3B", layers), seed=0)
        self._buffer = torch.randn(max(torch.Size(shape).numel() for shape in self._shapes.values()))

    def load(self, key: str) -> Tensor:
        """Return a tensor."""
        shape = self._shapes[key]
        return self._buffer[: torch.Size(shape).numel()].view(shape)


def export_and_convert(folder: Path, gib: float, repetitions: int) -> Table:
    """Return the seconds of an export from memory, of a conversion to another layout and of a plain write
    and a plain copy of the same bytes, each with its fsync, in turn."""
    bytes_of_block = 46_440_704 * 2
    source = MemoryWeights(max(1, round(gib * 2**30 / bytes_of_block)))
    rows: dict[str, list[float]] = {name: [] for name in ("plain write", "export", "plain copy", "convert")}
    size = 0
    with tempfile.TemporaryDirectory(prefix="megawan-benchmark-", dir=folder) as name:
        place = Path(name)
        for number in range(repetitions + 1):
            began = time.perf_counter()
            files = write_weights(source, source.config, place / "native", "native", torch.bfloat16, {})
            export = time.perf_counter() - began
            size = sum(file.stat().st_size for file in files)
            plain = plain_write(place / "plain", _random_blocks(size))
            (place / "plain").unlink()
            copied = plain_write(place / "plain", _blocks_of(files))
            (place / "plain").unlink()
            began = time.perf_counter()
            opened = open_weights(place / "native", source.config)
            write_weights(opened, source.config, place / "other", "diffusers", torch.bfloat16, {})
            convert = time.perf_counter() - began
            if number:
                for row, seconds in zip(rows, (plain, export, copied, convert), strict=True):
                    rows[row].append(seconds)
            shutil.rmtree(place / "native")
            shutil.rmtree(place / "other")
    table = Table("Export and conversion against plain writes", note=f"{size / 2**30:.2f} GiB, bfloat16.")
    for row, against in (("export", "plain write"), ("convert", "plain copy")):
        ratio = paired_ratio(rows[against], rows[row])
        table.rows.append(
            {
                "what": row,
                "s": Spread.of(rows[row]).median,
                "GiB/s": size / 2**30 / Spread.of(rows[row]).median,
                "against": f"{against} {Spread.of(rows[against]).median:.2f} s",
                "bandwidth share": f"{ratio.median:.0%} ({ratio.low:.0%} to {ratio.high:.0%})",
            }
        )
    table.details.append({"seconds": rows, "bytes": size})
    return table


def plain_write(file: Path, blocks: Iterable[bytes | memoryview]) -> float:
    """Return the seconds that writing these blocks to one file takes with its fsync, and with making or
    reading them where the iterable does that as it goes."""
    began = time.perf_counter()
    with file.open("wb") as out:
        for block in blocks:
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - began


def _random_blocks(size: int) -> Iterator[bytes | memoryview]:
    block = torch.randint(0, 256, (min(BLOCK, size),), dtype=torch.uint8).numpy().data
    return (block[: min(BLOCK, size - start)] for start in range(0, size, BLOCK))


def _blocks_of(files: list[Path]) -> Iterator[bytes | memoryview]:
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(BLOCK):
                yield block
