"""Closed forms of the flow core in plain Python float64, written from the formulas alone."""

import math
from statistics import NormalDist


def sigma_of_level(level: float, shift: float) -> float:
    return shift * level / (1 + (shift - 1) * level)


def level_of_sigma(sigma: float, shift: float) -> float:
    return sigma / (shift - (shift - 1) * sigma)


def sigmas(steps: int, shift: float, strength: float = 1.0) -> list[float]:
    return [sigma_of_level(strength * (1 - i / steps), shift) for i in range(steps)]


def gaussian_weights(grid: list[float]) -> list[float]:
    bell = [math.exp(-2 * (sigma - 0.5) ** 2) for sigma in grid]
    lifted = [y - min(bell) for y in bell]
    scale = 1000 / math.fsum(lifted)
    weights = [u * scale for u in lifted]
    if len(grid) == 1000:
        return weights
    weights = [w * len(grid) / 1000 for w in weights]
    return [w + weights[1] for w in weights]


def level_cdf(
    name: str, level: float, *, mean: float = 0.0, std: float = 1.0, mode_scale: float = 1.29
) -> float:
    """Return P(unshifted level <= level) of a sampling."""
    if level <= 0:
        return 0.0
    if level >= 1:
        return 1.0
    if name in ("uniform", "uniform_index"):
        return level
    if name == "logit_normal":
        return NormalDist(mean, std).cdf(math.log(level / (1 - level)))
    if name == "mode":  # the level falls with u, so P(level <= x) = P(u >= u(x)); u(x) by halving
        low, high = 0.0, 1.0
        for _ in range(80):
            u = (low + high) / 2
            value = 1 - u - mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
            low, high = (u, high) if value > level else (low, u)
        return 1 - low
    raise AssertionError(name)


def truncated_cdf(
    name: str, sigma: float, low: float, high: float, shift: float, **parameters: float
) -> float:
    """Return P(draw <= sigma | low <= draw <= high) for a draw that is shifted after sampling."""
    cut = [
        level_cdf(name, level_of_sigma(s, shift), **parameters)
        for s in (low, min(max(sigma, low), high), high)
    ]
    return (cut[1] - cut[0]) / (cut[2] - cut[0])
