"""The grid, its weights, and the scheduler's four verbs: published numbers, closed forms, identities."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megawan.flow.schedule import FlowMatchScheduler, interpolate, shift_level, shifted_sigmas, unshift_sigma
from tests.flow import reference

GOLDEN = json.loads((Path(__file__).parent / "golden/wan_flow_reference.json").read_text("utf-8"))
# From the facts about the reference implementation (float32): (N, shift) -> index -> (t or None, w)
PUBLISHED_WEIGHTS = {
    (1000, 5): {
        0: 0.0,
        1: 0.001281451,
        250: 0.397951663,
        500: 1.024861932,
        833: 2.076400280,
        999: 0.031879012,
    },
    (1000, 8): {0: 0.0, 1: 0.000953638, 250: 0.304258, 500: 0.832399, 889: 2.472610, 999: 0.060555},
    (1000, 12): {0: 0.0, 1: 0.000761296, 250: 0.246370, 500: 0.696171, 923: 2.959693, 999: 0.108285},
    (50, 1): {0: 0.0973772, 1: 0.1947545, 25: 1.6774938, 49: 0.1947545},
}
SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0]


def scheduler(steps: int = 1000, shift: float = 5.0, strength: float = 1.0) -> FlowMatchScheduler:
    made = FlowMatchScheduler(shift)
    made.set_timesteps(steps, strength, training=steps > 1)
    return made


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_number_of_the_reference(name: str) -> None:
    golden = GOLDEN[name]
    steps, shift = (int(part.lstrip("Nshift")) for part in name.split("_"))
    flow = scheduler(steps, shift)
    assert flow.sigmas.dtype == flow.timesteps.dtype == flow.training_weights.dtype == torch.float32
    for table, expected in ((flow.sigmas, golden["sigmas"]), (flow.timesteps, golden["timesteps"])):
        assert table[golden["ids"]].tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    assert flow.training_weights[golden["ids"]].tolist() == pytest.approx(golden["weights"], rel=0, abs=2e-6)
    assert float(flow.training_weights.sum()) == pytest.approx(golden["weight_sum"], abs=1e-3)
    assert float(flow.training_weights.max()) == pytest.approx(golden["weight_max"], abs=2e-6)
    assert int(flow.training_weights.argmax()) == golden["weight_argmax"]


@pytest.mark.parametrize(("steps", "shift"), sorted(PUBLISHED_WEIGHTS))
def test_published_weights(steps: int, shift: float) -> None:
    flow = scheduler(steps, shift)
    for index, weight in PUBLISHED_WEIGHTS[steps, shift].items():
        assert float(flow.training_weights[index]) == pytest.approx(weight, abs=2e-6)


def test_half_strength_starts_lower_and_turns_the_zero_weight_round() -> None:
    flow = scheduler(1000, 5.0, strength=0.5)
    assert float(flow.timesteps[0]) == pytest.approx(833.333313, rel=1e-6)
    assert float(flow.timesteps[-1]) == pytest.approx(2.495010, rel=1e-6)
    assert float(flow.training_weights[999]) == 0
    assert float(flow.training_weights[0]) == pytest.approx(0.65147, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(2, 1500),
    shift=st.floats(0.2, 20),
    strength=st.floats(0.05, 1),
)
def test_any_grid_is_the_closed_form(steps: int, shift: float, strength: float) -> None:
    grid = reference.sigmas(steps, shift, strength)
    ours = shifted_sigmas(steps, shift, strength)
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(grid, rel=2e-6)
    assert bool((ours.diff() < 0).all()) and float(ours[-1]) > 0
    flow = FlowMatchScheduler(1.0)
    flow.set_timesteps(steps, strength, shift)  # the shift of the call replaces the constructor's
    assert torch.equal(flow.sigmas, ours)
    assert flow.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in grid], rel=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.sampled_from([2, 3, 50, 999, 1000, 1001]), shift=st.floats(0.5, 16), strength=st.floats(0.6, 1)
)
def test_any_weight_table_is_the_closed_form(steps: int, shift: float, strength: float) -> None:
    flow = scheduler(steps, shift, strength)
    # The closed form on the float32 grid: with few points, all about as far from 0.5, rounding of the bell is
    # magnified by 1/sum(u), so allow for one float32 rounding of y in each u.
    grid = flow.sigmas.double().tolist()
    bell = [math.exp(-2 * (sigma - 0.5) ** 2) for sigma in grid]
    magnified = 1.2e-7 * 4 * steps / sum(y - min(bell) for y in bell)
    expected = reference.gaussian_weights(grid)
    assert flow.training_weights.tolist() == pytest.approx(expected, rel=1e-5, abs=max(2e-6, magnified))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [10, 50, 999, 1000, 1001])
def test_the_weights_sum_to_n_plus_the_added_constant(steps: int, shift: float) -> None:
    flow = scheduler(steps, shift)
    weights = flow.training_weights.double()
    added = 0.0 if steps == 1000 else float(weights[0])  # w[0] is 0 before the constant is added
    assert float(weights.sum()) == pytest.approx(steps * (1 + added), rel=1e-5)
    assert float(weights.min()) == float(weights[0])
    if steps != 1000:
        assert float(weights[1]) == pytest.approx(2 * added, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(0.1, 20), level=st.floats(1e-6, 1))
def test_unshifting_undoes_the_shift(shift: float, level: float) -> None:
    raw = torch.tensor(level, dtype=torch.float64)
    assert float(unshift_sigma(shift_level(raw, shift), shift)) == pytest.approx(level, rel=1e-12)


def test_the_nearest_timestep_is_found_and_the_first_of_two_wins() -> None:
    flow = scheduler()
    asked = {
        999.0: 5,
        900.0: 357,
        875.0: 417,
        750.0: 625,
        250.0: 937,
        100.0: 978,
        0.0: 999,
        -7.0: 999,
        2000.0: 0,
    }
    assert flow.nearest_id(torch.tensor(list(asked))).tolist() == list(asked.values())
    assert [int(flow.nearest_id(t)) for t in asked] == list(asked.values())
    tied = scheduler(4, 1.0)  # 1000, 750, 500, 250
    assert tied.nearest_id(torch.tensor([875.0, 625.0, 375.0])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_batch_is_looked_up_like_each_scalar(shift: float) -> None:
    flow = scheduler(1000, shift)
    # Rounded timesteps are where ties happen.
    asked = torch.cat([flow.timesteps.bfloat16().float(), torch.linspace(-10, 1010, 301)])
    alone = [int(torch.argmin((flow.timesteps - t).abs())) for t in asked]
    assert flow.nearest_id(asked).tolist() == alone
    assert torch.equal(flow.training_weight(asked), flow.training_weights[alone])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(2, 4, 3, 2, 3, 2, generator=generator, dtype=torch.float64)
    return draw[0], draw[1]


@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_target_and_sigma_give_the_clean_sample_back(
    shift: float, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x0, noise = pair
    flow = scheduler(1000, shift)
    timestep = flow.timesteps[[0, 1, 700, 999]]
    x_t = flow.add_noise(x0, noise, timestep)
    target = flow.training_target(x0, noise, timestep)
    sigma = flow.sigmas[[0, 1, 700, 999]].double().view(4, 1, 1, 1, 1)
    assert torch.allclose(x_t - sigma * target, x0, rtol=0, atol=1e-14)
    assert torch.allclose(x_t + (1 - sigma) * target, noise, rtol=0, atol=1e-14)
    assert torch.equal(target, flow.training_target(x0, noise))


def test_a_batch_is_noised_like_its_samples(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    flow = scheduler()
    timestep = torch.tensor([1000.0, 801.3, 500.0, 3.0])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x0, noise = (x.to(dtype) for x in pair)
        batch = flow.add_noise(x0, noise, timestep)
        stepped = flow.step(noise, timestep, x0)
        final = flow.step(noise, timestep, x0, to_final=True)
        assert batch.dtype == stepped.dtype == final.dtype == dtype
        for i, t in enumerate(timestep):
            alone = x0[i : i + 1], noise[i : i + 1]
            for one in (t, t[None], float(t)):
                assert torch.equal(batch[i], flow.add_noise(*alone, one)[0])
                assert torch.equal(stepped[i], flow.step(alone[1], one, alone[0])[0])
                assert torch.equal(final[i], flow.step(alone[1], one, alone[0], to_final=True)[0])
        shared = flow.add_noise(x0, noise, timestep[:1])
        assert torch.equal(shared, flow.add_noise(x0, noise, 1000.0))


def test_euler_steps_walk_the_line_to_the_clean_sample(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    flow = scheduler(7, 3.0)
    x = flow.add_noise(x0, noise, flow.timesteps[0])
    for index, timestep in enumerate(flow.timesteps):
        assert torch.allclose(x, interpolate(x0, noise, flow.sigmas[index]), rtol=0, atol=1e-14)
        assert torch.allclose(flow.step(noise - x0, timestep, x, to_final=True), x0, rtol=0, atol=1e-14)
        x = flow.step(noise - x0, timestep, x)
    assert torch.allclose(x, x0, rtol=0, atol=1e-14)


def test_float32_matches_float64_closely(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    flow = scheduler()
    exact = flow.add_noise(x0, noise, 612.5)
    assert torch.allclose(flow.add_noise(x0.float(), noise.float(), 612.5).double(), exact, rtol=0, atol=1e-6)


def test_a_grid_is_built_on_the_cpu_in_float32_whatever_the_defaults() -> None:
    plain = scheduler()
    with torch.device("meta"):
        flow = scheduler()
    assert torch.equal(flow.sigmas, plain.sigmas) and torch.equal(
        flow.training_weights, plain.training_weights
    )
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(scheduler().sigmas, plain.sigmas)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shift", [0, -1.0, math.nan, math.inf, True, "5", None])
def test_an_illegal_shift_is_refused(shift: object) -> None:
    with pytest.raises(ValueError, match="shift must be a finite number above 0"):
        FlowMatchScheduler(shift)  # type: ignore[arg-type]
    if shift is not None:  # there None means the constructor's
        with pytest.raises(ValueError, match="shift must be a finite number above 0"):
            FlowMatchScheduler().set_timesteps(10, 1.0, shift)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None])
def test_an_illegal_number_of_steps_is_refused(steps: object) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        FlowMatchScheduler().set_timesteps(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, math.nan])
def test_an_illegal_strength_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be in \(0, 1\]"):
        FlowMatchScheduler().set_timesteps(10, strength)


def test_grids_without_a_usable_weight_table_are_refused_and_change_nothing() -> None:
    flow = scheduler(10)
    before = flow.training_weights
    with pytest.raises(ValueError, match="at least 2 timesteps, got 1"):
        flow.set_timesteps(1, training=True)
    assert flow.training_weights is before and len(flow.sigmas) == 10
    with pytest.raises(ValueError, match="0 everywhere"):
        flow.set_timesteps(5, shift=1e12, training=True)  # float32 sigmas are all 1
    flow.set_timesteps(1)
    assert flow.timesteps.tolist() == [1000.0]


@pytest.mark.parametrize("timestep", [math.nan, math.inf, -math.inf])
def test_a_timestep_that_is_no_number_is_refused(timestep: float) -> None:
    flow = scheduler(10)
    x = torch.zeros(2, 1, 1, 1, 1)
    for call in (
        lambda t: flow.add_noise(x, x, t),
        lambda t: flow.step(x, t, x),
        lambda t: flow.training_weight(t),
    ):
        for given_as in (timestep, torch.tensor(timestep), torch.tensor([500.0, timestep])):
            with pytest.raises(ValueError, match="timestep must be finite"):
                call(given_as)


def test_shapes_that_do_not_fit_are_refused() -> None:
    flow = scheduler(10)
    x = torch.zeros(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="x0 and noise must have one shape"):
        flow.add_noise(x, x[:1], 500.0)
    with pytest.raises(ValueError, match="x0 and noise must have one shape"):
        flow.training_target(x, x[:1])
    with pytest.raises(ValueError, match="v and x_t must have one shape"):
        flow.step(x, 500.0, x[:1])
    with pytest.raises(ValueError, match="one number or one per sample, got shape \\[3\\]"):
        flow.add_noise(x, x, torch.full((3,), 500.0))
    with pytest.raises(ValueError, match=r"of shape \[B\], got shape \[2, 1\]"):
        flow.training_weight(torch.full((2, 1), 500.0))
    with pytest.raises(ValueError, match="floating-point"):
        flow.add_noise(x.long(), x.long(), 500.0)


def test_calls_out_of_order_say_what_is_missing() -> None:
    flow = FlowMatchScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        flow.nearest_id(500.0)
    flow.set_timesteps(10)
    with pytest.raises(ValueError, match="training=True"):
        flow.training_weight(500.0)
