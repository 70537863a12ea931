"""Rewrite Wan weights in another layout.

    python tools/convert_checkpoint.py --input PATH --output DIR --layout diffusers

Reads every layout of docs/checkpoint_formats.md, one tensor at a time, and leaves nothing behind on failure.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan import cli
from megawan.models.layouts import open_experts, provenance, write_weights, written_bytes

PROG = "tools/convert_checkpoint.py"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rewrite Wan weights in another layout."""

    input: Path
    """Weights in any layout: a .safetensors or .pth file, an index, or a folder."""
    output: Path
    """New folder to write; it must not exist, or be empty."""
    layout: Literal["native", "diffusers", "comfyui"]
    """native (Wan, DiffSynth-Studio), diffusers (a transformer/ folder) or comfyui (one prefixed file)."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of the written weights; by default every tensor keeps its own, and nothing is rounded."""
    max_shard_gb: float = 5.0
    """Largest weight file in GB; one tensor is never split, and comfyui is always one file."""


def main(argv: Sequence[str]) -> None:
    """Convert what `argv` asks for and print what was found and written."""
    options = cli.parse(Options, argv, prog=PROG, description="Rewrite Wan weights in another layout.")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32, None: None}[options.dtype]
    if not 0 < options.max_shard_gb < math.inf:
        raise cli.UserError(f"--max_shard_gb {options.max_shard_gb} must be above 0 and finite")
    try:
        experts = open_experts(options.input)
        for weights in experts.values():
            print(weights.describe(), flush=True)
        first, *rest = experts.values()
        size = sum(written_bytes(weights, dtype) for weights in experts.values())
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
            files = write_weights(
                first,
                first.config,
                options.output,
                options.layout,
                dtype,
                provenance(list(experts.values()), " ".join(["convert_checkpoint.py", *argv])),
                low_noise=rest[0] if rest else None,
                max_shard_bytes=int(options.max_shard_gb * 1e9),
                tick=bar.update,
            )
    except (ValueError, OSError) as error:
        raise cli.UserError(str(error)) from None
    count = f"{len(files)} file{'s' * (len(files) > 1)}"
    print(f"wrote {count}, {size / 1e9:.2f} GB, {options.layout} layout: {options.output}")


if __name__ == "__main__":
    cli.run(main, PROG)
