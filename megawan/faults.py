"""What a test makes of a step's micro-batches to see the run survive it (MEGAWAN_FAULT, see
megawan/dist.py)."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megawan.data.batch import Batch

SPIKE = 1e3


def broken(kind: str, micro_batches: Sequence[Batch]) -> list[Batch]:
    """Return the micro-batches with the fault of this kind in the first: nan, spike, samples; "" changes
    nothing."""
    first, *others = micro_batches
    if kind == "nan":
        first = replace(first, latents=first.latents * math.nan)
    elif kind == "spike":
        first = replace(first, latents=first.latents * SPIKE)
    elif kind == "samples":
        first = replace(first, sample_ids=first.sample_ids + 1)
    return [first, *others]
