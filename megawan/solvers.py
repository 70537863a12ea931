"""Ways down the noise levels: the specification's Euler steps, or diffusers' multistep solvers as Wan uses
them."""

from typing import Any, Literal, get_args

from torch import Tensor

from megawan.flow.conditioning import put_clean_frames
from megawan.flow.schedule import MAX_TIMESTEP
from megawan.flow.solver import Progress, Velocity, euler_sample

Solver = Literal["euler", "unipc", "dpm++"]
SOLVERS: tuple[str, ...] = get_args(Solver)


def integrate(
    velocity: Velocity,
    noise: Tensor,
    *,
    solver: Solver,
    steps: int,
    shift: float,
    clean: Tensor | None = None,
    low_noise: Velocity | None = None,
    boundary: float | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the sample at sigma = 0 that starts from noise [B, C, T, H, W], float32.

    Arguments as `euler_sample`'s. unipc and dpm++ are diffusers' second-order solvers on the same shifted
    levels (their first is just below 1), as the model's authors sample. Raises ValueError as it does, and for
    an unknown solver.
    """
    if solver == "euler":
        return euler_sample(
            velocity,
            noise,
            steps=steps,
            shift=shift,
            clean=clean,
            low_noise=low_noise,
            boundary=boundary,
            progress=progress,
        )
    scheduler = multistep(solver, shift)
    scheduler.set_timesteps(steps)
    x = noise if clean is None else put_clean_frames(noise, clean)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        expert = velocity
        if low_noise is not None and boundary is not None and not timestep >= MAX_TIMESTEP * boundary:
            expert = low_noise
        v = expert(x, timestep.float().expand(len(x)).to(x.device))
        x = scheduler.step(v.to(x), timestep, x, return_dict=False)[0]
        if clean is not None:
            x = put_clean_frames(x, clean)
        if progress is not None:
            progress(done, steps)
    return x


def multistep(solver: str, shift: float) -> Any:
    """Return diffusers' scheduler of this name for flow matching. Raises ValueError for an unknown one."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # seconds

    common = {
        "num_train_timesteps": int(MAX_TIMESTEP),
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
    }
    if solver == "unipc":
        return UniPCMultistepScheduler(**common)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **common)
    raise ValueError(f"there is no solver {solver!r}; legal: {', '.join(SOLVERS)}")
