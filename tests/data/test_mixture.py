"""Several stores in one order: exact shares, epochs of their own, ids that stay, and every refusal."""

import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megawan import config
from megawan.cli import UserError
from megawan.data.loader import make_loader
from megawan.data.mixture import Mixture
from megawan.data.sampler import GlobalOrder, Place
from megawan.data.streams import DATASET_STRIDE, Stream, by_shape, dataset_of
from megawan.dist import Environment
from megawan.plan import make_plan
from tests.data.stores import IMAGE, VIDEO, WIDE, make_store

SHAPES = [VIDEO, WIDE, IMAGE]

datasets = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),  # samples of each shape
        st.sampled_from([Fraction(1, 3), Fraction(1), Fraction(5, 2)]),
    ),
    min_size=1,
    max_size=3,
)


def streams_of(drawn: list[tuple[list[int], Fraction]], image_share: Fraction | None = None) -> list[Stream]:
    return [
        stream
        for dataset, (counts, weight) in enumerate(drawn)
        for stream in by_shape(
            [SHAPES[kind] for kind, count in enumerate(counts) for _ in range(count)],
            dataset=dataset,
            weight=weight,
            image_share=image_share,
        )
    ]


@settings(max_examples=40, deadline=None)
@given(
    drawn=datasets,
    group=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 9),
    image_share=st.sampled_from([None, Fraction(1, 4), Fraction(0)]),
)
def test_every_group_has_one_shape_and_every_epoch_every_sample_in_turn(
    drawn: list[tuple[list[int], Fraction]],
    group: int,
    groups: int,
    seed: int,
    image_share: Fraction | None,
) -> None:
    streams = streams_of(drawn, image_share)
    order = GlobalOrder(streams, seed=seed, global_batch=group * groups, group=group)
    passed: dict[int, list[Place]] = {number: [] for number in range(len(streams))}
    for step in range(3 * sum(len(stream.samples) for stream in streams) // (group * groups) + 2):
        places = order.step(step)
        assert len(places) == group * groups
        for start in range(0, len(places), group):
            assert len({streams[place.stream].shape for place in places[start : start + group]}) == 1
        for place in places:
            passed[place.stream].append(place)
    for number, stream in enumerate(streams):
        for count, place in enumerate(passed[number]):
            assert place.epoch == count // len(stream.samples), "an epoch began before the last had ended"
        for epoch in range(len(passed[number]) // len(stream.samples)):
            here = [place.sample_id for place in passed[number] if place.epoch == epoch]
            assert sorted(here) == sorted(stream.samples)


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    counts=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
def test_every_batch_has_the_share_of_every_dataset_whatever_its_size(
    weights: list[int], counts: list[int], seed: int
) -> None:
    streams = [
        by_shape([VIDEO] * counts[number], dataset=number, weight=Fraction(weight))[0]
        for number, weight in enumerate(weights)
    ]
    order = GlobalOrder(streams, seed=seed, global_batch=sum(weights))
    for step in range(20):
        assert Counter(place.stream for place in order.step(step)) == dict(enumerate(weights))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(drawn=datasets, group=st.integers(1, 3), seed=st.integers(0, 9))
def test_over_the_rounds_every_stream_has_its_share_exactly(
    drawn: list[tuple[list[int], Fraction]], group: int, seed: int
) -> None:
    streams = streams_of(drawn)
    whole = sum((stream.weight for stream in streams), Fraction())
    samples = sum(len(stream.samples) for stream in streams)
    order = GlobalOrder(streams, seed=seed, global_batch=group)
    # After so many groups both the buckets and the datasets within each of them are at the end of a round.
    shares = [stream.weight / whole for stream in streams]
    shapes: dict[Any, Fraction] = {}
    for stream in streams:
        shapes[stream.shape] = shapes.get(stream.shape, Fraction()) + stream.weight / whole
    period = samples * math.lcm(*(share.denominator for share in (*shares, *shapes.values())))
    assume(period * group <= 800)
    seen = Counter(place.stream for step in range(period) for place in order.step(step))
    assert seen == {number: period * group * share for number, share in enumerate(shares)}


def test_another_store_changes_nothing_of_the_first_but_when_its_samples_come() -> None:
    first = by_shape([VIDEO] * 7 + [IMAGE] * 4)
    alone = GlobalOrder(first, seed=3, global_batch=4)
    both = GlobalOrder(
        [*first, *by_shape([VIDEO] * 5, dataset=1, weight=Fraction(30))], seed=3, global_batch=4
    )
    for shape in (VIDEO, IMAGE):
        rows = [
            [
                (place.sample_id, place.epoch)
                for step in range(120)
                for place in order.step(step)
                if order.streams[place.stream].shape == shape and place.sample_id < DATASET_STRIDE
            ]
            for order in (alone, both)
        ]
        length = min(map(len, rows))
        assert length > 20 and rows[0][:length] == rows[1][:length]


def test_stores_are_read_by_id_and_told_apart(tmp_path: Path) -> None:
    one, two, three = (
        make_store(tmp_path / name / "store", [VIDEO] * count)
        for name, count in (("a", 3), ("b", 2), ("c", 4))
    )
    mixed = Mixture([one, two, three], (3, 0, 1.5))
    assert len(mixed) == 7 and len(mixed.shapes) == 7
    ids = torch.tensor([sample for stream in mixed.streams for sample in stream.samples])
    assert dataset_of(ids).tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert mixed[2 * DATASET_STRIDE + 1].prompt == "store 1"
    assert "c/store/shard_00001.safetensors, made of 1.mp4" in mixed.where(2 * DATASET_STRIDE + 1)
    assert mixed.names == ["a/store", "b/store", "c/store"]
    assert mixed.passes(9) == [("a/store", 2.0), ("c/store", 0.75)]
    assert f"{one.path}: 3 samples" in mixed.describe() and "66.7% of what is trained" in mixed.describe()
    assert f"{two.path}: left out by its weight of 0" in mixed.describe()
    assert mixed.fingerprint == " + ".join(
        f"{each.fingerprint} weight {weight}" for each, weight in ((one, 3), (two, 0), (three, 1.5))
    )


def test_images_have_the_share_that_is_asked(tmp_path: Path) -> None:
    mixed = Mixture([make_store(tmp_path / "s", [VIDEO] * 6 + [IMAGE] * 2)], image_share=0.5)
    order = GlobalOrder(mixed.streams, seed=0, global_batch=1)
    seen = Counter(order.streams[order.step(step)[0].stream].shape for step in range(80))
    assert seen == {VIDEO: 40, IMAGE: 40}
    assert mixed.passes(80) == [("s images", 20.0), ("s videos", pytest.approx(40 / 6))]
    without = Mixture([make_store(tmp_path / "s", [VIDEO] * 6 + [IMAGE] * 2)], image_share=0)
    assert set(without.shapes) == {VIDEO} and len(without) == 6


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"latent_channels": 48}, "latent_channels is 4 in the first and 48 in the second"),
        ({"text_dim": 9}, "text_dim is 8 in the first and 9 in the second"),
        ({"condition": "i2v"}, "condition is None in the first and 'i2v' in the second"),
        ({"codec": "wan2.1"}, "codec is 'dct' in the first and 'wan2.1' in the second"),
        ({"text_fingerprint": "x"}, "text_fingerprint is None in the first and 'x' in the second"),
    ],
)
def test_stores_of_different_making_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    first, second = make_store(tmp_path / "a", [VIDEO]), make_store(tmp_path / "b", [VIDEO], **changed)
    with pytest.raises(ValueError) as caught:
        Mixture([first, second])
    assert f"stores {first.path} and {second.path} cannot be trained together: {words}" in str(caught.value)
    Mixture([first, second], (1, 0))  # one that is left out may be anything


