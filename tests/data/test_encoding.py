"""From files to a store: windows, buckets, images, restarts, and a report that says what was left out."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch

from megawan.data.buckets import Budget
from megawan.data.cutting import ClipSize, CutOptions, clip_size, cut, plan_windows
from megawan.data.encoding import REJECTED, to_pixels
from megawan.data.latents import LatentStore
from megawan.data.video import BadClip, pictures
from megawan.encoders.dct import DctCodec
from megawan.files import write_tensors
from megawan.rng import generator_at
from tests.data.encoding import contents, listed, make_media, numbers, ramp, run, write

FIXED = ClipSize(5, 32, 32, 16)
BUDGET = Budget((13, 9, 5), 48 * 64, None, 16, (4, 8, 8))
AUTO = ClipSize(13, 32, 32, 16, BUDGET)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every length, shape and kind, and damaged ones."""
    return make_media(tmp_path_factory.mktemp("media"))


def names(media: Path) -> list[str]:
    return sorted(path.name for path in media.iterdir())


# What a file gives.


@pytest.mark.parametrize(
    ("name", "frames"),
    [("moving.webp", 12), ("moving.png", 12), ("moving.gif", 12), ("still.gif", 1), ("still.webp", 1)],
)
def test_animations_are_clips_and_stills_are_one_frame(media: Path, name: str, frames: int) -> None:
    found = list(pictures(media / name, 16))  # six pictures of 125 ms (gif: 120) are twelve of 1/16 s
    assert len(found) == frames
    assert [frame.still for frame in found] == [frames == 1] * frames
    level = [numbers(frame.pixels[None])[0] for frame in found]
    assert level == sorted(level) and level[0] == 0 and level[-1] == (5 if frames > 1 else 0)


@pytest.mark.parametrize("size", [FIXED, AUTO])
@pytest.mark.parametrize("name", ["still.png", "still.jpg", "still.webp", "still.gif"])
def test_an_image_is_a_sample_of_one_frame(media: Path, name: str, size: ClipSize) -> None:
    (window,) = cut(media / name, size)
    assert window.frames.shape == (1, *size.size_of(1, *((90, 60) if name == "still.jpg" else (40, 60))), 3)


@pytest.mark.parametrize(
    ("windows", "stride", "starts"),
    [
        (1, None, [0]),
        (2, None, [0, 5]),
        (None, None, [0, 5, 10, 15]),
        (None, 3, [0, 3, 6, 9, 12, 15, 18]),
        (None, 9, [0, 9, 18]),
        (9, 18, [0, 18]),
    ],
)
def test_windows_start_every_stride_frames(
    media: Path, windows: int | None, stride: int | None, starts: list[int]
) -> None:
    size = ClipSize(5, 16, 16, None, windows=windows, window_stride=stride)
    found = list(cut(media / "long.mkv", size))
    assert [window.start for window in found] == starts
    assert [window.number for window in found] == list(range(len(starts)))
    assert [window.last for window in found] == [False] * (len(starts) - 1) + [True]
    for window in found:
        assert numbers(window.frames) == list(range(window.start, window.start + 5))


def test_windows_are_counted_after_resampling(media: Path) -> None:
    size = ClipSize(5, 16, 16, 16, windows=None)
    found = list(cut(media / "fast.mkv", size))  # 40 frames at 32 a second are 20 at 16
    assert [window.start for window in found] == [0, 5, 10, 15]
    assert numbers(found[1].frames) == [10, 12, 14, 16, 18]


@pytest.mark.parametrize(
    ("frames", "windows", "starts"),
    [
        (23, 2, [0, 18]),
        (23, 3, [0, 9, 18]),
        (23, 4, [0, 6, 12, 18]),  # 18 / 3
        (23, 5, [0, 4, 9, 13, 18]),  # rounded down
        (6, 3, [0, 1]),  # only two places
        (5, 3, [0]),
    ],
)
def test_uniform_windows_reach_from_the_start_to_the_end(
    tmp_path: Path, frames: int, windows: int, starts: list[int]
) -> None:
    path = write(tmp_path / "a.mkv", ramp(frames))
    size = ClipSize(5, 16, 16, None, windows=windows, spread=True)
    found = list(cut(path, size))
    assert [window.start for window in found] == starts
    assert [numbers(window.frames)[0] for window in found] == starts
    assert [window.last for window in found] == [False] * (len(starts) - 1) + [True]


