"""Which noise level a training sample gets: distributions of sigma, and windows that restrict them.

A distribution is given over the *unshifted* level s in [0, 1]; the shift k then maps it to sigma = k·s/(1 +
(k − 1)·s), exactly as it maps the grid. So `uniform` is the continuous form of `uniform_index`, and with
shift 1 sigma = s.
To add a continuous distribution, write a function that returns its `Levels` and add its row to LEVELS.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megawan.flow.schedule import shift_level, unshift_sigma

EXPERT_BOUNDARIES: Mapping[str, float] = {"t2v-A14B": 0.875, "i2v-A14B": 0.900}
# Less than this share of the distribution is a mistake, and float64 could no longer resolve the draws inside
# it.
SMALLEST_SHARE = 1e-9


@dataclass(frozen=True)
class SigmaWindow:
    """The part of the noise levels that is drawn: low <= sigma <= high, and the ids start .. stop − 1.

    Bounds are float32 values: of a half-open window [min, max), `high` is the largest float32 below max.
    """

    low: float
    high: float
    start: int
    stop: int


def sigma_window(sigmas: Tensor, min_sigma: float = 0.0, max_sigma: float = 1.0) -> SigmaWindow:
    """Return the window min_sigma <= sigma < max_sigma of the grid `sigmas` [N]; max_sigma = 1 includes 1.

    Bounds are compared in float32, as the grid is and as `sigmas >= min_sigma` does, so that windows which
    share a boundary share no id and miss none. The window may hold no grid id (start = stop).
    Raises ValueError unless 0 <= min_sigma < max_sigma <= 1.
    """
    check_interval("min_sigma", min_sigma, "max_sigma", max_sigma)
    low, top = _float32(min_sigma), _float32(max_sigma)
    # The reference's arithmetic can give sigmas[0] = 1.0000001 at some shifts; it belongs to the top all the
    # same.
    high = max(1.0, float(sigmas[0])) if max_sigma == 1 else _next_below(top)
    if low > high:
        raise ValueError(
            f"the sigma window [{min_sigma}, {max_sigma}) is empty: it holds no float32 number; widen it"
        )
    return SigmaWindow(low, high, int((sigmas > high).sum()), int((sigmas >= low).sum()))


def index_window(sigmas: Tensor, min_boundary: float = 0.0, max_boundary: float = 1.0) -> SigmaWindow:
    """Return the window of ids int(min_boundary·N) .. int(max_boundary·N) − 1 (specification §2).

    This is DiffSynth's form. Its sigmas reach from above sigmas[stop] (from 0 if stop = N) up to
    sigmas[start]; which sigmas a fraction means depends on the shift.
    Raises ValueError unless 0 <= min_boundary < max_boundary <= 1, or if the window holds no id.
    """
    check_interval("min_timestep_boundary", min_boundary, "max_timestep_boundary", max_boundary)
    steps = len(sigmas)
    start, stop = int(min_boundary * steps), int(max_boundary * steps)
    if start >= stop:
        raise ValueError(
            f"the window of min_timestep_boundary {min_boundary} and max_timestep_boundary {max_boundary} "
            f"is empty: it holds none of the {steps} timesteps; widen it to at least 1/{steps}"
        )
    low = 0.0 if stop == steps else _next_above(float(sigmas[stop]))
    high = max(1.0, float(sigmas[0])) if start == 0 else float(sigmas[start])
    return SigmaWindow(low, high, start, stop)


def expert_window(sigmas: Tensor, expert: str) -> SigmaWindow:
    """Return the window of one expert of an A14B model: "-high" is sigma >= its boundary, "-low" the rest.

    Raises ValueError listing the legal names.
    """
    if expert not in EXPERTS:
        raise ValueError(f"unknown expert {expert!r}; legal: {', '.join(EXPERTS)}")
    return sigma_window(sigmas, *EXPERTS[expert])


def _expert_table() -> dict[str, tuple[float, float]]:
    table = {}
    for model, boundary in EXPERT_BOUNDARIES.items():
        table[f"{model}-high"] = (boundary, 1.0)
        table[f"{model}-low"] = (0.0, boundary)
    return table


EXPERTS: Mapping[str, tuple[float, float]] = _expert_table()  # name -> (min_sigma, max_sigma)


@dataclass(frozen=True)
class LevelOptions:
    """The parameters of the distributions; each reads its own."""

    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


@dataclass(frozen=True)
class Levels:
    """A continuous distribution of the unshifted level s in [0, 1]: F(s) and its inverse, in float64."""

    cdf: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]


def uniform(options: LevelOptions) -> Levels:
    """Return s ~ U(0, 1)."""
    return Levels(cdf=lambda s: s, quantile=lambda p: p)


def logit_normal(options: LevelOptions) -> Levels:
    """Return logit(s) ~ N(logit_mean, logit_std²) (SD3, arXiv 2403.03206 §3.1); shift k adds ln k.

    Raises ValueError unless logit_std > 0 and both are finite.
    """
    mean, std = options.logit_mean, options.logit_std
    if not math.isfinite(mean):
        raise ValueError(f"logit_mean must be a finite number, got {mean}")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"logit_std must be a finite number above 0, got {std}")
    return Levels(
        cdf=lambda s: torch.special.ndtr((torch.logit(s) - mean) / std),
        quantile=lambda p: torch.sigmoid(mean + std * torch.special.ndtri(p)),
    )


def mode(options: LevelOptions) -> Levels:
    """Return s = 1 − u − m·(cos²(π·u/2) − 1 + u), u ~ U(0, 1), m = mode_scale (SD3, arXiv 2403.03206 §3.1).

    m > 0 favours the middle, m < 0 the ends, m = 0 is uniform.
    Raises ValueError unless −1 <= mode_scale <= 2/(π − 2) = 1.7519, where s falls monotonically with u.
    """
    scale, largest = options.mode_scale, 2 / (math.pi - 2)
    if not -1 <= scale <= largest:
        raise ValueError(f"mode_scale must be in [-1, {largest:.4f}], got {scale}")

    def quantile(p: Tensor) -> Tensor:
        u = 1 - p
        return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    return Levels(cdf=lambda s: _invert(quantile, s), quantile=quantile)


LEVELS: Mapping[str, Callable[[LevelOptions], Levels]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
}
SAMPLINGS = ("uniform_index", *LEVELS)


class SigmaSampler(Protocol):
    """Draws sigma inside a window.

    `share` is how much of the unrestricted distribution the window holds; `probability` [N], float64, how
    often a draw inside the window has each grid id as its nearest (sum 1).
    """

    share: float
    probability: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one sigma of the window, a 0-dim float32 tensor on the CPU."""


