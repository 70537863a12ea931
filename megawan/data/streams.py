"""What the order is made of: the samples of one latent shape in one dataset, with their weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

Shape = tuple[int, ...]

DATASET_STRIDE = 1 << 40
"""Sample i of the d-th dataset of a run has the id d·2⁴⁰ + i: neither a longer dataset nor another one behind
it changes the ids of the others, and every draw hangs on an id. A float64 still holds it exactly."""


@dataclass(frozen=True)
class Stream:
    """Samples that are shuffled and passed in epochs of their own."""

    shape: Shape
    samples: Sequence[int]
    """Sample ids."""
    weight: Fraction
    """How many of the run's places are theirs, relative to the other streams; above 0."""
    key: int
    """What their shuffles hang on, beside the seed and the epoch."""


def dataset_of(sample_ids: Tensor) -> Tensor:
    """Return which dataset of the run each sample is of, from 0, int64 like `sample_ids`."""
    return sample_ids // DATASET_STRIDE


def is_image(shape: Shape) -> bool:
    """Return whether latents (C, T, H, W) are those of a still image: one latent frame."""
    return shape[1] == 1


def by_shape(
    shapes: Sequence[Shape],
    *,
    dataset: int = 0,
    weight: Fraction | None = None,
    image_share: Fraction | None = None,
) -> list[Stream]:
    """Return the streams of a dataset, one for each latent shape.

    `weight` (default: the number of samples) is divided among them by number. With `image_share`, where the
    dataset holds both, its images have that share of its weight and its videos the rest; a share of 0 or 1
    leaves the others out.
    """
    buckets: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        buckets.setdefault(tuple(shape), []).append(dataset * DATASET_STRIDE + index)
    total = Fraction(len(shapes)) if weight is None else weight
    images = sum(len(samples) for shape, samples in buckets.items() if is_image(shape))
    streams = []
    for number, shape in enumerate(sorted(buckets)):
        share = Fraction(len(buckets[shape]), len(shapes))
        if image_share is not None and 0 < images < len(shapes):
            kind = image_share if is_image(shape) else 1 - image_share
            share = kind * Fraction(len(buckets[shape]), images if is_image(shape) else len(shapes) - images)
        if total * share > 0:
            streams.append(Stream(shape, buckets[shape], total * share, dataset * DATASET_STRIDE + number))
    return streams
