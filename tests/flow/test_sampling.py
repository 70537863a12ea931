"""Which sigmas are drawn: windows at any shift, and each distribution against its closed form."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megawan.flow.sampling import (
    EXPERT_BOUNDARIES,
    EXPERTS,
    LevelOptions,
    LevelSampler,
    SigmaSampler,
    SigmaWindow,
    expert_window,
    index_window,
    make_sampler,
    sigma_window,
)
from megawan.flow.schedule import shifted_sigmas
from tests.flow import reference

SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0]
CONTINUOUS = {
    "uniform": LevelOptions(),
    "logit_normal": LevelOptions(logit_mean=-0.4, logit_std=0.8),
    "mode": LevelOptions(mode_scale=1.29),
}
WINDOWS = [(0.0, 1.0), (0.875, 1.0), (0.0, 0.9), (0.3, 0.55)]


def parameters(name: str) -> dict[str, float]:
    options = CONTINUOUS[name]
    return {"mean": options.logit_mean, "std": options.logit_std, "mode_scale": options.mode_scale}


def sampler_of(name: str, shift: float, window: SigmaWindow, steps: int = 1000) -> SigmaSampler:
    options = CONTINUOUS.get(name, LevelOptions())
    return make_sampler(name, options, sigmas=shifted_sigmas(steps, shift), shift=shift, window=window)


def draws(sampler: SigmaSampler, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([sampler.draw(generator) for _ in range(count)])


# How many of 1000 grid points the high-noise expert holds (published for shift 5, counted for the others).
@pytest.mark.parametrize(
    ("shift", "boundary", "count"),
    [(1, 0.875, 126), (1, 0.9, 101), (3, 0.875, 300), (3, 0.9, 251), (5, 0.875, 417), (5, 0.9, 358)]
    + [(12, 0.875, 632), (12, 0.9, 572)],
)
def test_how_many_ids_the_high_noise_expert_has(shift: float, boundary: float, count: int) -> None:
    sigmas = shifted_sigmas(1000, shift)
    window = sigma_window(sigmas, boundary, 1.0)
    assert (window.start, window.stop) == (0, count)
    # The sampler's rule: high where t >= 1000·boundary.
    assert int((sigmas * 1000 >= 1000 * boundary).sum()) == count
    low = sigma_window(sigmas, 0.0, boundary)
    assert (low.start, low.stop) == (count, 1000)


@pytest.mark.parametrize("shift", [*SHIFTS, 16.0, 2.37])
@pytest.mark.parametrize("steps", [20, 40, 50, 1000])
@pytest.mark.parametrize("model", sorted(EXPERT_BOUNDARIES))
def test_experts_train_on_what_sampling_asks_them(model: str, steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift)
    high, low = expert_window(sigmas, f"{model}-high"), expert_window(sigmas, f"{model}-low")
    assert (high.start, high.stop, low.stop) == (0, low.start, steps)
    asked_high = int((sigmas * 1000 >= 1000 * EXPERT_BOUNDARIES[model]).sum())
    assert high.stop == asked_high
    assert low.high < high.low == float(torch.tensor(EXPERT_BOUNDARIES[model], dtype=torch.float32))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 300),
    shift=st.floats(0.1, 20),
    bounds=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_windows_that_share_bounds_share_no_id_and_miss_none(
    steps: int, shift: float, bounds: list[float]
) -> None:
    sigmas = shifted_sigmas(steps, shift)
    edges = [torch.tensor(b, dtype=torch.float32).item() for b in [0.0, *bounds, 1.0]]
    assume(len(set(edges)) == len(edges))  # equal in float32: an empty window, which is refused
    windows = [sigma_window(sigmas, low, high) for low, high in zip(edges, edges[1:], strict=False)]
    ids = [index for window in reversed(windows) for index in range(window.start, window.stop)]
    assert ids == list(range(steps))


@pytest.mark.parametrize(
    ("low", "high", "start", "stop"),
    [
        (0, 0.417, 0, 417),
        (0.417, 1, 417, 1000),
        (0, 0.358, 0, 358),
        (0.358, 1, 358, 1000),
        (0.2, 0.201, 200, 201),
    ],
)
def test_index_fractions_mean_the_references_ids(low: float, high: float, start: int, stop: int) -> None:
    sigmas = shifted_sigmas(1000, 5.0)
    window = index_window(sigmas, low, high)
    assert (window.start, window.stop) == (start, stop)
    inside = (sigmas >= window.low) & (sigmas <= window.high)
    assert inside.nonzero().flatten().tolist() == list(range(start, stop))


def test_at_shift_5_both_forms_mean_the_same_ids() -> None:
    sigmas = shifted_sigmas(1000, 5.0)
    for model, fraction in (("t2v-A14B", 0.417), ("i2v-A14B", 0.358)):
        by_sigma, by_index = expert_window(sigmas, f"{model}-high"), index_window(sigmas, 0, fraction)
        assert (by_sigma.start, by_sigma.stop) == (by_index.start, by_index.stop)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("expert", sorted(EXPERTS))
@pytest.mark.parametrize("name", ["uniform_index", *CONTINUOUS])
def test_every_draw_lies_in_the_window_and_none_is_clamped(name: str, expert: str, shift: float) -> None:
    window = expert_window(shifted_sigmas(1000, shift), expert)
    sigma = draws(sampler_of(name, shift, window), 400)
    low, high = EXPERTS[expert]
    assert sigma.dtype == torch.float32
    assert bool((sigma >= low).all()) and bool((sigma < high if high < 1 else sigma <= high).all())
    # A clamped draw would pile up on a bound; a restricted one almost never hits it.
    _, counts = sigma.unique(return_counts=True)
    most_common = int(counts.max())
    assert most_common <= (20 if name == "uniform_index" else 2)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("low,high", WINDOWS)
@pytest.mark.parametrize("name", sorted(CONTINUOUS))
def test_draws_follow_the_truncated_distribution(name: str, low: float, high: float, shift: float) -> None:
    sampler = sampler_of(name, shift, sigma_window(shifted_sigmas(1000, shift), low, high))
    drawn = draws(sampler, 1500, seed=7).double().sort().values.tolist()
    expected = [reference.truncated_cdf(name, s, low, high, shift, **parameters(name)) for s in drawn]
    steps = [i / len(drawn) for i in range(len(drawn) + 1)]
    distance = max(max(abs(e - steps[i]), abs(e - steps[i + 1])) for i, e in enumerate(expected))
    assert distance < 1.95 / math.sqrt(len(drawn))  # Kolmogorov-Smirnov, 0.1 % level


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("low,high", WINDOWS)
@pytest.mark.parametrize("name", sorted(CONTINUOUS))
def test_the_inverse_cdf_is_exact(name: str, low: float, high: float, shift: float) -> None:
    sampler = sampler_of(name, shift, sigma_window(shifted_sigmas(1000, shift), low, high))
    assert isinstance(sampler, LevelSampler)
    share = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    back = [
        reference.truncated_cdf(name, s, low, high, shift, **parameters(name))
        for s in sampler.at(share).double().tolist()
    ]
    # One float32 rounding of sigma, seen through a density of at most a few dozen.
    assert back == pytest.approx(share.tolist(), abs=1e-5)
    full = [
        reference.level_cdf(name, reference.level_of_sigma(s, shift), **parameters(name)) for s in (low, high)
    ]
    assert sampler.share == pytest.approx(full[1] - full[0], abs=1e-6)


@pytest.mark.parametrize("name", sorted(CONTINUOUS))
def test_the_rarest_draws_stay_inside(name: str) -> None:
    for shift in SHIFTS:
        sigmas = shifted_sigmas(1000, shift)
        for window in (expert_window(sigmas, "t2v-A14B-low"), expert_window(sigmas, "i2v-A14B-high")):
            sampler = sampler_of(name, shift, window)
            assert isinstance(sampler, LevelSampler)
            ends = sampler.at(torch.tensor([2**-53, 1 - 2**-53], dtype=torch.float64))
            assert window.low <= float(ends[0]) < float(ends[1]) <= window.high


def test_uniform_index_draws_every_id_of_the_window_equally_often() -> None:
    sigmas = shifted_sigmas(10, 5.0)
    sampler = sampler_of("uniform_index", 5.0, index_window(sigmas, 0.2, 0.7), steps=10)
    values, counts = draws(sampler, 5000).unique(return_counts=True)
    assert values.tolist() == sorted(sigmas[2:7].tolist())
    assert sum((int(c) - 1000) ** 2 / 1000 for c in counts) < 18.5  # chi-squared, 4 degrees, 0.1 % level
    assert sampler.share == pytest.approx(0.5)
    assert sampler.probability.tolist() == pytest.approx([0, 0, *[0.2] * 5, 0, 0, 0])


@pytest.mark.parametrize("name", ["uniform_index", *CONTINUOUS])
@pytest.mark.parametrize("low,high", WINDOWS)
def test_probability_is_how_often_an_id_is_the_nearest(name: str, low: float, high: float) -> None:
    sigmas = shifted_sigmas(20, 3.0)
    sampler = sampler_of(name, 3.0, sigma_window(sigmas, low, high), steps=20)
    assert float(sampler.probability.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((sampler.probability >= 0).all())
    nearest = (draws(sampler, 3000)[:, None] - sigmas).abs().argmin(dim=1)
    seen = torch.bincount(nearest, minlength=20).double() / 3000
    assert float((seen - sampler.probability).abs().max()) < 0.035


def test_shift_moves_the_logit_normal_by_its_logarithm() -> None:
    whole = SigmaWindow(0.0, 1.0, 0, 1000)
    share = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    samplers = [
        make_sampler(
            "logit_normal",
            LevelOptions(logit_mean=mean),
            sigmas=shifted_sigmas(1000, k),
            shift=k,
            window=whole,
        )
        for mean, k in ((0.3, 5.0), (0.3 + math.log(5.0), 1.0))
    ]
    first, second = (s.at(share) for s in samplers if isinstance(s, LevelSampler))
    assert torch.allclose(first, second, rtol=1e-6)


def test_a_draw_depends_on_its_generator_alone() -> None:
    for name in ("uniform_index", *CONTINUOUS):
        sampler = sampler_of(name, 5.0, SigmaWindow(0.0, 1.0, 0, 1000))
        first = draws(sampler, 3, seed=1)
        draws(sampler, 5, seed=2)
        assert torch.equal(first, draws(sampler, 3, seed=1))


def test_a_grid_that_rounds_past_one_keeps_its_first_id() -> None:
    sigmas = shifted_sigmas(10, 0.2)
    assert float(sigmas[0]) > 1  # the float32 arithmetic of the reference at this shift
    assert sigma_window(sigmas, 0.5, 1.0).start == 0
    sampler = sampler_of("uniform", 0.2, sigma_window(sigmas, 0.5, 1.0), steps=10)
    assert float(sampler.probability.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-0.1, 1.0, "min_sigma must be in \\[0, 1\\], got -0.1"),
        (0.0, 1.1, "max_sigma must be in \\[0, 1\\], got 1.1"),
        (math.nan, 1.0, "min_sigma must be in"),
        (0.9, 0.9, "min_sigma must be below max_sigma"),
        (0.9, 0.1, "min_sigma must be below max_sigma"),
        (0.5, 0.5 + 1e-12, "holds no float32 number"),
    ],
)
def test_an_illegal_sigma_window_is_refused(low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigma_window(shifted_sigmas(1000, 5.0), low, high)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-0.1, 1.0, "min_timestep_boundary must be in"),
        (0.0, 2.0, "max_timestep_boundary must be in"),
        (0.5, 0.5, "must be below"),
        (0.4171, 0.4179, "holds none of the 1000 timesteps"),
    ],
)
def test_an_illegal_index_window_is_refused(low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_window(shifted_sigmas(1000, 5.0), low, high)


def test_a_window_between_two_grid_points_suits_continuous_draws_only() -> None:
    window = sigma_window(shifted_sigmas(1000, 5.0), 0.8751, 0.8752)
    assert window.start == window.stop
    with pytest.raises(ValueError, match="empty: none of the 1000 timesteps"):
        sampler_of("uniform_index", 5.0, window)
    sigma = draws(sampler_of("uniform", 5.0, window), 50)
    assert bool(((sigma >= 0.8751) & (sigma < 0.8752)).all())


def test_a_window_that_is_never_hit_is_refused() -> None:
    window = sigma_window(shifted_sigmas(1000, 1.0), 0.999, 1.0)
    with pytest.raises(ValueError, match="of this sampling's draws"):
        make_sampler(
            "logit_normal",
            LevelOptions(-3.0, 0.5),
            sigmas=shifted_sigmas(1000, 1.0),
            shift=1.0,
            window=window,
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "normal",
            LevelOptions(),
            "unknown sampling 'normal'; legal: uniform_index, uniform, logit_normal, mode",
        ),
        ("logit_normal", LevelOptions(logit_std=0), "logit_std must be a finite number above 0"),
        ("logit_normal", LevelOptions(logit_mean=math.inf), "logit_mean must be a finite number"),
        ("mode", LevelOptions(mode_scale=1.8), r"mode_scale must be in \[-1, 1.7519\], got 1.8"),
        ("mode", LevelOptions(mode_scale=math.nan), "mode_scale must be in"),
    ],
)
def test_illegal_samplings_are_refused(name: str, options: LevelOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(
            name, options, sigmas=shifted_sigmas(10, 1.0), shift=1.0, window=SigmaWindow(0.0, 1.0, 0, 10)
        )


def test_an_unknown_expert_lists_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="unknown expert 'high'; legal: t2v-A14B-high, t2v-A14B-low, i2v"):
        expert_window(shifted_sigmas(10, 1.0), "high")
