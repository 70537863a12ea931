"""Deterministic latents from a seed, for a first run, a benchmark or a test: reads like a store, needs no
file."""

import torch

from megawan.data.batch import Sample
from megawan.data.streams import Stream, by_shape
from megawan.rng import generator_at


class SyntheticLatents:
    """`count` samples of one latent shape: normal latents and text features of varying true length.

    With `condition_channels` each has a condition [condition_channels, T, H, W], with `clip` rows of that
    shape (257 or 514, 1280): what image-to-video models read besides.
    """

    being_filled = False

    def __init__(
        self,
        *,
        shape: tuple[int, int, int, int],
        text_dim: int,
        text_len: int,
        seed: int,
        count: int = 32,
        condition_channels: int = 0,
        clip: tuple[int, int] | None = None,
    ) -> None:
        self.shapes = [shape] * count
        self.latent_channels = shape[0]
        self.text_dim = text_dim
        self.fingerprint = f"synthetic-{shape}-{text_dim}-{text_len}-{seed}-{count}"
        if condition_channels or clip:
            self.fingerprint += f"-{condition_channels}-{clip}"
        self._clip = clip
        self._extras: dict[str, tuple[int, ...]] = {}
        if condition_channels:
            self._extras["condition"] = (condition_channels, *shape[1:])
        if clip:
            self._extras["clip"] = clip
        self._text_len = text_len
        self._seed = seed

    def another(self, seed: int) -> "SyntheticLatents":
        """Return samples of the same shapes from another seed."""
        return SyntheticLatents(
            shape=self.shapes[0],
            text_dim=self.text_dim,
            text_len=self._text_len,
            seed=seed,
            count=len(self),
            condition_channels=self._extras.get("condition", (0,))[0],
            clip=self._clip,
        )

    @property
    def streams(self) -> list[Stream]:
        """Return the samples by latent shape, as the order takes them."""
        return by_shape(self.shapes)

    @property
    def extras(self) -> set[str]:
        """Return which of "clip" and "condition" every sample has."""
        return set(self._extras)

    def where(self, sample_id: int) -> str:
        """Return what a sample is, for a message."""
        return f"synthetic sample {sample_id}"

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`: float32 latents [C, T, H, W] and text [1 .. text_len, text_dim]."""
        generator = generator_at(self._seed, "synthetic", index)
        rows = int(torch.randint(1, self._text_len + 1, (1,), generator=generator))
        text = torch.randn(rows, self.text_dim, generator=generator)
        latents = torch.randn(self.shapes[index], generator=generator)
        extras = {
            name: torch.randn(shape, generator=generator_at(self._seed, "synthetic", index, name))
            for name, shape in self._extras.items()
        }
        prompt = f"synthetic sample {index}"
        return Sample(latents, text, prompt, extras.get("clip"), extras.get("condition"))

    @property
    def empty_text(self) -> torch.Tensor:
        """Return the features of the empty prompt: one row, float32 [1, text_dim]."""
        return torch.randn(1, self.text_dim, generator=generator_at(self._seed, "synthetic", "empty"))

    def describe(self) -> str:
        """Return what this is, for the start-up lines."""
        extras = "".join(f", {name} {list(shape)}" for name, shape in self._extras.items())
        return f"{len(self)} synthetic samples of latent shape {list(self.shapes[0])}{extras}"
