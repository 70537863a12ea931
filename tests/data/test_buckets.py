"""Buckets: within every budget, never cutting or enlarging more than said, and only better with more room."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megawan.data.buckets import (
    Bucket,
    Budget,
    Stride,
    halving_lengths,
    kept_share,
    tokens_of,
    upscale,
)

WAN21: Stride = (4, 8, 8)
SIDES = st.integers(1, 4000)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    stride = draw(st.sampled_from([WAN21, (4, 16, 16)]))
    step = 2 * stride[1] * draw(st.integers(1, 3))
    lengths = draw(st.sets(st.integers(0, 30).map(lambda n: 4 * n + 1), min_size=1, max_size=5))
    least = tokens_of(Bucket(max(lengths), step, step), stride)
    return Budget(
        tuple(lengths),
        draw(st.integers(step * step, 1280 * 720)),
        draw(st.none() | st.integers(least, 80_000)),
        step,
        stride,
        draw(st.sampled_from([1.0, 1.0, 1.5, 4.0])),
    )


def bucket_of(budget: Budget, frames: int, height: int, width: int) -> Bucket | None:
    length = budget.length_of(frames)
    if length is None:
        return None
    try:
        return Bucket(length, *budget.size_of(length, height, width))
    except ValueError:
        return None


def shown(bucket: Bucket, height: int, width: int) -> int:
    """Pixels of the largest whole picture inside the bucket, times height x width: an integer."""
    return min(bucket.width * height, bucket.height * width) ** 2


@settings(deadline=None)
@given(budgets(), st.integers(1, 300), SIDES, SIDES)
def test_a_bucket_is_within_every_budget(budget: Budget, frames: int, height: int, width: int) -> None:
    bucket = bucket_of(budget, frames, height, width)
    assume(bucket is not None)
    assert bucket is not None
    assert bucket.frames <= frames and bucket.frames in budget.lengths and bucket.frames % 4 == 1
    assert bucket.height % budget.step == 0 and bucket.width % budget.step == 0
    assert bucket.height * bucket.width <= budget.max_area
    assert budget.max_tokens is None or tokens_of(bucket, budget.stride) <= budget.max_tokens
    assert upscale(height, width, bucket) <= budget.max_upscale * (1 + 1e-6)


@settings(deadline=None)
@given(budgets(), SIDES, SIDES)
def test_less_than_one_step_of_one_side_is_cut(budget: Budget, height: int, width: int) -> None:
    bucket = bucket_of(budget, max(budget.lengths), height, width)
    assume(bucket is not None)
    assert bucket is not None
    scale = max(bucket.height / height, bucket.width / width)
    contained = min(bucket.height / height, bucket.width / width)
    # A bucket one step smaller on the longer side would hold the same whole picture and cut less.
    beyond = (bucket.height - contained * height, bucket.width - contained * width)
    assert min(beyond) < 1e-6 and max(beyond) < budget.step
    assert kept_share(height, width, bucket) == pytest.approx(
        bucket.height * bucket.width / (scale * height * scale * width)
    )


@settings(deadline=None)
@given(budgets(), SIDES, SIDES)
def test_no_other_legal_size_shows_more_or_cuts_less(budget: Budget, height: int, width: int) -> None:
    length = max(budget.lengths)
    bucket = bucket_of(budget, length, height, width)
    best = (0, 0.0)
    for rows in range(1, 40):
        for columns in range(1, 40):
            other = Bucket(length, rows * budget.step, columns * budget.step)
            legal = other.height * other.width <= budget.max_area
            legal &= budget.max_tokens is None or tokens_of(other, budget.stride) <= budget.max_tokens
            if legal and upscale(height, width, other) <= budget.max_upscale:
                best = max(best, (shown(other, height, width), kept_share(height, width, other)))
    if bucket is None:
        assert best == (0, 0.0)
    elif max(bucket.height, bucket.width) < 40 * budget.step:
        assert shown(bucket, height, width) == best[0]
        assert kept_share(height, width, bucket) == pytest.approx(best[1])


@settings(deadline=None)
@given(budgets(), st.integers(1, 200), SIDES, SIDES, st.integers(1, 300), st.integers(1, 3))
def test_more_room_never_shows_less(
    budget: Budget, frames: int, height: int, width: int, more: int, times: int
) -> None:
    bucket = bucket_of(budget, frames, height, width)
    assume(bucket is not None)
    assert bucket is not None
    longer = budget.length_of(frames + more)
    assert longer is not None and longer >= bucket.frames
    for roomier in (
        replace(budget, max_area=budget.max_area + 1000 * more),
        replace(budget, max_tokens=None if budget.max_tokens is None else budget.max_tokens + 10 * more),
        replace(budget, max_upscale=budget.max_upscale * (1 + more / 100)),
    ):
        other = bucket_of(roomier, frames, height, width)
        assert other is not None and shown(other, height, width) >= shown(bucket, height, width)
    # The same picture with more pixels: measured in pixels of the bucket, as the scales differ.
    larger = bucket_of(budget, frames, times * height, times * width)
    assert larger is not None and shown(larger, height, width) >= shown(bucket, height, width)


@settings(deadline=None)
@given(budgets(), SIDES, SIDES)
def test_a_picture_that_lies_gets_the_bucket_that_lies(budget: Budget, height: int, width: int) -> None:
    upright = bucket_of(budget, max(budget.lengths), height, width)
    lying = bucket_of(budget, max(budget.lengths), width, height)
    assert (upright is None) == (lying is None)
    if upright is not None and lying is not None:
        assert (upright.height, upright.width) == (lying.width, lying.height)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1080, 1920), (480, 832)),
        ((1920, 1080), (832, 480)),
        ((480, 832), (480, 832)),
        ((1000, 1000), (624, 624)),
        ((480, 640), (480, 640)),  # smaller than the budget: as it is
        ((250, 330), (240, 320)),
    ],
)
def test_the_sizes_that_people_expect_of_480p(picture: tuple[int, int], size: tuple[int, int]) -> None:
    budget = Budget((81,), 480 * 832, None, 16, WAN21)
    assert budget.size_of(81, *picture) == size


def test_small_pictures_are_enlarged_only_when_asked() -> None:
    budget = Budget((81,), 480 * 832, None, 16, WAN21)
    assert budget.size_of(81, 240, 416) == (240, 416)
    assert replace(budget, max_upscale=2.0).size_of(81, 240, 416) == (480, 832)
    with pytest.raises(ValueError, match="is 300x12, smaller than 16x16.*--max_upscale"):
        budget.size_of(81, 12, 300)


def test_tokens_limit_long_clips_more_than_short_ones() -> None:
    assert tokens_of(Bucket(81, 480, 832), WAN21) == 32_760
    assert tokens_of(Bucket(121, 704, 1280), (4, 16, 16)) == 27_280
    budget = Budget((81, 41), 480 * 832, 17_160, 16, WAN21)
    assert budget.size_of(41, 1080, 1920) == (480, 832)
    height, width = budget.size_of(81, 1080, 1920)
    assert (height, width) == (336, 608)
    assert (budget.length_of(200), budget.length_of(80), budget.length_of(40)) == (81, 41, None)


def test_lengths_are_halved() -> None:
    assert halving_lengths(81) == (81, 41, 21, 9, 5)
    assert halving_lengths(121) == (121, 61, 29, 13, 5)
    assert halving_lengths(5) == (5,)
    assert halving_lengths(1) == (1,)
    with pytest.raises(ValueError, match=r"4n\+1.*given: 80"):
        halving_lengths(80)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": (80,)}, r"4n\+1; given: 80"),
        ({"lengths": ()}, "given: none"),
        ({"step": 8}, "multiple of 16; given: 8"),
        ({"step": 16, "stride": (4, 16, 16)}, "multiple of 32; given: 16"),
        ({"max_upscale": 0.0}, "above 0"),
        ({"max_upscale": float("nan")}, "above 0"),
        ({"max_area": 255}, "255 pixels does not hold one 16x16"),
        ({"max_tokens": 20}, r"20 tokens do not hold 81 frames of 16x16 \(21 tokens\)"),
    ],
)
def test_a_budget_that_nothing_fits_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(Budget((81, 41), 480 * 832, None, 16, WAN21), **change)  # type: ignore[arg-type]
