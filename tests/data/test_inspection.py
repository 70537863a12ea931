"""A dataset looked at: what is promised is what the encoder does, and every fault is noticed where it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megawan.cost import ModelShape, train_flops
from megawan.data.buckets import Bucket, Budget
from megawan.data.cutting import ClipSize
from megawan.data.inspection import Checked, check, look
from megawan.data.inspection_report import Layout, buckets_of, draw_histogram, summarise
from megawan.data.manifest import Row
from megawan.data.video import BadClip, Frames, crop_and_resize
from tests.commands import ROOT, command
from tests.data.encoding import listed, make_media, noise, run, write, write_image

STRIDE = (4, 8, 8)
BUDGET = Budget((13, 9, 5), 48 * 64, None, 16, STRIDE)
SIZE = ClipSize(9, 48, 64, 16)
SHAPE = ModelShape(dim=144, ffn_dim=576, num_heads=6, num_layers=6, in_dim=16, out_dim=16)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


def scene(seed: int, frames: int = 9, height: int = 48, width: int = 64) -> Frames:
    """A coarse pattern that drifts: like a video, it survives scaling and compression."""
    coarse = np.random.default_rng(seed).integers(40, 220, (6, 12, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((2 * width, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, shift : shift + width] for shift in range(frames)])


def one(folder: Path, name: str, size: ClipSize = SIZE) -> Checked:
    (checked,) = check(listed(folder, name), size, STRIDE)
    return checked


@pytest.mark.parametrize("windows", [1, 2, None])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_what_is_promised_is_what_is_encoded(
    media: Path, tmp_path: Path, budget: Budget | None, windows: int | None
) -> None:
    size = ClipSize(13, 32, 32, 16, budget, windows)
    files = sorted(path.name for path in media.iterdir())
    manifest = listed(media, *files, "long.mkv", "text.mp4", "shorter.mkv")
    manifest = replace(manifest, rows=(*manifest.rows, Row(media / "long.mkv", "another caption", 99)))
    found = check(manifest, size, STRIDE)
    report = run(manifest, tmp_path / "s", size)
    assert report.store is not None
    promised = [
        (one.row.prompt, (16, (one.bucket.frames + 3) // 4, one.bucket.height // 8, one.bucket.width // 8))
        for one in found
        if one.bucket is not None and one.dropped is None
        for _ in one.starts
    ]
    made = [(report.store[number].prompt, report.store.shapes[number]) for number in range(len(report.store))]
    assert promised == made
    dropped = {one.row.number: one.dropped for one in found if one.dropped is not None}
    assert list(dropped) == [row.number for row, _ in report.rejected]
    for row, reason in report.rejected:
        said = str(dropped[row.number])
        assert said in reason or said.split(";")[0] in reason.replace(" at 16 fps", ""), (said, reason)


def test_reading_in_other_processes_says_the_same(media: Path) -> None:
    manifest = listed(media, *sorted(path.name for path in media.iterdir()))
    size = ClipSize(13, 32, 32, 16, BUDGET, None)
    here, there = check(manifest, size, STRIDE), check(manifest, size, STRIDE, workers=2)
    assert [(one.dropped, one.bucket, one.starts, one.warnings) for one in here] == [
        (one.dropped, one.bucket, one.starts, one.warnings) for one in there
    ]


@pytest.mark.parametrize(
    ("frames", "note"),
    [
        (scene(1), None),
        (np.full((9, 48, 64, 3), 5, np.uint8), "black in 100% of its frames"),
        (np.concatenate([np.full((3, 48, 64, 3), 5, np.uint8), scene(1)]), "begins black"),
        (np.repeat(scene(1)[:1], 9, axis=0), "static"),
        (np.concatenate([scene(1)[:4], scene(2)]), "cuts to another scene at frame 4"),
        (scene(1, width=160), "the crop keeps 40% of the picture"),
    ],
)
def test_what_speaks_against_a_clip_is_noticed(tmp_path: Path, frames: Frames, note: str | None) -> None:
    write(tmp_path / "a.mkv", frames)
    checked = one(tmp_path, "a.mkv")
    assert checked.dropped is None
    if note is None:
        assert checked.warnings == []
    else:
        assert note in checked.warnings, checked.warnings


def test_a_cut_outside_the_windows_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", np.concatenate([scene(1), scene(2)]))
    assert one(tmp_path, "a.mkv").warnings == []  # the cut is where the first window ends
    assert one(tmp_path, "a.mkv", ClipSize(13, 48, 64, 16)).warnings == ["cuts to another scene at frame 9"]
    assert one(tmp_path, "a.mkv", ClipSize(9, 48, 64, 16, windows=None)).warnings == []


def test_enlarging_is_told_and_a_crop_that_loses_what_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "small.mkv", scene(1, height=24, width=32))
    assert one(tmp_path, "small.mkv").warnings == ["enlarged 2 times"]
    frames = np.full((9, 48, 80, 3), 100, np.uint8)
    frames[:, 8:40, :7], frames[:, 8:40, 74:] = noise(9)[:, :32, :7], noise(9)[:, :32, 8:14]
    write(tmp_path / "sides.mkv", frames)
    checked = one(tmp_path, "sides.mkv")
    assert checked.kept == pytest.approx(0.8) and checked.detail_kept < 0.4
    assert any("of the first frame's detail" in note for note in checked.warnings)


def test_the_kept_share_is_that_of_the_crop(tmp_path: Path) -> None:
    # A marker on all that the crop keeps survives it, one on the rest is gone.
    write_image(tmp_path / "a.png", noise(1)[:, :, :48])
    checked = one(tmp_path, "a.png", ClipSize(5, 16, 32, None))
    assert checked.bucket == Bucket(1, 16, 32)
    assert checked.kept == pytest.approx(24 / 48)
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[10:38] = 255
    assert crop_and_resize(pixels, 16, 32).min() == 255
    assert checked.detail_kept == pytest.approx(0.5, abs=0.1)


def test_repeated_and_similar_clips_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", scene(1))
    (tmp_path / "b.mkv").write_bytes((tmp_path / "a.mkv").read_bytes())
    write(tmp_path / "c.mp4", scene(1), codec="libx264", pix_fmt="yuv420p")
    write(tmp_path / "d.mkv", scene(2))
    small = [np.asarray(Image.fromarray(frame).resize((32, 24))) for frame in scene(1)]
    write(tmp_path / "e.mkv", np.stack(small))
    manifest = listed(tmp_path, "d.mkv", "a.mkv", "b.mkv", "c.mp4", "e.mkv")
    manifest = replace(manifest, rows=(*manifest.rows, manifest.rows[1]))
    found = check(manifest, SIZE, STRIDE)
    assert [one.warnings for one in found] == [
        [],
        [],
        ["the same bytes as row 2"],
        ["looks like row 2"],
        ["enlarged 2 times", "looks like row 2"],
        [],
    ]
    assert [one.dropped for one in found] == [None] * 5 + [
        "the same file with the same caption is listed before"
    ]


def test_long_captions_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", scene(1))
    for text_len, cut in ((4, False), (2, True)):
        (found,) = check(
            listed(tmp_path, "a.mkv"),
            SIZE,
            STRIDE,
            count_tokens=lambda text: len(text.split()),
            text_len=text_len,
        )
        assert (found.caption_tokens, found.caption_cut, bool(found.warnings)) == (3, cut, cut)


def test_the_file_is_described_as_it_is(media: Path) -> None:
    fast = look(media / "fast.mkv", 16)
    assert (fast.frames, fast.height, fast.width, fast.still) == (20, 48, 64, False)
    assert fast.fps == pytest.approx(32, rel=0.01)
    still = look(media / "still.gif", 16)
    assert (still.frames, still.fps, still.still, still.static) == (1, 0, True, False)
    damaged = look(media / "zeroed.avi", None)
    assert "damaged frame" in str(damaged.damage) and damaged.frames >= 13
    with pytest.raises(BadClip, match="is empty"):
        look(media / "empty.mkv", None)


def test_a_step_is_counted_for_the_layout(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", scene(1, frames=30))
    write_image(tmp_path / "b.png", scene(2, frames=1))
    found = check(listed(tmp_path, "a.mkv", "b.png"), ClipSize(9, 48, 64, 16, windows=None), STRIDE)
    assert buckets_of(found) == [(Bucket(1, 48, 64), 1, 1, 12), (Bucket(9, 48, 64), 1, 3, 36)]
    summary = summarise(found, Layout(1, 2, 1, 5), SHAPE)
    assert (summary["samples"], summary["layout"]["steps_per_epoch"]) == (4, 2)
    assert summary["layout"]["mean_tokens_per_step"] == 2 * (12 + 3 * 36) / 4
    assert summary["buckets"][1]["tokens_per_rank"] == 8
    assert summary["buckets"][1]["tflop_per_step"] == pytest.approx(2 * train_flops(SHAPE, 36) / 1e12)
    picture = np.asarray(draw_histogram(found, "test"))
    blue = (picture == (70, 110, 180)).all(axis=2).sum(axis=1)
    bars = blue[blue > 0]
    assert set(bars.tolist()) == {round(560 / 3) + 1, 561}
    with pytest.raises(ValueError, match="--dp_size 0 must be 1 or more"):
        Layout(1, 1, 0, 1)
    # Groups of 1: an epoch of 4 places on 2 ranks holds the image once, beside a clip.
    grouped = summarise(found, Layout(1, 1, 2, 1, 1), SHAPE)["layout"]
    clip, image = train_flops(SHAPE, 36), train_flops(SHAPE, 12)
    assert grouped["imbalance"] == pytest.approx((1 + 2 * clip / (clip + image)) / 2)
    assert summary["layout"]["imbalance"] == 1
    with pytest.raises(ValueError, match="--shape_group 3 must be a multiple of --micro_batch 2 and divide"):
        Layout(2, 1, 3, 1, 3)


# The command.


def test_the_command_says_what_would_be_dropped_and_exits_with_1(media: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in media.iterdir())
    rows = "".join(f"{name},a caption that is much longer than the model reads\n" for name in files)
    (media / "metadata.csv").write_text("video,prompt\n" + rows)
    flags = (
        "--variant",
        "debug",
        "--num_frames",
        "13",
        "--height",
        "48",
        "--width",
        "64",
        "--bucket",
        "auto",
    )
    words = (ROOT / "tools/check_dataset.py", "--input", media, *flags, "--windows", "all", "--dp_size", "2")
    done = command(*words, "--json", "--tokenizer", "debug", "--histogram", "h.png", cwd=tmp_path)
    assert done.code == 1, done.err[-2000:]
    said = json.loads(done.out)
    assert (said["rows"], said["dropped"], said["captions_cut"]) == (len(files), 5, len(files) - 5)
    assert {clip["file"].rpartition("/")[2] for clip in said["clips"] if clip["dropped"]} == {
        *("early.avi", "empty.mkv", "shorter.mkv", "text.mp4", "tiny.mkv"),
    }
    assert said["layout"]["global_batch"] == 2 and said["samples"] == sum(
        len(clip["starts"]) for clip in said["clips"]
    )
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.format == "PNG" and picture.height > 22 * len(said["buckets"])
    plain = command(*words, cwd=tmp_path)
    assert plain.code == 1 and "DROPPED: is empty" in plain.out and "exact.mkv" in plain.out
    assert f"{len(files)} rows: 5 would be dropped" in plain.out and "captions not measured" in plain.out
    (media / "metadata.csv").unlink()


def test_the_command_exits_with_0_1_or_2(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", scene(1))
    write(tmp_path / "b.mkv", np.repeat(scene(2)[:1], 9, axis=0))
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mkv,one\nb.mkv,two\n")
    words = (ROOT / "tools/check_dataset.py", "--input", ".", "--variant", "debug")
    size = ("--num_frames", "9", "--height", "48", "--width", "64")
    assert command(*words, *size, cwd=tmp_path).code == 0
    strict = command(*words, *size, "--strict", "--show", "problems", cwd=tmp_path)
    assert strict.code == 1 and "static" in strict.out and "a.mkv" not in strict.out
    wrong = command(*words, "--num_frames", "8", cwd=tmp_path)
    assert wrong.code == 2 and wrong.err.count("\n") == 1 and "--num_frames 8 must be 4n+1" in wrong.err
    lost = command(*words, *size, "--histogram", "no/h.png", cwd=tmp_path)
    # Before the clips are read, which may take hours.
    assert lost.code == 2 and not lost.out and "--histogram no/h.png: no folder no" in lost.err