def make_sampler(
    name: str, options: LevelOptions, *, sigmas: Tensor, shift: float, window: SigmaWindow
) -> SigmaSampler:
    """Return the sampler of this name, restricted to `window`.

    Raises ValueError for an unknown name, illegal parameters, or a window that this sampling never hits.
    """
    check_sampling(name)
    if name == "uniform_index":
        return IndexSampler(sigmas, window)
    return LevelSampler(LEVELS[name](options), sigmas=sigmas, shift=shift, window=window)


class IndexSampler:
    """The specification's draw: an id uniform over the window's ids, sigma = sigmas[id]."""

    def __init__(self, sigmas: Tensor, window: SigmaWindow) -> None:
        """Raises ValueError if the window holds no grid id."""
        if window.start >= window.stop:
            raise ValueError(
                f"the window sigma {window.low:g} .. {window.high:g} is empty: none of the {len(sigmas)} "
                "timesteps lies in it; widen it, use more timesteps or a continuous sampling"
            )
        self.share = (window.stop - window.start) / len(sigmas)
        self.probability = torch.zeros(len(sigmas), dtype=torch.float64, device="cpu")
        self.probability[window.start : window.stop] = 1 / (window.stop - window.start)
        self._sigmas = sigmas
        self._window = window

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one grid sigma of the window, a 0-dim float32 tensor on the CPU."""
        window = self._window
        return self._sigmas[torch.randint(window.start, window.stop, (), generator=generator, device="cpu")]


class LevelSampler:
    """A continuous distribution truncated to the window by its inverse cdf: no rejection and no clamping."""

    def __init__(self, levels: Levels, *, sigmas: Tensor, shift: float, window: SigmaWindow) -> None:
        """Raises ValueError if the window holds less than SMALLEST_SHARE of the distribution."""
        self._levels = levels
        self._shift = shift
        self._window = window
        self._first, last = self._below(torch.tensor([window.low, window.high], dtype=torch.float64)).unbind()
        self._width = last - self._first
        self.share = float(self._width)
        if not self.share >= SMALLEST_SHARE:
            raise ValueError(
                f"the window sigma {window.low:g} .. {window.high:g} holds {self.share:.1e} of this "
                f"sampling's draws (at least {SMALLEST_SHARE:g} needed); widen it or use another distribution"
            )
        middles = (sigmas[1:].double() + sigmas[:-1].double()) / 2
        edges = torch.cat([middles.new_ones(1), middles, middles.new_zeros(1)]).clamp(window.low, window.high)
        self.probability = -self._below(edges).diff() / self._width

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one sigma of the window, a 0-dim float32 tensor on the CPU."""
        return self.at(_open_uniform(generator))

    def at(self, u: Tensor) -> Tensor:
        """Return the sigmas, float32, with shares u (float64 in (0, 1)) of the window's draws below them."""
        level = self._levels.quantile(self._first + u * self._width)
        # Takes off a last-bit overshoot of the float64 map. The bounds are float32 numbers, so rounding
        # cannot cross.
        sigma = shift_level(level, self._shift).clamp(self._window.low, self._window.high)
        return sigma.to(torch.float32)

    def _below(self, sigma: Tensor) -> Tensor:
        return self._levels.cdf(unshift_sigma(sigma, self._shift).clamp(0, 1))


def check_sampling(name: str) -> None:
    """Raise ValueError listing the legal names unless `name` is a sampling."""
    if name not in SAMPLINGS:
        raise ValueError(f"unknown sampling {name!r}; legal: {', '.join(SAMPLINGS)}")


def check_interval(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise ValueError unless 0 <= low < high <= 1."""
    for name, value in ((low_name, low), (high_name, high)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if not low < high:
        raise ValueError(f"{low_name} must be below {high_name}, got {low} and {high}: the window is empty")


def _open_uniform(generator: torch.Generator) -> Tensor:
    # (k + 1/2)/2^52 is exact in float64 and never 0 or 1, where quantiles are infinite.
    ticks = torch.randint(0, 2**52, (), generator=generator, dtype=torch.int64, device="cpu")
    return (ticks.double() + 0.5) / 2**52


def _invert(rising: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return x in [0, 1] with rising(x) = values, by bisection to float64's last bits."""
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(60):
        middle = (low + high) / 2
        under = rising(middle) < values
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (low + high) / 2


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _next_below(value: float) -> float:
    return _next_towards(value, -math.inf)


def _next_above(value: float) -> float:
    return _next_towards(value, math.inf)


def _next_towards(value: float, end: float) -> float:
    pair = torch.tensor([value, end], dtype=torch.float32, device="cpu")
    return float(torch.nextafter(pair[0], pair[1]))
