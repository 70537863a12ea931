"""The order is a function of (seed, step): any split sees the same global batches, and no sample is lost."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megawan.data.batch import Batch
from megawan.data.loader import make_loader
from megawan.data.sampler import GlobalOrder
from megawan.data.streams import by_shape
from megawan.data.synthetic import SyntheticLatents

SHAPES = [(16, 3, 8, 8), (16, 1, 8, 8), (16, 3, 4, 12)]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_every_batch_has_one_shape_and_every_epoch_every_sample(
    counts: list[int], batch: int, seed: int
) -> None:
    shapes = [SHAPES[kind] for kind, count in enumerate(counts) for _ in range(count)]
    order = GlobalOrder(by_shape(shapes), seed=seed, global_batch=batch)
    passes = Counter[tuple[int, int]]()
    steps = 3 * len(shapes) // batch + 2
    for step in range(steps):
        places = order.step(step)
        assert len(places) == batch
        assert len({shapes[place.sample_id] for place in places}) == 1
        passes.update((place.sample_id, place.epoch) for place in places)
    assert max(passes.values()) == 1, "a sample came twice in one epoch"
    for sample, epoch in passes:
        assert all((sample, earlier) in passes for earlier in range(epoch)), (
            "a sample was passed over in an epoch"
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), steps=st.permutations(list(range(7))))
def test_a_step_does_not_depend_on_what_was_asked_before(seed: int, steps: list[int]) -> None:
    shapes = [SHAPES[0]] * 5 + [SHAPES[1]] * 3
    fresh = [GlobalOrder(by_shape(shapes), seed=seed, global_batch=2).step(step) for step in range(7)]
    used = GlobalOrder(by_shape(shapes), seed=seed, global_batch=2)
    assert {step: used.step(step) for step in steps} == dict(enumerate(fresh))


def test_over_many_rounds_every_bucket_has_its_share() -> None:
    shapes = [SHAPES[0]] * 30 + [SHAPES[1]] * 10
    order = GlobalOrder(by_shape(shapes), seed=1, global_batch=4)
    seen = Counter(shapes[order.step(step)[0][0]] for step in range(100))
    assert seen == {SHAPES[0]: 75, SHAPES[1]: 25}


def test_epochs_and_seeds_shuffle_anew() -> None:
    rows = {
        (seed, epoch): tuple(
            place.sample_id
            for place in GlobalOrder(by_shape([SHAPES[0]] * 40), seed=seed, global_batch=40).step(epoch)
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(rows.values())) == 4
    assert all(sorted(row) == list(range(40)) for row in rows.values())


def test_illegal_orders_say_what_is_legal() -> None:
    with pytest.raises(ValueError, match="no samples"):
        GlobalOrder([], seed=0, global_batch=1)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        GlobalOrder(by_shape([SHAPES[0]]), seed=0, global_batch=0)
    with pytest.raises(ValueError, match="groups of 3 places do not divide the global batch of 8"):
        GlobalOrder(by_shape([SHAPES[0]]), seed=0, global_batch=8, group=3)


def steps_of(dp_size: int, micro_batch: int, accumulation: int, *, start: int = 0, count: int = 3):  # noqa: ANN201
    """Return [step][sample of the global batch, sorted by id and epoch] → (key, text, latents) over all
    ranks."""
    data = SyntheticLatents(shape=(4, 1, 2, 2), text_dim=8, text_len=6, seed=5, count=7)
    loaders = [
        make_loader(
            data,
            seed=5,
            micro_batch=micro_batch,
            accumulation=accumulation,
            dp_rank=rank,
            dp_size=dp_size,
            text_len=6,
            prompt_dropout=0.4,
            start_step=start,
            workers=0,
        )
        for rank in range(dp_size)
    ]
    steps = []
    for _ in range(count):
        batches: list[Batch] = [batch for loader in loaders for batch in next(loader)]
        assert all(len(batch.latents) == micro_batch for batch in batches)
        rows = [
            (
                (int(batch.sample_ids[i]), int(batch.epochs[i])),
                batch.prompts[i],
                batch.text[i],
                batch.latents[i],
            )
            for batch in batches
            for i in range(micro_batch)
        ]
        steps.append(sorted(rows, key=lambda row: row[0]))
    return steps


@pytest.mark.parametrize(
    ("dp_size", "micro_batch", "accumulation"), [(1, 2, 2), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4)]
)
def test_any_split_trains_on_the_same_global_batches(
    dp_size: int, micro_batch: int, accumulation: int
) -> None:
    wanted, found = steps_of(1, 4, 1), steps_of(dp_size, micro_batch, accumulation)
    for step_wanted, step_found in zip(wanted, found, strict=True):
        for (key, prompt, text, latents), other in zip(step_wanted, step_found, strict=True):
            assert (key, prompt) == other[:2]
            assert torch.equal(text, other[2]) and torch.equal(latents, other[3])


def test_a_later_start_continues_the_same_run() -> None:
    whole, resumed = steps_of(2, 2, 1, count=5), steps_of(2, 2, 1, start=3, count=2)
    assert [[row[0] for row in step] for step in whole[3:]] == [[row[0] for row in step] for step in resumed]


def test_dropped_prompts_are_the_empty_one_and_about_as_many_as_asked() -> None:
    data = SyntheticLatents(shape=(4, 1, 2, 2), text_dim=8, text_len=6, seed=5, count=200)
    loader = make_loader(
        data, seed=1, micro_batch=200, accumulation=1, dp_rank=0, dp_size=1, text_len=6, prompt_dropout=0.25,
        start_step=0, workers=0,
    )  # fmt: skip
    (batch,) = next(loader)
    dropped = [i for i, prompt in enumerate(batch.prompts) if prompt == ""]
    assert 30 <= len(dropped) <= 70
    for i in dropped:
        assert torch.equal(batch.text[i, :1], data.empty_text)
        assert not batch.text[i, 1:].any()