@pytest.mark.parametrize(
    ("weights", "image_share", "words"),
    [
        ((1,), None, "--data.weights has 1 numbers for 2 stores"),
        ((1, -1), None, "--data.weights -1 must be 0 or more"),
        ((1, float("nan")), None, "--data.weights nan must be 0 or more"),
        ((0, 0), None, "--data.weights are all 0"),
        ((), 1.5, "--data.image_share 1.5 must lie between 0 and 1"),
        ((), 0.5, "none does; give --data.weights"),
    ],
)
def test_weights_that_say_nothing_are_refused(
    tmp_path: Path, weights: tuple[float, ...], image_share: float | None, words: str
) -> None:
    stores = [make_store(tmp_path / "a", [VIDEO]), make_store(tmp_path / "b", [IMAGE])]
    with pytest.raises(ValueError, match=words):
        Mixture(stores, weights, image_share)
    with pytest.raises(ValueError, match=f"names {stores[0].path} twice"):
        Mixture([stores[0], stores[0]])


def lines_of(*argv: str, world: int = 1) -> list[str]:
    options = config.parse(argv, prog="train.py", description="")
    return make_plan(options, Environment(0, 0, world, world)).describe()


def test_the_plan_says_what_is_mixed(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 6)):
        make_store(tmp_path / name, [(16, 3, 4, 4)] * count, latent_channels=16, text_dim=64)
    paths = ("--data.path", str(tmp_path / "a"), str(tmp_path / "b"))
    said = lines_of(*paths, "--data.weights", "3", "1", "--steps", "12", "--micro_batch", "2")
    assert said[1].startswith(f"data: 9 samples of 2 stores: {tmp_path / 'a'}: 3 samples, latents")
    assert said[4] == "passes: a 6.0, b 1.0"
    by_number = lines_of(*paths, "--steps", "12")
    assert by_number[4] == "passes: a 1.3, b 1.3"
    grouped = lines_of(*paths, "--data.shape_group", "2", "--accumulation", "4")
    assert grouped[3].endswith("; every 2 of one shape")
    for flags, words in (
        (("--data.weights", "1"), "--data.weights divides latent stores; give them with --data.path"),
        (("--data.image_share", "0.5"), "--data.image_share divides latent stores"),
        ((*paths, "--data.path", paths[1], str(tmp_path / "no")), "no: not a finished latent store"),
        (
            ("--data.shape_group", "3", "--micro_batch", "2", "--accumulation", "2"),
            "--data.shape_group 3 must be a multiple of --micro_batch 2 and divide the global batch of 4;"
            " legal: 0, 2, 4",
        ),
        (("--data.max_bad", "2"), "--data.max_bad 2.0 must lie between 0 and 1"),
    ):
        with pytest.raises(UserError) as caught:
            lines_of(*flags)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def drawn(
    data: Mixture, dp_size: int, micro_batch: int, accumulation: int, workers: int = 0, steps: int = 3
) -> list[list[tuple[Any, ...]]]:
    """Return every step's samples over all ranks: (id, epoch, prompt, sum of latents), sorted."""
    ranks = [
        make_loader(
            data,
            seed=5,
            micro_batch=micro_batch,
            accumulation=accumulation,
            dp_rank=rank,
            dp_size=dp_size,
            text_len=6,
            prompt_dropout=0.4,
            start_step=1,
            workers=workers,
            shape_group=2,
        )
        for rank in range(dp_size)
    ]
    found = []
    for _ in range(steps):
        batches = [batch for rank in ranks for batch in next(rank)]
        rows = [
            (
                int(batch.sample_ids[i]),
                int(batch.epochs[i]),
                batch.prompts[i],
                float(batch.latents[i].double().sum()),
            )
            for batch in batches
            for i in range(micro_batch)
        ]
        found.append(sorted(rows))
    return found


