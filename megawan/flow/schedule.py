"""The shifted sigma grid of Wan and the scheduler that trains and samples on it (specification §3)."""

import math

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

    x0, noise [B, ...] of one shape; sigma float32, 0-dim or [1] for all samples or [B] for one each. Factors
    are float32 (float64 for float64 inputs); for bf16 each product and the sum are rounded to bf16, as the
    reference does.
    Raises ValueError for shapes that do not fit.
    """
    _same_shape("x0", x0, "noise", noise)
    sigma = _per_sample("sigma", sigma, x0).to(_arithmetic(x0))
    return _scale(1 - sigma, x0) + _scale(sigma, noise)


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
        self.sigmas = _nothing()
        self.timesteps = _nothing()
        self.training_weights = _nothing()
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
        weights = self._weighting(sigmas) if training else _nothing()
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
        _same_shape("x0", x0, "noise", noise)
        return noise - x0

    def step(self, v: Tensor, timestep: Tensor | float, x_t: Tensor, to_final: bool = False) -> Tensor:
        """Return x_t + (sigma_next − sigma)·v, one Euler step down the grid (specification §3.2.2).

        sigma_next is the next grid point, and 0 after the last one or with `to_final`. v, x_t [B, ...].
        Raises ValueError for shapes that do not fit or a timestep that is not finite.
        """
        _same_shape("v", v, "x_t", x_t)
        ids = self.nearest_id(timestep)
        following = torch.cat([self.sigmas[1:], self.sigmas.new_zeros(1)])
        sigma = _per_sample("timestep", self.sigmas[ids], x_t).to(_arithmetic(x_t))
        sigma_next = _per_sample("timestep", following[ids], x_t).to(_arithmetic(x_t))
        return x_t + _scale(-sigma if to_final else sigma_next - sigma, v)

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
    # bool: in `set_timesteps(1000, 1.0, True)` the third place is the shift, and True would quietly mean
    # shift 1.
    if isinstance(shift, (bool, str)) or not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a finite number above 0 (Wan trains with 5), got {shift!r}")


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(factor: Tensor, x: Tensor) -> Tensor:
    return (factor * x.to(factor.dtype)).to(x.dtype)


def _same_shape(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    for name, x in ((first_name, first), (second_name, second)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")


def _per_sample(name: str, value: Tensor, x: Tensor) -> Tensor:
    """Return `value` (0-dim, [1] or [B]) on x's device in a shape that broadcasts over x [B, ...]."""
    if value.ndim == 0:
        return value.to(x.device)
    if value.ndim > 1 or x.ndim == 0 or len(value) not in (1, len(x)):
        raise ValueError(
            f"{name} must be one number or one per sample, got shape {list(value.shape)} for a batch of "
            f"shape {list(x.shape)}"
        )
    return value.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
