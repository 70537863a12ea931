"""A sample that cannot be trained on is replaced, in the same way on every rank that reads it, and said."""

import math
import sys
from collections.abc import Callable, Sequence

import torch

from megawan.data.batch import Batch, Replaced, Sample
from megawan.rng import position_key

ATTEMPTS = 10
"""So many bad samples in a row end the run."""
REMEDY = "remove its file and run tools/encode_dataset.py again"


class BadSamples(ValueError):
    """Too much of the data cannot be trained on."""


def problem_of(sample: Sample, shape: Sequence[int], text_dim: int) -> str:
    """Return why this sample cannot be trained on as one of latent shape `shape`, or "" when it can."""
    latents, text = tuple(sample.latents.shape), tuple(sample.text.shape)
    if latents != tuple(shape):
        return f"latents are {list(latents)}, the index says {list(shape)}"
    if len(text) != 2 or text[0] < 1 or text[1] != text_dim:
        return f"text is {list(text)}, not rows of {text_dim}"
    if sample.condition is not None and tuple(sample.condition.shape[1:]) != latents[1:]:
        return f"condition is {list(sample.condition.shape)} for latents of {list(latents)}"
    features = {"latents": sample.latents, "text": sample.text, "clip": sample.clip}
    for name, values in {**features, "condition": sample.condition}.items():
        if values is not None and not torch.isfinite(values).all():
            return f"{name} has values that are not finite"
    return ""


def substitute(samples: Sequence[int], sample_id: int, epoch: int, attempt: int, seed: int) -> int | None:
    """Return which of `samples` stands in for `sample_id` in this epoch at the given attempt (from 1), never
    itself; None when there is no other."""
    others = len(samples) - 1
    if others < 1:
        return None
    drawn = samples[position_key(seed, "replacement", sample_id, epoch, attempt) % others]
    return samples[-1] if drawn == sample_id else drawn


def read_or_replace(
    read: Callable[[int], Sample],
    where: Callable[[int], str],
    *,
    samples: Sequence[int],
    shape: Sequence[int],
    text_dim: int,
    sample_id: int,
    epoch: int,
    seed: int,
) -> tuple[int, Sample, tuple[Replaced, ...]]:
    """Return (id, sample, what was found bad on the way) of a place: the sample itself, or the first
    substitute that can be trained on, a function of (seed, sample_id, epoch, attempt).

    `samples`: those that may stand in for it, itself included; without any, what `read` raises goes through.
    Raises BadSamples when there is none within ATTEMPTS.
    """
    bad: list[Replaced] = []
    candidate: int | None = sample_id
    for attempt in range(1, ATTEMPTS + 1):
        if candidate is None:
            break
        try:
            sample = read(candidate)
            problem = problem_of(sample, shape, text_dim)
        except (ValueError, OSError) as error:
            if not samples:
                raise
            problem = str(error)
        if not problem:
            return candidate, sample, tuple(bad)
        bad.append(Replaced(candidate, where(candidate), problem))
        candidate = substitute(samples, sample_id, epoch, attempt, seed)
    what = f"{len(bad)} samples in a row" if candidate is not None else "a sample without a substitute"
    raise BadSamples(f"{what} cannot be trained on; the last: {bad[-1]}; {REMEDY}")


class BadTally:
    """Says each bad sample once, and ends a run that has too many of them."""

    def __init__(self, samples: int, max_bad: float, reader: str) -> None:
        """`max_bad`: the share of `samples` that may be bad; one always may, unless it is 0."""
        self._allowed = max(1, math.floor(max_bad * samples)) if max_bad else 0
        self._rule = f"--data.max_bad {max_bad} of {samples} allows {self._allowed}"
        self._reader = reader
        self._known: set[int] = set()

    def add(self, batch: Batch) -> None:
        """Say the bad samples of a batch that were not known, on stderr. Raises BadSamples when they are too
        many by now."""
        for bad in batch.replaced:
            if bad.sample_id in self._known:
                continue
            self._known.add(bad.sample_id)
            if len(self._known) > self._allowed:
                raise BadSamples(
                    f"{len(self._known)} samples that cannot be trained on, where {self._rule}; the last:"
                    f" {bad}; {REMEDY}"
                )
            print(f"{self._reader}: replaced {bad}", file=sys.stderr, flush=True)