def test_uniform_windows_of_a_damaged_clip_are_spread_up_to_the_damage(media: Path) -> None:
    found = list(cut(media / "zeroed.avi", ClipSize(5, 16, 16, None, windows=3, spread=True)))
    whole = len(list(cut(media / "zeroed.avi", ClipSize(1, 16, 16, None, windows=None))))
    assert [window.start for window in found] == [0, (whole - 5) // 2, whole - 5]
    assert [window.cut_short is None for window in found] == [True, True, False]


@pytest.mark.parametrize("name", ["still.png", "still.jpg", "still.webp", "still.gif"])
@pytest.mark.parametrize(
    "size",
    [
        replace(FIXED, least=2),
        replace(AUTO, least=2),
        ClipSize(
            5, 32, 32, 16, Budget((5, 1), 48 * 64, None, 16, (4, 8, 8)), windows=2, spread=True, least=2
        ),
    ],
)
def test_a_model_of_first_and_last_frame_takes_no_image(media: Path, name: str, size: ClipSize) -> None:
    with pytest.raises(BadClip, match="has 1 frames at 16 fps; 2 are needed"):
        list(cut(media / name, size))
    with pytest.raises(ValueError, match="has 1 frames; 2 are needed"):
        plan_windows(1, 40, 60, size, still=True)
    if size.budget is not None and 1 in size.budget.lengths:  # nor a clip as short as one
        assert size.length_of(4) is None and size.fewest_frames() == 5


# (windows, window_stride, spread, least) of a ClipSize
PLACEMENTS = (
    *((1, None, False, 1), (2, None, False, 1), (None, None, False, 2), (None, 1, False, 1)),
    *((2, 4, False, 1), (None, 20, False, 1), (2, None, True, 1), (5, None, True, 2)),
)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_what_is_planned_is_what_is_cut(
    media: Path, budget: Budget | None, placement: tuple[int | None, int | None, bool, int]
) -> None:
    size = ClipSize(13, 48, 64, 16, budget, *placement)
    gave = 0
    for name in names(media):
        try:
            found = [(window.start, window.frames.shape[:3]) for window in cut(media / name, size)]
        except BadClip:
            found = []
        seen, shape, still, damaged = 0, (1, 1), False, False
        try:
            for frame in pictures(media / name, 16):
                shape = frame.pixels.shape[:2] if not seen else shape
                seen, still = seen + 1, frame.still
        except BadClip:
            damaged = True
        try:
            bucket, starts = plan_windows(seen, *shape, size, still=still, damaged=damaged)
            planned = [(start, (bucket.frames, bucket.height, bucket.width)) for start in starts]
        except ValueError:
            planned = []
        assert found == planned, name
        gave += bool(found)
    assert gave >= (9 if size.least == 1 else 5)


def test_damage_behind_a_window_keeps_it_and_is_told(media: Path) -> None:
    found = list(cut(media / "zeroed.avi", ClipSize(5, 16, 16, None, windows=None)))
    assert 1 <= len(found) <= 3
    assert found[-1].last and "damaged frame, number" in str(found[-1].cut_short)
    assert [window.cut_short for window in found[:-1]] == [None] * (len(found) - 1)
    (first,) = cut(media / "zeroed.avi", ClipSize(5, 16, 16, None))
    assert first.cut_short is None  # nobody looked that far
    with pytest.raises(BadClip, match="damaged frame, number"):
        list(cut(media / "zeroed.avi", ClipSize(17, 16, 16, None)))
    with pytest.raises(BadClip, match="damaged frame, number"):  # not a shorter clip in its place
        list(cut(media / "zeroed.avi", ClipSize(17, 16, 16, None, Budget((17, 5), 999, None, 16, (4, 8, 8)))))


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("shorter.mkv", FIXED, "has 4 frames at 16 fps; 5 are needed"),
        ("shorter.mkv", AUTO, "has 4 frames at 16 fps; 5 are needed"),
        ("tiny.mkv", AUTO, "is 36x8, smaller than 16x16"),
    ],
)
def test_what_fits_no_bucket_is_refused_with_the_reason(
    media: Path, name: str, size: ClipSize, said: str
) -> None:
    with pytest.raises(BadClip, match=said):
        list(cut(media / name, size))


# Flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_frames": 80}, "--num_frames 80 must be 4n.1"),
        ({"height": 40}, "--height 40 must be a multiple of 16"),
        ({"windows": "0"}, "--windows 0 must be a whole number above 0, or all"),
        ({"windows": "many"}, "--windows many"),
        ({"windows": "2", "window_stride": 0}, "--window_stride 0"),
        ({"window_stride": 8}, "--window_stride means nothing with one window"),
        ({"window_placement": "uniform"}, "uniform needs --windows 2 or more, not 1"),
        ({"window_placement": "uniform", "windows": "all"}, "uniform needs --windows 2 or more, not all"),
        ({"window_placement": "uniform", "windows": "2", "window_stride": 3}, "give one of them"),
        ({"max_tokens": 100}, "--max_tokens needs --bucket auto"),
        ({"bucket": "auto", "max_area": "4x4x4"}, "--max_area 4x4x4"),
        ({"bucket": "auto", "max_area": "big"}, "--max_area big"),
        ({"bucket": "auto", "frame_buckets": "81,x"}, "--frame_buckets x"),
        ({"bucket": "auto", "frame_buckets": "41,21"}, "must contain --num_frames 81"),
        ({"bucket": "auto", "frame_buckets": "97,81"}, "97 is above --num_frames 81"),
        ({"bucket": "auto", "bucket_step": 24}, "multiple of 16; given: 24"),
        ({"bucket": "auto", "max_tokens": 3}, "3 tokens do not hold"),
        ({"fps": "fast"}, "--fps fast must be a number above 0, or keep"),
    ],
)
def test_flags_that_contradict_or_mean_nothing_are_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        clip_size(CutOptions(**flags), (4, 8, 8))  # type: ignore[arg-type]


def test_flags_become_a_size() -> None:
    spread = clip_size(CutOptions(windows="4", window_placement="uniform"), (4, 8, 8), still_images=False)
    assert spread == ClipSize(81, 480, 832, 16.0, windows=4, spread=True, least=2)
    written = {"num_frames": 81, "height": 480, "width": 832, "fps": 16.0, "windows": 4}
    assert spread.settings() == written | {"window_placement": "uniform"}
    with pytest.raises(ValueError, match="--num_frames 5"):
        clip_size(CutOptions(num_frames=1), (4, 8, 8), still_images=False)
    assert clip_size(CutOptions(), (4, 8, 8)) == ClipSize(81, 480, 832, 16.0)
    auto = CutOptions(bucket="auto", max_area="480*832", max_tokens=32760, windows="all", fps="keep")
    budget = Budget((81, 41, 21, 9, 5), 480 * 832, 32760, 32, (4, 16, 16))
    assert clip_size(auto, (4, 16, 16)) == ClipSize(81, 480, 832, None, budget, None)
    assert clip_size(CutOptions(bucket="auto", frame_buckets="49, 81"), (4, 8, 8)).budget == Budget(
        (49, 81), 480 * 832, None, 16, (4, 8, 8)
    )


# Stores.


def test_each_window_is_a_sample_with_its_own_latents(media: Path, tmp_path: Path) -> None:
    size = ClipSize(5, 32, 32, 16, windows=None)
    report = run(listed(media, "long.mkv", "short.mkv", "still.png"), tmp_path / "s", size)
    assert report.store is not None and (report.encoded, report.kept, report.rejected) == (6, 0, [])
    files = ["long.mkv", "short.mkv", "still.png"]
    windows = [(name, window.frames) for name in files for window in cut(media / name, size)]
    assert len(windows) == len(report.store)
    for number, (name, frames) in enumerate(windows):
        sample = report.store[number]
        assert torch.equal(sample.latents, DctCodec("cpu").encode(to_pixels(frames))[0])
        assert sample.prompt == f"caption of {name}"
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert [row["start"] for row in index["samples"]] == [0, 5, 10, 15, 0, 0]
    assert len({row["key"] for row in index["samples"]}) == 6
    one = run(listed(media, "long.mkv", "short.mkv"), tmp_path / "one", FIXED).store
    other = run(
        listed(media, "long.mkv", "short.mkv"), tmp_path / "other", ClipSize(5, 32, 32, 16, windows=2)
    ).store
    assert one is not None and other is not None and one.fingerprint != other.fingerprint


