"""The training sample and the loss: identities, independence of the batch, splitting over ranks."""

import dataclasses
import inspect
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from megawan.flow.loss import (
    FlowLoss,
    FlowMatching,
    FlowOptions,
    FlowSample,
    flow_loss,
    latent_loss,
)
from megawan.flow.sampling import EXPERTS
from megawan.rng import generator_at

SHAPE = (4, 3, 4, 6)  # C, T, H, W
SAMPLINGS = ["uniform_index", "uniform", "logit_normal", "mode"]


def latents(count: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(
        dtype
    )


def spread(values: torch.Tensor) -> torch.Tensor:
    return values.double().view(-1, 1, 1, 1, 1)


def patchify(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b c t (h ph) (w pw) -> b (t h w) (ph pw c)", ph=2, pw=2)


# ---------------------------------------------------------------- the sample


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_a_sample_lies_on_the_line_from_clean_to_noise(sampling: str, shift: float) -> None:
    x0 = latents(6)
    made = FlowMatching(FlowOptions(sampling=sampling, shift=shift)).sample(
        x0, seed=1, sample_ids=torch.arange(6), epochs=torch.zeros(6, dtype=torch.int64)
    )
    assert torch.allclose(made.x_t - spread(made.sigma) * made.target, x0, rtol=0, atol=1e-14)
    assert torch.allclose(
        made.x_t + (1 - spread(made.sigma)) * made.target, x0 + made.target, rtol=0, atol=1e-14
    )
    assert made.timestep.tolist() == pytest.approx((1000 * made.sigma.double()).tolist(), rel=1e-7)
    assert made.timestep.dtype == made.sigma.dtype == made.weight.dtype == torch.float32
    assert made.clean_frames == 0
    noise = (x0 + made.target).float()
    assert 0.9 < float(noise.std()) < 1.1 and abs(float(noise.mean())) < 0.1


def test_uniform_index_gives_grid_points_with_the_schedulers_numbers() -> None:
    flow = FlowMatching(FlowOptions())
    x0 = latents(8, torch.float32)
    made = flow.sample(x0, seed=0, sample_ids=torch.arange(8), epochs=torch.zeros(8, dtype=torch.int64))
    ids = flow.scheduler.nearest_id(made.timestep)
    assert torch.equal(flow.scheduler.timesteps[ids], made.timestep)
    assert torch.equal(flow.scheduler.training_weight(made.timestep), made.weight)
    noise = torch.stack([made.target[i] + x0[i] for i in range(8)])
    assert torch.allclose(flow.scheduler.add_noise(x0, noise, made.timestep), made.x_t, atol=1e-6)
    assert len(set(ids.tolist())) > 1, "one timestep per sample, not one per batch"


def test_a_sigma_off_the_grid_gets_the_nearest_weight() -> None:
    flow = FlowMatching(FlowOptions(sampling="uniform"))
    sigma = torch.tensor([0.9001, 0.875, 0.0001, 0.5])
    made = flow.at_sigma(latents(4), latents(4), sigma)
    assert torch.equal(made.sigma, sigma)
    nearest = [int((flow.scheduler.timesteps - 1000 * s).abs().argmin()) for s in sigma]
    assert torch.equal(made.weight, flow.scheduler.training_weights[nearest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_even_for_half_precision_latents(dtype: torch.dtype) -> None:
    x0, noise = latents(3, dtype), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    made = FlowMatching(FlowOptions()).at_ids(x0, noise, [3, 500, 998])
    assert made.x_t.dtype == made.target.dtype == torch.float32
    sigma = spread(made.sigma)
    exact = (1 - sigma) * x0.double() + sigma * noise.double()
    assert torch.allclose(made.x_t.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(made.target, noise - x0.float())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_a_sample_draws_does_not_depend_on_its_batch(sampling: str) -> None:
    flow = FlowMatching(FlowOptions(sampling=sampling))
    x0, ids, epochs = latents(5, torch.float32), [40, 7, 7, 2**40, 0], [0, 1, 2, 3, 0]

    def sample(chosen: list[int]) -> FlowSample:
        return flow.sample(
            x0[chosen],
            seed=9,
            sample_ids=torch.tensor([ids[i] for i in chosen]),
            epochs=[epochs[i] for i in chosen],  # a list of ints does as well
        )

    whole = sample([0, 1, 2, 3, 4])
    for split in ([[0], [1], [2], [3], [4]], [[4, 2, 0], [1, 3]], [[3, 3], [2, 1, 0, 4]]):
        for chosen in split:
            part = sample(chosen)
            for field in ("x_t", "timestep", "sigma", "target", "weight"):
                assert torch.equal(getattr(part, field), getattr(whole, field)[chosen]), field


def test_draws_differ_between_seeds_samples_and_epochs() -> None:
    flow = FlowMatching(FlowOptions(sampling="uniform"))
    x0 = torch.zeros(1, *SHAPE)
    places = [(s, i, e) for s in (0, 1) for i in (0, 1, 10) for e in (0, 1, 10)]
    made = [flow.sample(x0, seed=s, sample_ids=[i], epochs=[e]) for s, i, e in places]
    assert len({float(m.sigma) for m in made}) == len(places)
    assert len({float(m.target.sum()) for m in made}) == len(places)


def test_the_keys_of_the_draws_are_the_documented_ones() -> None:
    flow = FlowMatching(FlowOptions(sampling="uniform"))
    made = flow.sample(torch.zeros(2, *SHAPE), seed=3, sample_ids=[5, 2**33], epochs=[0, 4])
    for i, place in enumerate([(5, 0), (2**33, 4)]):
        noise = torch.randn(SHAPE, generator=generator_at(3, "noise", *place))
        assert torch.equal(made.target[i], noise)
        assert torch.equal(made.sigma[i], flow.sampler.draw(generator_at(3, "sigma", *place)))


def test_sigma_and_noise_are_independent() -> None:
    flow = FlowMatching(FlowOptions(sampling="uniform"))
    made = flow.sample(torch.zeros(800, 1, 1, 1, 1), seed=0, sample_ids=torch.arange(800), epochs=[0] * 800)
    noise = made.target.flatten()
    for values in (noise, noise.abs(), noise.square()):
        correlation = torch.corrcoef(torch.stack([made.sigma.argsort().argsort().float(), values]))[0, 1]
        assert abs(float(correlation)) < 0.12


def test_a_sigma_does_not_depend_on_the_length_of_the_clip() -> None:
    flow = FlowMatching(FlowOptions())
    short = flow.sample(torch.zeros(1, 4, 1, 4, 6), seed=3, sample_ids=[5], epochs=[0])
    long = flow.sample(torch.zeros(1, 4, 7, 4, 6), seed=3, sample_ids=[5], epochs=[0])
    assert torch.equal(short.sigma, long.sigma)


def test_every_kind_of_integer_draws_the_same() -> None:
    flow = FlowMatching(FlowOptions())
    x0 = torch.zeros(2, *SHAPE)
    first = flow.sample(x0, seed=3, sample_ids=torch.tensor([5, 6], dtype=torch.int32), epochs=[0, 0])
    second = flow.sample(x0, seed=3, sample_ids=[5, 6], epochs=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(first.x_t, second.x_t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compat", [False, True])
def test_a_clean_first_frame_survives_the_noise(dtype: torch.dtype, compat: bool) -> None:
    flow = FlowMatching(FlowOptions(bf16_timestep_compat=compat))
    x0 = latents(3, dtype)
    place = {"seed": 0, "sample_ids": [0, 1, 2], "epochs": [0, 0, 0]}
    noisy, clean = flow.sample(x0, **place), flow.sample(x0, **place, clean_frames=1)
    assert torch.equal(clean.x_t[:, :, :1], x0[:, :, :1].to(clean.x_t.dtype))
    assert torch.equal(clean.x_t[:, :, 1:], noisy.x_t[:, :, 1:])
    assert torch.equal(clean.target, noisy.target) and clean.clean_frames == 1
    assert not torch.equal(noisy.x_t[:, :, :1], x0[:, :, :1].to(noisy.x_t.dtype))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("expert", sorted(EXPERTS))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_expert_sees_its_own_sigmas_only(sampling: str, expert: str) -> None:
    flow = FlowMatching(FlowOptions(sampling=sampling, expert=expert, shift=3.0))
    made = flow.sample(torch.zeros(64, 1, 1, 2, 2), seed=0, sample_ids=torch.arange(64), epochs=[0] * 64)
    low, high = EXPERTS[expert]
    boundary = low if expert.endswith("high") else high
    assert bool(((made.timestep >= 1000 * boundary) == expert.endswith("high")).all())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("expert", [None, *sorted(EXPERTS)])
def test_renormalised_weights_are_1_on_average(sampling: str, expert: str | None) -> None:
    flow = FlowMatching(FlowOptions(sampling=sampling, expert=expert, renormalize_weights=True))
    plain = FlowMatching(FlowOptions(sampling=sampling, expert=expert))
    count = 1500
    place = {"seed": 4, "sample_ids": torch.arange(count), "epochs": torch.zeros(count, dtype=torch.int64)}
    x0 = torch.zeros(count, 1, 1, 1, 1)
    made, reference = flow.sample(x0, **place), plain.sample(x0, **place)
    ratio = made.weight[reference.weight > 0] / reference.weight[reference.weight > 0]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5), "one factor for all weights"
    deviation = float(made.weight.std()) / math.sqrt(count)
    assert abs(float(made.weight.mean()) - 1) < 4 * deviation + 1e-6
    assert "mean weight 1.0000" in flow.describe()


def test_mean_weights_of_the_a14b_experts_are_the_published_ones() -> None:
    published = {
        "t2v-A14B-high": 0.3424,
        "i2v-A14B-high": 0.2825,
        "t2v-A14B-low": 1.4704,
        "i2v-A14B-low": 1.4001,
    }
    for expert, mean in published.items():
        assert f"mean weight {mean:.4f}" in FlowMatching(FlowOptions(expert=expert)).describe()


def test_the_start_up_line_says_what_the_window_holds() -> None:
    line = FlowMatching(FlowOptions(expert="t2v-A14B-high")).describe()
    assert "\n" not in line
    for part in (
        "shift 5", "1000 timesteps", "sampling uniform_index", "weighting gaussian,", "float32 timesteps",
        "window of t2v-A14B-high: ids 0..416 (417 of 1000)", "sigma 0.875300..1.000000", "t 875.300..1000",
        "41.70% of all draws", "mean weight 0.3424",
    ):  # fmt: skip
        assert part in line
    line = FlowMatching(FlowOptions(sampling="uniform", min_sigma=0.8751, max_sigma=0.8752)).describe()
    assert "no ids (0 of 1000), sigma 0.875100..0.875200" in line


def test_window_forms_agree_where_they_mean_the_same() -> None:
    forms = [
        FlowOptions(expert="i2v-A14B-low"),
        FlowOptions(max_sigma=0.9),
        FlowOptions(min_timestep_boundary=0.358),
        FlowOptions(min_timestep_boundary=0.358, max_timestep_boundary=1.0),
    ]
    windows = [FlowMatching(options).window for options in forms]
    assert {(w.start, w.stop) for w in windows} == {(358, 1000)}


# ---------------------------------------------------------------- options and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0.0}, "shift must be a finite number above 0"),
        ({"num_timesteps": 0}, "whole number of at least 1, got 0"),
        ({"sampling": "normal"}, "unknown sampling 'normal'; legal: uniform_index"),
        ({"weighting": "min_snr"}, "unknown weighting 'min_snr'; legal: gaussian, uniform"),
        ({"expert": "A14B"}, "unknown expert 'A14B'; legal: t2v-A14B-high"),
        ({"min_sigma": -0.1}, "min_sigma must be in"),
        ({"max_sigma": 1.5}, "max_sigma must be in"),
        ({"min_sigma": 0.6, "max_sigma": 0.5}, "min_sigma must be below max_sigma"),
        ({"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5}, "must be below"),
        ({"max_timestep_boundary": 1.01}, "max_timestep_boundary must be in"),
        ({"min_sigma": 0.5, "max_timestep_boundary": 0.5}, "one form: min_sigma/max_sigma and min_timestep"),
        ({"expert": "t2v-A14B-low", "max_sigma": 0.5}, "more than one form: expert and min_sigma"),
        ({"logit_std": 0.5}, "logit_std 0.5 has no effect with sampling uniform_index; it is for logit"),
        ({"mode_scale": 0.5, "sampling": "uniform"}, "mode_scale 0.5 has no effect"),
        ({"sampling": "logit_normal", "logit_std": -1.0}, "logit_std must be"),
        ({"sampling": "mode", "mode_scale": 3.0}, "mode_scale must be in"),
        ({"bf16_timestep_compat": True, "sampling": "mode"}, "draws by uniform_index; sampling is mode"),
    ],
)  # fmt: skip
def test_illegal_options_are_refused_when_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_timesteps": 1}, "at least 2 timesteps, got 1"),
        ({"min_sigma": 0.8751, "max_sigma": 0.8752}, "empty: none of the 1000 timesteps"),
        ({"min_timestep_boundary": 0.4171, "max_timestep_boundary": 0.4172}, "none of the 1000"),
        ({"min_sigma": 0.9999, "renormalize_weights": True}, "all weights inside the window are 0"),
    ],
)  # fmt: skip
def test_options_that_leave_nothing_to_draw_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(FlowOptions(**options))  # type: ignore[arg-type]


def test_every_option_has_its_help() -> None:
    source = inspect.getsource(FlowOptions)
    for field in dataclasses.fields(FlowOptions):
        following = source.split(f"    {field.name}: ")[1].split("\n")[1]
        assert following.strip().startswith('"""') and following.strip().endswith('."""'), field.name


def test_samples_that_do_not_fit_are_refused() -> None:
    flow = FlowMatching(FlowOptions())
    x0 = torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match=r"must be \[B, C, T, H, W\], got shape \[4, 3, 4, 6\]"):
        flow.sample(x0[0], seed=0, sample_ids=[0], epochs=[0])
    with pytest.raises(ValueError, match="sample_ids must be 2 whole numbers"):
        flow.sample(x0, seed=0, sample_ids=[0], epochs=[0, 0])
    with pytest.raises(ValueError, match="epochs must be 2 whole numbers"):
        flow.sample(x0, seed=0, sample_ids=[0, 1], epochs=torch.zeros(2))
    with pytest.raises(ValueError, match="clean_frames must be 0, or 1 for TI2V, got 2"):
        flow.sample(x0, seed=0, sample_ids=[0, 1], epochs=[0, 0], clean_frames=2)
    with pytest.raises(ValueError, match="at least 2 latent frames"):
        flow.sample(x0[:, :, :1], seed=0, sample_ids=[0, 1], epochs=[0, 0], clean_frames=1)
    with pytest.raises(ValueError, match="ids must be 0 .. 999"):
        flow.at_ids(x0, x0, [0, 1000])
    with pytest.raises(ValueError, match="x0 and noise must have one shape"):
        flow.at_ids(x0, x0[:, :, :1], [0, 1])
    with pytest.raises(ValueError, match="sigma must be one per sample"):
        flow.at_sigma(x0, x0, torch.tensor(0.5))
    with pytest.raises(ValueError, match="timestep must be finite"):
        flow.at_sigma(x0, x0, torch.tensor([0.5, math.nan]))


# ---------------------------------------------------------------- the loss


def token_mask(
    grid: tuple[int, int, int], clean_frames: int, *, start: int, length: int
) -> tuple[torch.Tensor, int]:
    """Return which of the tokens start .. start + length − 1 carry loss, and how many of the sample do."""
    first, end = clean_frames * grid[1] * grid[2], math.prod(grid)
    place = torch.arange(start, start + length)
    return (first <= place) & (place < end), end - first


def whole(pred: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> FlowLoss:
    return flow_loss(pred, target, weight, valid=None, valid_tokens=pred.shape[1], cp_size=1)


def test_the_loss_is_the_mean_of_weight_times_mse() -> None:
    pred, target = latents(3, shape=(6, 8)), latents(3, shape=(6, 8)).flip(0) * 1.5
    weight = torch.tensor([0.3, 0.0, 2.0])
    made = whole(pred, target, weight)
    mse = [float(((pred[b] - target[b]) ** 2).mean()) for b in range(3)]
    assert made.per_sample.tolist() == pytest.approx(mse, rel=1e-14)
    assert float(made.loss) == pytest.approx(
        sum(w * m for w, m in zip(weight.tolist(), mse, strict=True)) / 3, rel=1e-14
    )
    assert made.loss.dtype == torch.float64 and made.per_sample.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_compared_in_float32(dtype: torch.dtype) -> None:
    pred, target = latents(2, dtype, (50, 64)), torch.zeros(2, 50, 64)
    made = whole(pred, target, torch.ones(2))
    assert made.loss.dtype == made.per_sample.dtype == torch.float32
    assert float(made.loss) == pytest.approx(float((pred.double() ** 2).mean()), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    cp_size=st.integers(1, 9),
    clean=st.booleans(),
)
def test_the_mean_over_ranks_is_the_whole_samples_loss(
    grid: tuple[int, int, int], cp_size: int, clean: bool
) -> None:
    clean_frames = int(clean and grid[0] > 1)
    length, first = math.prod(grid), clean_frames * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(length + cp_size)
    pred, target = torch.randn(2, 2, length, 5, generator=generator, dtype=torch.float64)
    pred.requires_grad_()
    weight = torch.tensor([0.7, 1.9])
    expected = (((pred - target) ** 2)[:, first:].mean(dim=(1, 2)) * weight).mean()
    (gradient,) = torch.autograd.grad(expected, pred)

    local = -(-length // cp_size)
    padding = cp_size * local - length
    # Garbage in the padding: whatever it is, neither loss nor gradient may see it.
    padded = torch.cat([pred, torch.full((2, padding, 5), math.nan)], dim=1)
    padded_target = torch.cat([target, torch.full((2, padding, 5), math.inf)], dim=1)
    parts = []
    for rank in range(cp_size):
        here = slice(rank * local, (rank + 1) * local)
        valid, valid_tokens = token_mask(grid, clean_frames, start=rank * local, length=local)
        assert valid_tokens == length - first
        parts.append(
            flow_loss(
                padded[:, here],
                padded_target[:, here],
                weight,
                valid=valid,
                valid_tokens=valid_tokens,
                cp_size=cp_size,
            )
        )
    total = torch.stack([part.loss for part in parts]).mean()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    per_sample = torch.stack([part.per_sample for part in parts]).mean(dim=0)
    mse = ((pred - target) ** 2)[:, first:].mean(dim=(1, 2)).detach()
    assert torch.allclose(per_sample, mse, rtol=1e-12)
    (ours,) = torch.autograd.grad(total, pred)
    assert torch.allclose(ours, gradient, rtol=1e-12, atol=0)


def test_a_rank_with_padding_only_adds_nothing_but_stays_in_the_graph() -> None:
    pred = torch.full((1, 3, 2), math.nan, requires_grad=True)
    made = flow_loss(
        pred,
        torch.zeros(1, 3, 2),
        torch.ones(1),
        valid=torch.zeros(3, dtype=torch.bool),
        valid_tokens=3,
        cp_size=2,
    )
    made.loss.backward()
    assert float(made.loss.detach()) == 0 and pred.grad is not None and bool((pred.grad == 0).all())


@pytest.mark.parametrize("clean_frames", [0, 1])
def test_tokens_and_latents_have_the_same_loss(clean_frames: int) -> None:
    pred, target = latents(2), latents(2).flip(0)
    weight = torch.tensor([0.4, 1.3])
    tokens = patchify(pred)
    valid, valid_tokens = token_mask((3, 2, 3), clean_frames, start=0, length=18)
    by_tokens = flow_loss(tokens, patchify(target), weight, valid=valid, valid_tokens=valid_tokens, cp_size=1)
    by_latent = latent_loss(pred, target, weight, clean_frames=clean_frames)
    assert float(by_tokens.loss) == pytest.approx(float(by_latent.loss), rel=1e-14)
    assert torch.allclose(by_tokens.per_sample, by_latent.per_sample, rtol=1e-14)


def test_the_clean_frame_has_no_gradient() -> None:
    pred = latents(2).requires_grad_()
    latent_loss(pred, torch.zeros_like(pred), torch.ones(2), clean_frames=1).loss.backward()
    assert pred.grad is not None
    assert bool((pred.grad[:, :, 0] == 0).all()) and bool((pred.grad[:, :, 1:] != 0).all())


def test_losses_that_do_not_fit_are_refused() -> None:
    pred, weight = torch.zeros(2, 4, 3), torch.ones(2)
    fits = {"valid": None, "valid_tokens": 4, "cp_size": 1}
    with pytest.raises(ValueError, match="pred and target must have one shape"):
        flow_loss(pred, pred[:, :3], weight, **fits)
    with pytest.raises(ValueError, match=r"weight must be one per sample, \[2\], got shape \[\]"):
        flow_loss(pred, pred, torch.tensor(1.0), **fits)
    with pytest.raises(ValueError, match=r"tokens \[B, l, P\]"):
        flow_loss(torch.zeros(2, 1, 1, 1, 1), torch.zeros(2, 1, 1, 1, 1), weight, **fits)
    with pytest.raises(ValueError, match=r"valid must be bool \[4\]"):
        flow_loss(pred, pred, weight, valid=torch.ones(4), valid_tokens=4, cp_size=1)
    with pytest.raises(ValueError, match="cp_size must be at least 1"):
        flow_loss(pred, pred, weight, valid=None, valid_tokens=4, cp_size=0)
    for tokens, cp_size in ((3, 1), (5, 1), (9, 2), (3, 2)):
        with pytest.raises(ValueError, match="valid_tokens is the whole sample's count"):
            flow_loss(pred, pred, weight, valid=None, valid_tokens=tokens, cp_size=cp_size)
    with pytest.raises(ValueError, match="valid_tokens is the whole sample's count, here 1 .. 8"):
        flow_loss(pred, pred, weight, valid=torch.ones(4, dtype=torch.bool), valid_tokens=0, cp_size=2)
