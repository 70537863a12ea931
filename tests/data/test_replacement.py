"""A bad sample is replaced alike on all ranks that read it, said once, counted, and too many end the run."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megawan.agreement import describe_samples
from megawan.data.batch import Batch, Sample
from megawan.data.latents import LatentStore
from megawan.data.loader import make_loader
from megawan.data.replacement import ATTEMPTS, BadSamples, problem_of, read_or_replace, substitute
from tests.data.stores import IMAGE, VIDEO, make_store


def loaded(
    data: LatentStore, *, max_bad: float = 0.5, micro_batch: int = 4, workers: int = 0, start: int = 0
) -> Iterator[list[Batch]]:
    return make_loader(
        data,
        seed=2,
        micro_batch=micro_batch,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        text_len=6,
        prompt_dropout=0.0,
        start_step=start,
        workers=workers,
        max_bad=max_bad,
    )


def good() -> Sample:
    return Sample(torch.zeros(VIDEO), torch.zeros(2, 8), "p", torch.zeros(5, 3), torch.zeros(7, *VIDEO[1:]))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("latents", torch.zeros(IMAGE), r"latents are \[4, 1, 2, 2\], the index says \[4, 3, 2, 2\]"),
        ("latents", torch.full(VIDEO, torch.inf), "latents has values that are not finite"),
        ("text", torch.zeros(2, 9), r"text is \[2, 9\], not rows of 8"),
        ("text", torch.zeros(0, 8), r"text is \[0, 8\], not rows of 8"),
        ("text", torch.full((2, 8), torch.nan), "text has values"),
        ("clip", torch.full((5, 3), torch.nan), "clip has values"),
        ("condition", torch.zeros(7, 1, 2, 2), r"condition is \[7, 1, 2, 2\] for latents of"),
        ("condition", torch.full((7, *VIDEO[1:]), -torch.inf), "condition has values"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(name: str, value: torch.Tensor, words: str) -> None:
    assert problem_of(good(), VIDEO, 8) == ""
    assert re.match(words, problem_of(replace(good(), **{name: value}), VIDEO, 8))


def test_a_substitute_is_a_function_of_place_and_attempt_and_never_the_sample_itself() -> None:
    ids = [3, 5, 8, 9]
    for sample in ids:
        drawn = [substitute(ids, sample, 0, attempt, 1) for attempt in range(1, 60)]
        assert drawn == [substitute(ids, sample, 0, attempt, 1) for attempt in range(1, 60)]
        assert set(drawn) == set(ids) - {sample}
        assert drawn != [substitute(ids, sample, 1, attempt, 1) for attempt in range(1, 60)]
    assert substitute([4], 4, 0, 1, 1) is None


def test_bad_samples_are_replaced_by_good_ones_said_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "s", [VIDEO] * 7 + [IMAGE], bad=[2])
    shard = tmp_path / "s" / "shard_00004.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    steps = loaded(store)
    batches = [next(steps)[0] for _ in range(14)]
    read = [sample for batch in batches for sample in batch.sample_ids.tolist()]
    assert not {2, 4} & set(read) and {0, 1, 3, 5, 6, 7} == set(read)
    assert all(batch.latents.isfinite().all() for batch in batches)
    met = [bad.sample_id for batch in batches for bad in batch.replaced]
    assert met.count(2) >= 7 and met.count(4) >= 7, "each is met in every epoch"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert any(
        line.startswith(f"data-parallel rank 0: replaced sample 2 ({tmp_path / 's'}/shard_00002.safetensors,")
        and line.endswith("made of 2.mp4): latents has values that are not finite")
        for line in said
    )
    assert any("sample 4" in line and "cannot read" in line for line in said)
    # The next rank of the context-parallel group, and a resumed run, replace alike.
    again = loaded(store, start=5)
    assert [next(again)[0].sample_ids.tolist() for _ in range(9)] == [
        batch.sample_ids.tolist() for batch in batches[5:]
    ]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_rank_that_alone_reads_badly_has_other_samples_to_agree_on(tmp_path: Path) -> None:
    make_store(tmp_path / "sound", [VIDEO] * 6)
    shutil.copytree(tmp_path / "sound", tmp_path / "broken")
    shard = tmp_path / "broken" / "shard_00003.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    sound, broken = (
        describe_samples(next(loaded(LatentStore(tmp_path / name), micro_batch=6)))
        for name in ("sound", "broken")
    )
    assert sound != broken


@pytest.mark.parametrize(("max_bad", "allowed"), [(0.0, 0), (0.01, 1), (0.29, 2)])
def test_too_many_bad_samples_end_the_run(tmp_path: Path, max_bad: float, allowed: int) -> None:
    store = make_store(tmp_path / "s", [VIDEO] * 7, bad=[0, 1, 2])
    steps = loaded(store, max_bad=max_bad, micro_batch=1)
    with pytest.raises(BadSamples) as caught:
        for _ in range(14):
            next(steps)
    assert str(caught.value).startswith(
        f"{allowed + 1} samples that cannot be trained on, where --data.max_bad {max_bad} of 7 allows"
        f" {allowed}; the last: sample "
    )
    assert "\n" not in str(caught.value) and "tools/encode_dataset.py" in str(caught.value)


def test_bad_samples_in_a_row_and_one_without_substitute_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadSamples, match=f"^{ATTEMPTS} samples in a row cannot be trained on; the last: "):
        next(loaded(make_store(tmp_path / "all", [VIDEO] * 5, bad=range(5)), max_bad=1.0))
    with pytest.raises(BadSamples, match="^a sample without a substitute cannot be trained on"):
        steps = loaded(make_store(tmp_path / "one", [VIDEO] * 3 + [IMAGE], bad=[3]), max_bad=1.0)
        for _ in range(8):
            next(steps)


def test_attempts_go_on_until_a_good_one() -> None:
    asked: list[int] = []

    def read(sample_id: int) -> Sample:
        asked.append(sample_id)
        if len(asked) < 4:
            raise OSError("stale\nfile handle")
        return good()

    taken, _, bad = read_or_replace(
        read, str, samples=range(50), shape=VIDEO, text_dim=8, sample_id=7, epoch=1, seed=0
    )
    assert [each.sample_id for each in bad] == asked[:3] and taken == asked[3] and asked[0] == 7
    assert str(bad[0]) == "sample 7 (7): stale file handle"
    assert asked[1:] == [substitute(range(50), 7, 1, attempt, 0) for attempt in (1, 2, 3)]


def test_nothing_stands_in_while_a_store_is_being_filled() -> None:
    def gone(sample_id: int) -> Sample:
        raise ValueError("the encoding worker was not heard")

    def infinite(sample_id: int) -> Sample:
        return replace(good(), latents=torch.full(VIDEO, torch.inf))

    place = {"samples": (), "shape": VIDEO, "text_dim": 8, "sample_id": 7, "epoch": 0, "seed": 0}
    with pytest.raises(ValueError, match="^the encoding worker was not heard$"):
        read_or_replace(gone, str, **place)
    with pytest.raises(BadSamples, match="without a substitute cannot be trained on; the last: sample 7"):
        read_or_replace(infinite, str, **place)


def test_a_caption_that_does_not_fit_the_model_is_no_bad_sample_but_one_line(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [VIDEO] * 3)
    steps = make_loader(
        store, seed=0, micro_batch=3, accumulation=1, dp_rank=0, dp_size=1, text_len=2, prompt_dropout=0.0,
        start_step=0, workers=0,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"text of 3 rows does not fit the model's 2; encode with --text_len 2"
    ):
        next(steps)


def test_a_split_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [VIDEO] * 3)
    for changed, words in (
        ({"dp_rank": 2}, "dp_rank 2 is not below dp_size 2"),
        ({"shape_group": 3}, "a micro-batch of 2 has one shape and does not divide groups of 3"),
        ({"shape_group": 6}, "groups of 6 places do not divide the global batch of 4"),
    ):
        split = {"dp_rank": 0, "shape_group": 0, **changed}
        with pytest.raises(ValueError, match=words):
            make_loader(
                store, seed=0, micro_batch=2, accumulation=1, dp_size=2, text_len=6, prompt_dropout=0.0,
                start_step=0, workers=0, **split,
            )  # fmt: skip
