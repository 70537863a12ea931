"""Sampling: Euler steps down the sigma grid, with guidance, a clean first frame and two experts."""

from collections.abc import Callable

from torch import Tensor

from megawan.flow.conditioning import put_clean_frames
from megawan.flow.schedule import MAX_TIMESTEP, FlowMatchScheduler, interpolate

# (x_t [B, C, T, H, W], timestep float32 [B]) -> velocity [B, C, T, H, W]
Velocity = Callable[[Tensor, Tensor], Tensor]
# (steps done, steps in all)
Progress = Callable[[int, int], None]


def guide(v_pos: Tensor, v_neg: Tensor, guidance: float) -> Tensor:
    """Return v_neg + g·(v_pos − v_neg) with g = `guidance` (classifier-free guidance; 1 gives v_pos)."""
    return v_neg + guidance * (v_pos - v_neg)


def guided(positive: Velocity, negative: Velocity, guidance: float) -> Velocity:
    """Return the velocity function that calls both and guides; with guidance 1 it is `positive` alone."""
    if guidance == 1:
        return positive

    def velocity(x_t: Tensor, timestep: Tensor) -> Tensor:
        return guide(positive(x_t, timestep), negative(x_t, timestep), guidance)

    return velocity


def euler_sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int = 50,
    shift: float = 5.0,
    strength: float = 1.0,
    x0: Tensor | None = None,
    clean: Tensor | None = None,
    low_noise: Velocity | None = None,
    boundary: float | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the sample at sigma = 0: x ← x + (sigma_next − sigma)·v down the grid (specification §3.2.2).

    noise [B, C, T, H, W] sets dtype and device of x; v is taken into that dtype, so give float32 noise.
    - strength < 1 starts from (1 − sigma)·x0 + sigma·noise at the grid's first sigma and needs `x0`.
    - clean [B or 1, C, >= 1, H, W] (ti2v): latent frame 0 of x is set to it before the first and after every
      step.
    - low_noise and boundary (A14B): `velocity` is the high-noise expert, asked while timestep >=
      1000·boundary, then `low_noise`. Each may be `guided` with its own scale. Boundaries:
      megawan.flow.sampling.EXPERT_BOUNDARIES.
    - progress(done, steps) is called after every step.
    Raises ValueError for illegal steps, shift, strength, boundary, or shapes that do not fit.
    """
    if (low_noise is None) != (boundary is None):
        raise ValueError("low_noise and boundary belong together: give both (two experts) or neither")
    if boundary is not None and not 0 <= boundary <= 1:
        raise ValueError(
            f"boundary is a sigma in [0, 1] (0.875 for T2V-A14B, 0.9 for I2V-A14B), got {boundary}"
        )
    if (strength < 1) != (x0 is not None):
        raise ValueError(
            f"strength below 1 and x0 belong together, got strength {strength} and x0 {_said(x0)}"
        )
    scheduler = FlowMatchScheduler(shift)
    scheduler.set_timesteps(steps, strength)

    x = noise if x0 is None else interpolate(x0.to(noise), noise, scheduler.sigmas[0])
    if clean is not None:
        x = put_clean_frames(x, clean)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        expert = velocity
        if low_noise is not None and boundary is not None and not timestep >= MAX_TIMESTEP * boundary:
            expert = low_noise
        v = expert(x, timestep.expand(len(x)).to(x.device))
        x = scheduler.step(v.to(x), timestep, x)
        if clean is not None:
            x = put_clean_frames(x, clean)
        if progress is not None:
            progress(done, steps)
    return x


def _said(x0: Tensor | None) -> str:
    return "none" if x0 is None else "given"