def test_a_store_of_one_size_and_one_window_is_as_it_always_was(media: Path, tmp_path: Path) -> None:
    run(listed(media, "long.mkv"), tmp_path / "s", FIXED)
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert list(index["settings"])[-4:] == ["num_frames", "height", "width", "fps"]
    assert set(index["samples"][0]) == {"key", "shape", "prompt", "source", "source_sha256", "shard"}
    # blake2b of "<sha256>\n<caption>": the key of a first window never changes
    assert len(index["samples"][0]["key"]) == 24


def test_every_clip_gets_its_bucket(media: Path, tmp_path: Path) -> None:
    report = run(listed(media, *names(media)), tmp_path / "s", AUTO)
    assert report.store is not None
    shapes = {
        row["source"]: tuple(row["shape"])
        for row in json.loads((tmp_path / "s/index.json").read_text())["samples"]
    }
    assert shapes["long.mkv"] == (16, 4, 6, 8)
    assert shapes["exact.mkv"] == (16, 4, 8, 6)
    assert shapes["short.mkv"] == (16, 2, 6, 8)
    assert shapes["moving.webp"] == (16, 3, 4, 6)
    assert shapes["small.mkv"] == (16, 4, 4, 4)
    assert shapes["still.jpg"] == (16, 1, 8, 6)
    rejected = {row.path.name: why for row, why in report.rejected}
    assert sorted(rejected) == ["early.avi", "empty.mkv", "shorter.mkv", "text.mp4", "tiny.mkv"]
    settings = json.loads((tmp_path / "s" / "index.json").read_text())["settings"]
    assert settings["bucket"] == {
        "lengths": [5, 9, 13], "max_area": 3072, "max_tokens": None, "step": 16, "max_upscale": 1.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="encoded with other settings .bucket"):
        run(listed(media, "long.mkv"), tmp_path / "s", ClipSize(13, 32, 32, 16))


