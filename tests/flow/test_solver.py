"""Euler sampling: exact on straight lines, guidance, the clean frame, the two experts."""

import pytest
import torch

from megawan.flow.sampling import EXPERT_BOUNDARIES, expert_window
from megawan.flow.schedule import FlowMatchScheduler, shifted_sigmas
from megawan.flow.solver import euler_sample, guide, guided

SHAPE = (2, 3, 4, 2, 2)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return draw[0], draw[1]


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0, 16.0])
def test_a_straight_line_ends_at_the_clean_sample(
    steps: int, shift: float, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x0, noise = pair
    constant = euler_sample(lambda x, t: noise - x0, noise, steps=steps, shift=shift)
    assert torch.allclose(constant, x0, rtol=0, atol=1e-13)

    def towards_x0(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (x - x0) / (timestep.double() / 1000).view(-1, 1, 1, 1, 1)

    assert torch.allclose(euler_sample(towards_x0, noise, steps=steps, shift=shift), x0, rtol=0, atol=1e-6)
    single = euler_sample(lambda x, t: (noise - x0).float(), noise.float(), steps=steps, shift=shift)
    assert single.dtype == torch.float32
    assert torch.allclose(
        single.double(), x0, rtol=0, atol=1e-5
    )  # up to 50 float32 roundings of values near 3


def test_a_curved_field_is_integrated_to_first_order(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, noise = pair
    # dx/dsigma = x from sigma 1 to 0 gives x·e^-1; the error of Euler falls like 1/steps.
    errors = [
        float((euler_sample(lambda x, t: x, noise, steps=steps, shift=1.0) - noise * torch.e**-1).abs().max())
        for steps in (20, 40, 80)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.06)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.03)


def test_it_walks_the_schedulers_timesteps_with_its_step(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = (x.float() for x in pair)
    seen: list[torch.Tensor] = []
    ticks: list[tuple[int, int]] = []

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(timestep)
        return torch.sin(x) + timestep.view(-1, 1, 1, 1, 1) / 1000

    made = euler_sample(
        velocity, noise, steps=9, shift=8.0, progress=lambda done, steps: ticks.append((done, steps))
    )
    scheduler = FlowMatchScheduler(8.0)
    scheduler.set_timesteps(9)
    assert all(t.shape == (2,) and t.dtype == torch.float32 for t in seen)
    assert torch.equal(torch.stack(seen)[:, 0], scheduler.timesteps)
    assert ticks == [(i, 9) for i in range(1, 10)]
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.sin(x) + timestep / 1000, timestep, x)
    assert torch.allclose(made, x, rtol=0, atol=1e-6)


def test_strength_starts_between_the_sample_and_noise(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    first: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        first.append(x)
        return noise - x0

    made = euler_sample(velocity, noise, steps=5, shift=3.0, strength=0.4, x0=x0)
    sigma = float(shifted_sigmas(5, 3.0, 0.4)[0])
    assert torch.allclose(first[0], (1 - sigma) * x0 + sigma * noise, rtol=0, atol=1e-14)
    assert torch.allclose(made, x0, rtol=0, atol=1e-13)


def test_guidance_is_the_negative_plus_a_multiple_of_the_difference(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    pos, neg = pair
    assert torch.allclose(guide(pos, neg, 4.0), neg + 4 * (pos - neg))
    assert torch.allclose(guide(pos, neg, 1.0), pos) and torch.equal(guide(pos, neg, 0.0), neg)
    calls: list[str] = []

    def positive(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        calls.append("positive")
        return pos

    def negative(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        calls.append("negative")
        return neg

    timestep = torch.ones(2)
    assert torch.equal(guided(positive, negative, 3.0)(pos, timestep), guide(pos, neg, 3.0))
    assert calls == ["positive", "negative"]
    assert guided(positive, negative, 1.0)(pos, timestep) is pos
    assert calls == ["positive", "negative", "positive"], "no second forward without guidance"


def test_the_first_frame_stays_clean_at_every_step(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    clean = x0[:1, :, :1]  # one image for the whole batch
    seen: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return noise - x0

    untouched = noise.clone()
    made = euler_sample(velocity, noise, steps=4, clean=clean)
    for x in (*seen, made):
        assert torch.equal(x[:, :, :1], clean.expand(2, -1, -1, -1, -1))
    assert torch.allclose(made[:, :, 1:], x0[:, :, 1:], rtol=0, atol=1e-13)
    assert torch.equal(noise, untouched)


@pytest.mark.parametrize("model", sorted(EXPERT_BOUNDARIES))
@pytest.mark.parametrize(("steps", "shift"), [(40, 12.0), (40, 5.0), (50, 3.0), (20, 1.0)])
def test_each_expert_is_asked_for_the_timesteps_it_trains_on(model: str, steps: int, shift: float) -> None:
    asked: list[str] = []
    noise = torch.zeros(1, 1, 1, 1, 1)

    def expert(name: str, value: float):  # type: ignore[no-untyped-def]
        def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            asked.append(name)
            return torch.full_like(x, value)

        return velocity

    boundary = EXPERT_BOUNDARIES[model]
    made = euler_sample(
        expert("high", 1.0), noise, steps=steps, shift=shift, low_noise=expert("low", 10.0), boundary=boundary
    )
    sigmas = shifted_sigmas(steps, shift)
    high = expert_window(sigmas, f"{model}-high").stop
    assert asked == ["high"] * high + ["low"] * (steps - high)
    switch = float(sigmas[high]) if high < steps else 0.0
    assert float(made) == pytest.approx((switch - 1) * 1.0 + (0 - switch) * 10.0, rel=1e-5)


def test_how_many_steps_the_experts_of_the_official_settings_take() -> None:
    for boundary, shift, high in ((0.9, 12.0, 23), (0.875, 12.0, 26), (0.9, 5.0, 15), (0.875, 5.0, 17)):
        calls = [0, 0]

        def first(x: torch.Tensor, timestep: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls[0] += 1
            return x

        def second(x: torch.Tensor, timestep: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls[1] += 1
            return x

        euler_sample(
            first, torch.zeros(1, 1, 1, 1, 1), steps=40, shift=shift, low_noise=second, boundary=boundary
        )
        assert calls == [high, 40 - high]


def test_illegal_sampling_is_refused() -> None:
    noise = torch.zeros(1, 1, 2, 1, 1)

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x

    for arguments, message in (
        ({"steps": 0}, "whole number of at least 1"),
        ({"shift": 0.0}, "shift must be"),
        ({"strength": 0.5}, "strength below 1 and x0 belong together, got strength 0.5 and x0 none"),
        ({"x0": noise}, "strength below 1 and x0 belong together, got strength 1.0 and x0 given"),
        ({"strength": 0.0, "x0": noise}, "denoising strength must be"),
        ({"boundary": 0.9}, "low_noise and boundary belong together"),
        ({"low_noise": velocity}, "low_noise and boundary belong together"),
        ({"low_noise": velocity, "boundary": 875}, r"boundary is a sigma in \[0, 1\]"),
        ({"clean": noise[:, :, :1].expand(3, -1, -1, -1, -1)}, "clean frames must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            euler_sample(velocity, noise, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="v and x_t must have one shape"):
        euler_sample(lambda x, t: x[:, :, :1], noise)