def test_any_split_and_any_reading_processes_train_on_the_same_mixed_steps(tmp_path: Path) -> None:
    data = Mixture(
        [
            make_store(tmp_path / "a", [VIDEO] * 5 + [IMAGE] * 4),
            make_store(tmp_path / "b", [WIDE] * 3 + [VIDEO] * 2, bad=[4]),
        ],
        (2, 1),
    )
    wanted = drawn(data, 1, 2, 4)
    assert any(len({data[row[0]].latents.shape for row in step}) > 1 for step in wanted), "no step is mixed"
    for split in ((1, 1, 8), (2, 2, 2), (2, 1, 4), (4, 1, 2), (4, 2, 1), (8, 1, 1)):
        assert drawn(data, *split) == wanted, split
    assert drawn(data, 1, 2, 4, workers=2, steps=2) == wanted[:2]
    assert drawn(data, 1, 1, 8, workers=1, steps=2) == wanted[:2]


def test_ranks_take_turns_of_nearly_equal_cost_and_say_how_uneven_they_are(tmp_path: Path) -> None:
    data = Mixture([make_store(tmp_path / "s", [VIDEO] * 6 + [WIDE] * 6 + [IMAGE] * 6)], (1,))
    costs = {VIDEO: 9.0, WIDE: 10.0, IMAGE: 1.0}
    ranks = [
        make_loader(
            data, seed=5, micro_batch=1, accumulation=3, dp_rank=rank, dp_size=2, text_len=6,
            prompt_dropout=0.0, start_step=0, workers=0, shape_group=1, costs=costs,
        )
        for rank in range(2)
    ]  # fmt: skip
    uneven = set()
    for _ in range(6):
        steps = [next(rank) for rank in ranks]
        turns = [
            [costs[tuple(steps[rank][turn].latents.shape[1:])] for rank in range(2)] for turn in range(3)
        ]
        assert [max(turn) for turn in turns] == sorted(itertools.chain(*turns), reverse=True)[::2]
        said = {batch.imbalance for step in steps for batch in step}
        assert said == {sum(map(max, turns)) / (sum(map(sum, turns)) / 2)}
        uneven |= said
    assert len(uneven) > 1