def test_a_pipe_is_not_waited_for(media: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    manifest = listed(tmp_path, "pipe.mp4")
    with pytest.raises(ValueError, match=r"0 usable clips of 1; the first: .*is not a regular file"):
        run(manifest, tmp_path / "s", FIXED)


@pytest.mark.parametrize(("windows", "spread"), [(1, False), (3, False), (3, True), (None, False)])
@pytest.mark.parametrize("shard_bytes", [1, 13_000, 40_000])
def test_a_second_call_makes_nothing_and_reports_the_same(
    media: Path, tmp_path: Path, windows: int | None, spread: bool, shard_bytes: int
) -> None:
    size = ClipSize(13, 32, 32, 16, BUDGET, windows, spread=spread)
    manifest = listed(media, *names(media), "long.mkv")
    first = run(manifest, tmp_path / "s", size, shard_bytes=shard_bytes)
    before = contents(tmp_path / "s")
    lines = [json.loads(line) for line in (tmp_path / "s" / REJECTED).read_text().splitlines()]
    again = run(manifest, tmp_path / "s", size, shard_bytes=shard_bytes)
    assert contents(tmp_path / "s") == before
    assert (again.encoded, again.kept) == (0, first.encoded)
    assert (again.rejected, again.cut_short) == (first.rejected, first.cut_short)
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    assert "listed before" in next(line["reason"] for line in lines if line["file"].endswith("long.mkv"))
    if windows is None:
        damaged = next(line for line in lines if line["file"].endswith("zeroed.avi"))
        assert damaged["samples"] == 1 and "damaged frame" in damaged["reason"]


def test_rows_that_went_away_leave_the_report(media: Path, tmp_path: Path) -> None:
    run(listed(media, "long.mkv", "text.mp4"), tmp_path / "s", FIXED)
    assert (tmp_path / "s" / REJECTED).exists()
    run(listed(media, "long.mkv"), tmp_path / "s", FIXED)
    assert not (tmp_path / "s" / REJECTED).exists()


def test_shares_give_the_samples_and_the_report_of_one_call(media: Path, tmp_path: Path) -> None:
    manifest = listed(media, *names(media))
    size = ClipSize(13, 32, 32, 16, BUDGET, None)
    whole = run(manifest, tmp_path / "whole", size)
    for number in (2, 0, 1):
        run(manifest, tmp_path / "parts", size, share=(number, 3))
    parts = run(manifest, tmp_path / "parts", size)
    assert parts.encoded == 0 and whole.store is not None and parts.store is not None
    assert parts.store.fingerprint == whole.store.fingerprint
    assert (tmp_path / "parts" / REJECTED).read_text() == (tmp_path / "whole" / REJECTED).read_text()


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_no_byte(media: Path, tmp_path: Path, workers: int) -> None:
    manifest, size = listed(media, *names(media), "long.mkv"), ClipSize(13, 32, 32, 16, BUDGET, None)
    here = run(manifest, tmp_path / "here", size)
    ahead = run(manifest, tmp_path / "ahead", size, workers=workers)
    assert contents(tmp_path / "ahead") == contents(tmp_path / "here")
    assert (ahead.rejected, ahead.cut_short) == (here.rejected, here.cut_short)
    assert run(manifest, tmp_path / "ahead", size, workers=workers).encoded == 0


class Counting(DctCodec):
    """The demo codec, which notes the shape of what it is given."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.given: list[tuple[int, ...]] = []

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the latents."""
        self.given.append(tuple(pixels.shape))
        return super().encode(pixels)


def test_samples_of_one_shape_are_encoded_together(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, size = listed(media, *names(media)), ClipSize(13, 32, 32, 16, BUDGET, None, 4)
    one = run(manifest, tmp_path / "one", size).store
    codec = Counting()
    three = run(manifest, tmp_path / "three", size, batch=3, codec=codec).store
    assert one is not None and three is not None and len(three) == len(one)
    assert three.settings == {**one.settings, "batch": 3}
    for number in range(len(one)):
        assert three[number].prompt == one[number].prompt and torch.equal(
            three[number].text, one[number].text
        )
        assert torch.allclose(three[number].latents, one[number].latents, atol=1e-5)
    shapes = Counter(shape[1:] for shape in codec.given for _ in range(shape[0]))
    assert Counter(shape[1:] for shape in codec.given) == {shape: -(-n // 3) for shape, n in shapes.items()}
    with pytest.raises(ValueError, match="batch: there 3, asked None"):
        run(manifest, tmp_path / "three", size)
    # What waits for others is bounded: two of the largest are more than may wait.
    monkeypatch.setattr("megawan.data.encoding.WAITING_BYTES", 13 * 48 * 64 * 3 - 1)
    bounded = Counting()
    run(manifest, tmp_path / "bounded", size, batch=3, codec=bounded)
    assert max(math.prod(shape) for shape in bounded.given) < max(math.prod(shape) for shape in codec.given)


@pytest.mark.parametrize("waiting", [1 << 31, 13 * 48 * 64 * 3 * 2])
def test_an_interrupted_encode_goes_on_with_the_same_batches(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr("megawan.data.encoding.WAITING_BYTES", waiting)
    manifest, size = listed(media, *names(media)), ClipSize(13, 32, 32, 16, BUDGET, None, 4)
    whole = Counting()
    run(manifest, tmp_path / "whole", size, batch=3, shard_bytes=20_000, codec=whole)
    for stop in range(1, len(whole.given), 3):
        codec = Counting()

        def stopping(pixels: torch.Tensor, codec: Counting = codec, stop: int = stop) -> torch.Tensor:
            if len(codec.given) == stop:
                raise OSError("stopped")
            return Counting.encode(codec, pixels)

        codec.encode = stopping  # type: ignore[method-assign]
        with pytest.raises(OSError, match="stopped"):
            run(manifest, tmp_path / "s", size, batch=3, shard_bytes=20_000, codec=codec)
        run(manifest, tmp_path / "s", size, batch=3, shard_bytes=20_000)
        assert contents(tmp_path / "s") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "s")


def test_a_full_disk_is_not_blamed_on_a_clip(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = listed(media, *names(media))
    expected = run(manifest, tmp_path / "whole", AUTO, shard_bytes=1).rejected
    written = 0

    def full(path: Path, *_: object) -> None:
        nonlocal written
        written += 1
        if written == 3:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_tensors(path, *_)  # type: ignore[arg-type]

    monkeypatch.setattr("megawan.data.latents.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(manifest, tmp_path / "s", AUTO, shard_bytes=1)
    monkeypatch.undo()
    assert run(manifest, tmp_path / "s", AUTO, shard_bytes=1).rejected == expected
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


# Killed at any moment.

KILLED = ClipSize(13, 32, 32, 16, BUDGET, None, 4)
KILLABLE = tuple(f"megawan/{name}.py" for name in ("files", "data/latents", "data/encoding", "data/cutting"))


def encode_until(media: str, output: str, moment: int, counted: str) -> None:
    """Encode in this process, killed by SIGKILL before the moment-th line of our writing code; 0 kills never.

    How many lines there were, and which of them write files, is written into `counted`.
    """
    lines, writing = 0, []

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(KILLABLE):
            return None
        if event == "line":
            lines += 1
            if frame.f_code.co_name in ("write_tensors", "write_text", "_rename", "sync"):
                writing.append(lines)
            if lines == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    folder = Path(media)
    sys.settrace(trace)
    run(listed(folder, *names(folder)), Path(output), KILLED, shard_bytes=20_000)
    sys.settrace(None)
    Path(counted).write_text(json.dumps([lines, writing]))


@pytest.fixture(scope="module")
def encoded(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, int], int]]:
    """A function that encodes `media` into a folder in a process of its own, and returns its exit code."""
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported this file
    context.set_forkserver_preload([__name__])
    children: list[multiprocessing.process.BaseProcess] = []

    def start(output: Path, moment: int, seconds: float = 60) -> int:
        counted = str(output.with_suffix(".lines"))
        child = context.Process(target=encode_until, args=(str(media), str(output), moment, counted))
        children.append(child)
        child.start()
        child.join(seconds)
        child.kill()
        child.join(30)
        assert child.exitcode is not None
        return child.exitcode

    yield start
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def whole(media: Path, tmp_path_factory: pytest.TempPathFactory, encoded: Callable[[Path, int], int]) -> Path:
    """What an encode that nobody disturbs gives."""
    output = tmp_path_factory.mktemp("undisturbed") / "store"
    assert encoded(output, 0) == 0
    samples = json.loads((output / "index.json").read_text())["samples"]
    clips = {}
    for row in samples:
        clips.setdefault(row["source"], set()).add(row["shard"])
    assert len(list(output.glob("shard_*"))) > 6 and max(len(shards) for shards in clips.values()) > 1
    return output


def what_is_left_is_whole(output: Path, expected: dict[str, bytes]) -> bool:
    found = contents(output) if output.exists() else {}
    return all(expected[name] == found[name] for name in found if not name.endswith(".tmp"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    seed: int, whole: Path, tmp_path: Path, encoded: Callable[[Path, int], int]
) -> None:
    expected, output = contents(whole), tmp_path / "store"
    lines, _ = json.loads(whole.with_suffix(".lines").read_text())
    draws = torch.rand(4, generator=generator_at(seed, "kill"), dtype=torch.float64).tolist()
    for kill, draw in enumerate(draws):
        # The first comes anywhere, the next ones sooner, because less and less is left to do.
        ended = encoded(output, 1 + int(draw * lines / (1 + kill)))
        assert ended in (0, -signal.SIGKILL)
        assert what_is_left_is_whole(output, expected)
        if ended == 0:
            break
    assert encoded(output, 0) == 0
    assert contents(output) == expected
    LatentStore(output).verify()


@pytest.mark.timeout(120)
def test_killed_at_any_line_that_writes_a_shard_or_the_index_it_ends_in_the_same_bytes(
    whole: Path, tmp_path: Path, encoded: Callable[[Path, int], int]
) -> None:
    expected = contents(whole)
    _, writing = json.loads(whole.with_suffix(".lines").read_text())
    shard = len(writing) // (len(expected) - 1)  # the lines that write one shard, or a few more
    for moment in writing[shard : 2 * shard] + writing[-8:]:
        output = tmp_path / f"killed{moment}"
        assert encoded(output, moment) == -signal.SIGKILL
        assert what_is_left_is_whole(output, expected)
        if moment % 3 == 0 or moment == writing[-1]:
            assert encoded(output, 0) == 0
            assert contents(output) == expected


@pytest.mark.timeout(120)
def test_killed_from_outside_it_ends_in_the_same_bytes(
    whole: Path, tmp_path: Path, encoded: Callable[..., int]
) -> None:
    output = tmp_path / "store"
    for seconds in (0.2, 0.05, 0.4, 0.1):
        encoded(output, 0, seconds)
    assert encoded(output, 0) == 0
    assert contents(output) == contents(whole)
