"""Small latent stores for the tests of order, mixing and replacement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megawan.data.latents import LatentStore, StoreWriter

VIDEO, WIDE, IMAGE = (4, 3, 2, 2), (4, 2, 2, 4), (4, 1, 2, 2)
SETTINGS = {"codec": "dct", "latent_channels": 4, "text_dim": 8}


def make_store(
    path: Path,
    shapes: Sequence[tuple[int, ...]],
    bad: Sequence[int] = (),
    **settings: Any,
) -> LatentStore:
    """Write a store of these latent shapes, one sample a shard; the samples `bad` are not finite."""
    with StoreWriter(path, {**SETTINGS, **settings}, shard_bytes=1) as writer:
        for number, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(shape, generator=generator)
            if number in bad:
                latents[0, 0] = torch.nan
            text = torch.randn(1 + number % 3, int(writer.settings["text_dim"]), generator=generator)
            row = {
                "prompt": f"{path.name} {number}",
                "source": f"{number}.mp4",
                "source_sha256": f"{number:064d}",
            }
            writer.add(f"k{number}", {"latents": latents, "text": text}, row)
        return writer.finish(
            [f"k{number}" for number in range(len(shapes))], torch.ones(1, int(writer.settings["text_dim"]))
        )
