"""Validation: an even grid, the same questions every time, and the two answers whose error is known."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megawan.data.batch import Batch
from megawan.data.synthetic import SyntheticLatents
from megawan.flow.loss import FlowMatching, FlowOptions, FlowSample
from megawan.parallel.topology import Topology
from megawan.validation import Validation, ValidationOptions, check, constant_answer_mse, looks
from tests.dist_workers import world_of_one

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with world_of_one():
        yield


def validation(flow: FlowOptions, clean_frames: int = 0, **asked: int) -> tuple[Validation, SyntheticLatents]:
    store = SyntheticLatents(shape=(4, 3, 4, 6), text_dim=8, text_len=6, seed=1, count=9)
    made = Validation(
        store,
        FlowMatching(flow),
        ValidationOptions(every=1, **asked),
        Topology(1, 1, 1),
        dp_rank=0,
        micro_batch=2,
        clean_frames=clean_frames,
        text_len=6,
    )
    return made, store


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.875, 1.0), (0.25, 0.5)])
def test_the_grid_is_even_in_every_slice_and_over_all(low: float, high: float) -> None:
    asked = looks(9, 4, 5, low, high)
    assert len({(look.sample_id, look.level) for look in asked}) == len(asked) == 20
    places = sorted((look.sigma - low) / (high - low) * 20 for look in asked)
    assert places == pytest.approx([number + 0.5 for number in range(20)])
    for look in asked:
        assert int((look.sigma - low) / (high - low) * 5) == look.level
    # No sample is always at the low end of its slice.
    of_first = {int((look.sigma - low) / (high - low) * 20) % 4 for look in asked[:5]}
    assert len(of_first) == 4


def test_a_store_smaller_than_asked_is_looked_at_whole_and_the_choice_is_fixed() -> None:
    assert {look.sample_id for look in looks(3, 16, 2, 0.0, 1.0)} == {0, 1, 2}
    chosen = {look.sample_id for look in looks(100, 5, 1, 0.0, 1.0)}
    assert len(chosen) == 5 and chosen == {look.sample_id for look in looks(100, 5, 3, 0.5, 1.0)}
    assert chosen != set(range(5))


@pytest.mark.parametrize("clean_frames", [0, 1])
def test_the_constant_answer_is_1_and_the_right_one_0(clean_frames: int) -> None:
    asked, store = validation(FlowOptions(), clean_frames, samples=4, levels=3)
    means = torch.stack([store[look.sample_id].latents for look in asked._looks]).mean((0, 2, 3, 4))

    def constant(batch: Batch, sample: FlowSample) -> Tensor:
        error = sample.target + means[:, None, None, None]
        return error[:, :, clean_frames:].square().mean((1, 2, 3, 4))

    def right(batch: Batch, sample: FlowSample) -> Tensor:
        x0 = batch.latents
        sigma = sample.sigma[:, None, None, None, None]
        error = (sample.x_t - x0) / sigma - sample.target  # (noise − x0), as the clean frame has it not
        return error[:, :, clean_frames:].square().mean((1, 2, 3, 4))

    for measure, wanted in ((constant, 1.0), (right, 0.0)):
        curves = asked.run(measure, CPU)
        shares = [value for tag, value in curves.items() if tag.startswith("eval/normalized")]
        assert len(shares) > 3 and shares == pytest.approx([wanted] * len(shares), abs=1e-5)


def test_the_noise_is_the_same_every_time_and_another_at_every_look() -> None:
    asked, _ = validation(FlowOptions(), samples=4, levels=3)
    seen: list[Tensor] = []

    def remember(batch: Batch, sample: FlowSample) -> Tensor:
        seen.extend(sample.target + batch.latents)
        return torch.zeros(len(sample.sigma))

    asked.run(remember, CPU)
    first, seen[:] = list(seen), []
    asked.run(remember, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True)) and len(first) == 12
    assert len({float(noise.sum()) for noise in first}) == 12


@pytest.mark.parametrize(
    "flow",
    [
        FlowOptions(),
        FlowOptions(shift=3.0, expert="t2v-A14B-high"),
        FlowOptions(expert="i2v-A14B-low", weighting="uniform"),
        FlowOptions(sampling="logit_normal"),
    ],
)
def test_its_loss_is_what_training_would_lose(flow: FlowOptions) -> None:
    """For an error that depends on sigma alone: the mean over many of the training's own draws."""
    matching = FlowMatching(flow)

    def error(sigma: Tensor) -> Tensor:
        return 1 + sigma.double().square()

    drawn = matching.scheduler.sigmas
    weight = matching._weights.double()
    wanted = float((matching.sampler.probability * weight * error(drawn)).sum())
    asked, _ = validation(flow, samples=9, levels=20)
    found = asked.run(lambda batch, sample: error(sample.sigma), CPU)["eval/loss"]
    assert found == pytest.approx(wanted, rel=0.02)


def test_a_clean_frame_has_no_part_in_the_constant_answers_error() -> None:
    target = torch.ones(1, 2, 3, 2, 2)
    target[:, :, 0] = 100.0
    sample = FlowSample(target, torch.ones(1), torch.ones(1), target, torch.ones(1), clean_frames=1)
    assert constant_answer_mse(sample, torch.tensor([-1.0, 1.0])).tolist() == [2.0]


@pytest.mark.parametrize(
    "asked",
    [{"every": -1}, {"every": 1, "samples": 0}, {"every": 1, "levels": 0}],
)
def test_numbers_that_measure_nothing_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"--validation.{list(asked)[-1]} .*must be"):
        check(ValidationOptions(**asked))
