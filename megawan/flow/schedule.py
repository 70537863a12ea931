"""The shifted sigma grid of Wan and the scheduler that trains and samples on it (specification §3)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megawan.flow.weighting import get_weighting

MAX_TIMESTEP = 1000  # timestep = 1000·sigma


def shifted_sigmas(steps: int, shift: float, strength: float = 1.0) -> Tensor:
    """Return the descending sigma grid k·s / (1 + (k − 1)·s), float32 [steps] (specification §3.1.3).

    s = linspace(strength, 0, steps + 1)[:-1] and k = shift, so sigma = 0 is never in the grid. Computed on
    the CPU in float32, in the reference's order of operations.
    Raises ValueError if steps < 1, shift <= 0, or strength is outside (0, 1].
    """
    check_steps(steps)
    check_shift(shift)
    if not 0 < strength <= 1:
        raise ValueError(f"denoising strength must be in (0, 1], got {strength}")
    # An explicit device: a caller's `with torch.device(...)` must not move or fake the tables.
    raw = torch.linspace(strength, 0.0, steps + 1, dtype=torch.float32, device="cpu")[:-1]
    return shift_level(raw, shift)


def shift_level(raw: Tensor, shift: float) -> Tensor:
    """Return sigma = k·s / (1 + (k − 1)·s) for the unshifted level s = `raw` and k = `shift`."""
    return shift * raw / (1 + (shift - 1) * raw)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return the unshifted level s = sigma / (sigma + k·(1 − sigma)), the inverse of `shift_level`."""
    return sigma / (sigma + shift * (1 - sigma))


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = (1 − sigma)·x0 + sigma·noise in the dtype of x0 and noise (specification §3.2.1).

    x0, noise [B, ...] of one shape; sigma on the CPU, 0-dim or [1] for all samples, or [B] for one each.
    In float64 for float64 inputs. For bf16 the rounding is the reference's: see `_per_sample`.
    Raises ValueError for shapes that do not fit.
    """
    _check_pair("x0", x0, "noise", noise)
    return _per_sample(lambda s, x0, noise: (1 - s) * x0 + s * noise, sigma, x0, noise)


class FlowMatchScheduler:
    """The grid of timesteps with noising, target, weights and the Euler step.

    Attributes, all float32 on the CPU: `sigmas` [N] descending, `timesteps` [N] = 1000·sigmas,
    `training_weights` [N] (empty unless `set_timesteps(..., training=True)`). Positional arguments are in the
    order of DiffSynth's scheduler.
    A timestep is a number, a 0-dim or [1] tensor for the whole batch, or [B], one per sample; it means the
    grid point nearest to it (the first of two equally near), at any distance. It is looked up on the CPU.
    """

    def __init__(self, shift: float = 5.0, *, weighting: str = "gaussian") -> None:
        """Raises ValueError if shift <= 0 or for an unknown weighting."""
        check_shift(shift)
        self.shift = shift
        self.training = False
        self.sigmas = _no_table()
        self.timesteps = _no_table()
        self.training_weights = _no_table()
        self._weighting = get_weighting(weighting)

    def set_timesteps(
        self,
        num_steps: int,
        denoising_strength: float = 1.0,
        shift: float | None = None,
        training: bool = False,
    ) -> None:
        """Build the grid, and in training its weights; `shift` replaces the constructor's this once.

        Raises ValueError if num_steps < 1 (< 2 in training with gaussian weights), shift <= 0,
        denoising_strength is outside (0, 1], or every weight would be 0. The old grid then stays.
        """
        sigmas = shifted_sigmas(num_steps, self.shift if shift is None else shift, denoising_strength)
        weights = self._weighting(sigmas) if training else _no_table()
        self.sigmas, self.timesteps, self.training_weights = sigmas, sigmas * MAX_TIMESTEP, weights
        self.training = training

    def nearest_id(self, timestep: Tensor | float) -> Tensor:
        """Return argmin |timesteps − timestep|, int64 on the CPU, 0-dim or [B] like `timestep`.

        Raises ValueError if a timestep is NaN or infinite, or before `set_timesteps`.
        """
        if len(self.timesteps) == 0:
            raise ValueError("the scheduler has no timesteps yet: call set_timesteps(num_steps) first")
        value = torch.as_tensor(timestep).detach().to("cpu", torch.float32)
        if value.ndim > 1:
            raise ValueError(f"timestep must be a number or of shape [B], got shape {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"timestep must be finite (0 to {MAX_TIMESTEP}), got NaN or infinity")
        return (self.timesteps - value.unsqueeze(-1)).abs().argmin(dim=-1)

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return x_t = (1 − sigma)·x0 + sigma·noise at the grid's sigma, in their dtype (§3.2.1).

        x0, noise [B, C, T, H, W] (any shape that begins with B). Arithmetic as `interpolate` says.
        Raises ValueError for shapes that do not fit or a timestep that is not finite.
        """
        return interpolate(x0, noise, self.sigmas[self.nearest_id(timestep)])

    def training_target(self, x0: Tensor, noise: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return target = noise − x0, in their dtype; `timestep` changes nothing (§3.2.2).

        Raises ValueError if the shapes differ.
        """
        _check_pair("x0", x0, "noise", noise)
        return noise - x0

    def step(self, v: Tensor, timestep: Tensor | float, x_t: Tensor, to_final: bool = False) -> Tensor:
        """Return x_t + (sigma_next − sigma)·v, one Euler step down the grid (specification §3.2.2).

        sigma_next is the next grid point, and 0 after the last one or with `to_final`. v, x_t [B, ...].
        Raises ValueError for shapes that do not fit or a timestep that is not finite.
        """
        _check_pair("v", v, "x_t", x_t)
        ids = self.nearest_id(timestep)
        sigmas = self.sigmas.double()  # exact differences; `_per_sample` rounds them once
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        change = -sigmas[ids] if to_final else following[ids] - sigmas[ids]
        return _per_sample(lambda c, v, x_t: x_t + v * c, change, v, x_t)

    def training_weight(self, timestep: Tensor | float) -> Tensor:
        """Return w of the nearest grid point, float32 on the CPU, shaped like `timestep` (§4.4).

        Raises ValueError if the grid was not made for training or a timestep is not finite.
        """
        ids = self.nearest_id(timestep)
        if not self.training:
            raise ValueError(
                "the scheduler has no training weights: call set_timesteps(num_steps, training=True)"
            )
        return self.training_weights[ids]


def check_steps(steps: int) -> None:
    """Raise ValueError unless `steps` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of timesteps must be a whole number of at least 1, got {steps!r}")


def check_shift(shift: float) -> None:
    """Raise ValueError unless `shift` is a finite number above 0."""
    # A bool is a number, and in `set_timesteps(1000, 1.0, True)` the third place is the shift: not shift 1.
    try:
        legal = not isinstance(shift, bool) and math.isfinite(shift) and shift > 0
    except TypeError:
        legal = False
    if not legal:
        raise ValueError(f"shift must be a finite number above 0 (Wan trains with 5), got {shift!r}")


def _no_table() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")


def _check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    for name, x in ((first_name, first), (second_name, second)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")


def _per_sample(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor], factor: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return formula(factor, first, second), with one factor for the whole batch or one per sample [B]."""
    if factor.ndim > 1 or first.ndim == 0 or factor.numel() not in (1, len(first)):
        raise ValueError(
            f"the timestep must be one number or one per sample, got shape {list(factor.shape)} for a batch "
            f"of shape {list(first.shape)}"
        )
    if first.dtype in (torch.float32, torch.float64):
        shape = (-1, *[1] * (first.ndim - 1))
        return formula(factor.to(first.device, first.dtype).reshape(shape), first, second)
    # In the reference the factor is a 0-dim float32 tensor on the CPU. How torch multiplies a bf16 tensor by
    # it (rounding the factor first, or not) differs between left and right, and may between devices: do that.
    factors = factor.to("cpu", torch.float32).reshape(-1).expand(len(first))
    return torch.stack([formula(*each) for each in zip(factors, first, second, strict=True)])
