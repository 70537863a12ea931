"""Deterministic latents from a seed, for a first run, a benchmark or a test: reads like a store, needs no
file."""

import torch

from megawan.data.batch import Sample
from megawan.rng import generator_at


class SyntheticLatents:
    """`count` samples of one latent shape: normal latents and text features of varying true length.

    clip: the shape [rows, dim] of CLIP features, for models that take them; condition_channels: how many
    channels of condition each sample has.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int, int],
        text_dim: int,
        text_len: int,
        seed: int,
        count: int = 32,
        clip: tuple[int, int] | None = None,
        condition_channels: int = 0,
    ) -> None:
        self.shapes = [shape] * count
        self.latent_channels = shape[0]
        self.text_dim = text_dim
        self.fingerprint = f"synthetic-{shape}-{text_dim}-{text_len}-{seed}-{count}"
        self._text_len = text_len
        self._clip = clip
        self._condition_channels = condition_channels
        self._seed = seed

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`: float32 latents [C, T, H, W], text [1 .. text_len, text_dim], and
        what the model takes beside them."""
        generator = generator_at(self._seed, "synthetic", index)
        rows = int(torch.randint(1, self._text_len + 1, (1,), generator=generator))
        text = torch.randn(rows, self.text_dim, generator=generator)
        latents = torch.randn(self.shapes[index], generator=generator)
        clip, condition = None, None
        if self._clip is not None:
            clip = torch.randn(self._clip, generator=generator)
        if self._condition_channels:
            condition = torch.randn(self._condition_channels, *latents.shape[1:], generator=generator)
        return Sample(latents, text, f"synthetic sample {index}", clip, condition)

    @property
    def empty_text(self) -> torch.Tensor:
        """Return the features of the empty prompt: one row, float32 [1, text_dim]."""
        return torch.randn(1, self.text_dim, generator=generator_at(self._seed, "synthetic", "empty"))

    def describe(self) -> str:
        """Return what this is, for the start-up lines."""
        return f"{len(self)} synthetic samples of latent shape {list(self.shapes[0])}"
