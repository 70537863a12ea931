"""The weight of the loss at each noise level: one function per weighting, found by name in WEIGHTINGS.

To add one, write a function `sigmas -> weights` over the whole descending grid and add its row.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weighting = Callable[[Tensor], Tensor]

REFERENCE_STEPS = 1000  # the grid length for which the specification's table has mean 1


def gaussian(sigmas: Tensor) -> Tensor:
    """Return the specification's bell over the grid, float32 [N] like `sigmas` (specification §4.2).

    With x = 1000·sigma: y = exp(−2·((x − 500)/1000)²), u = y − min(y), w = u·1000/sum(u). For N != 1000 the
    reference goes on with w·N/1000 and then adds the new w[1] to all, so that the sum is N·(1 + w[1]).
    The arithmetic and its order are the reference's, in the dtype of `sigmas`.
    Raises ValueError if N < 2 or if every grid point is equally far from 500 (the sum of u is then 0).
    """
    if len(sigmas) < 2:
        raise ValueError(
            f"the gaussian weighting needs at least 2 timesteps, got {len(sigmas)}: its smallest weight is "
            "0, so one timestep would have no weight; use more timesteps or the weighting 'uniform'"
        )
    x = sigmas * 1000
    y = torch.exp(-2 * ((x - 500) / 1000) ** 2)
    u = y - y.min()
    total = u.sum()
    if not total > 0:
        raise ValueError(
            f"the gaussian weighting of these {len(sigmas)} sigmas is 0 everywhere (all equally far from "
            "0.5): use another shift, strength or number of timesteps, or the weighting 'uniform'"
        )
    weights = u * (REFERENCE_STEPS / total)
    if len(sigmas) != REFERENCE_STEPS:
        weights = weights * (len(sigmas) / REFERENCE_STEPS)
        weights = weights + weights[1]
    return weights


def uniform(sigmas: Tensor) -> Tensor:
    """Return weight 1 everywhere, float32 [N] like `sigmas`."""
    return torch.ones_like(sigmas)


WEIGHTINGS: Mapping[str, Weighting] = {"gaussian": gaussian, "uniform": uniform}


def get_weighting(name: str) -> Weighting:
    """Return the weighting of this name. Raises ValueError listing the legal names."""
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}; legal: {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]


def window_scale(weights: Tensor, probability: Tensor) -> Tensor:
    """Return the factor that makes the mean weight of a draw 1, a 0-dim tensor of the dtype of `weights`.

    `weights` [N] are those of the grid's ids, `probability` [N] how often a draw (inside its window) has each
    id.
    Raises ValueError if the window's weights are all 0.
    """
    mean = (weights.double() * probability.double()).sum()
    if not mean > 0:
        raise ValueError(
            "all weights inside the window are 0, so they cannot be renormalised to mean 1; "
            "widen the window or turn the renormalisation off"
        )
    return (1 / mean).to(weights.dtype)
