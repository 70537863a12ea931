"""The toy dataset: every clip shows what its caption says, before and after the codec; folders are whole."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megawan.data.toy import (
    BACKGROUND,
    CAPTIONS,
    COLOURS,
    DIRECTIONS,
    ToyOptions,
    ToyReading,
    make_dataset,
    measure_clip,
    parse_caption,
    render_clip,
)
from megawan.data.video import Frames, read_clip
from megawan.encoders.dct import DctCodec
from megawan.rng import generator_at

ROOT = Path(__file__).resolve().parents[2]
SMALL = ToyOptions(clips=24, seed=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "default"
    assert make_dataset(folder, ToyOptions())
    return folder


def expected(index: int) -> ToyReading:
    caption = parse_caption(CAPTIONS[index % 24])
    return ToyReading(caption.colour, caption.direction)


def through_codec(frames: Frames, noise: float = 0.0) -> Frames:
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = DctCodec().encode(pixels)
    latents += noise * torch.randn(latents.shape, generator=generator_at(0, "noise"))
    decoded = (DctCodec().decode(latents)[0].permute(1, 2, 3, 0) + 1) * 127.5
    return decoded.round().to(torch.uint8).numpy()


def test_the_captions_are_all_24_and_parse_back() -> None:
    assert len(set(CAPTIONS)) == 24
    parts = [parse_caption(caption) for caption in CAPTIONS]
    assert {(part.colour, part.shape, part.direction) for part in parts} == {
        (colour, shape, direction)
        for colour in ("red", "green", "blue")
        for shape in ("circle", "square")
        for direction in ("left", "right", "up", "down")
    }
    assert parse_caption(" a red circle moving right ").direction == "right"


@pytest.mark.parametrize("text", ["", "a pink circle moving right", "a red circle", "red circle moving left"])
def test_other_captions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no caption"):
        parse_caption(text)


def test_every_clip_is_measured_right_from_its_file_and_after_the_codec(dataset: Path) -> None:
    with open(dataset / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 192
    assert set(Counter(row["prompt"] for row in rows).values()) == {8}
    for index, row in enumerate(rows):
        assert row["prompt"] == CAPTIONS[index % 24]
        frames = read_clip(dataset / row["video"], 9, 64, 64, 16)
        assert measure_clip(frames) == expected(index), row
        assert measure_clip(through_codec(frames)) == expected(index), row
        assert measure_clip(through_codec(frames, noise=0.4)) == expected(index), row


def test_latents_of_the_clips_have_about_unit_scale() -> None:
    clips = np.stack([render_clip(index, ToyOptions()) for index in range(48)])
    latents = DctCodec().encode(torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    deviation = latents.transpose(0, 1).flatten(1).std(dim=1)
    assert deviation.min() > 0.5
    assert deviation.max() < 1.6
    assert latents.transpose(0, 1).flatten(1).mean(dim=1).abs().max() < 0.3


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("frames", [5, 13])
def test_the_shape_stays_inside_the_picture(size: int, frames: int) -> None:
    options = ToyOptions(seed=1, size=size, frames=frames)
    for index in range(48):
        clip = render_clip(index, options)
        assert clip.shape == (frames, size, size, 3)
        for border in (clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]):
            assert (border == BACKGROUND).all()
        assert measure_clip(clip) == expected(index)


def test_clips_of_one_caption_differ_in_start_speed_and_size() -> None:
    clips = [render_clip(24 * repeat, ToyOptions()) for repeat in range(8)]
    covered = {int((clip[0] != BACKGROUND).any(axis=2).sum()) for clip in clips}
    assert len(covered) >= 5
    assert len({clip[0].tobytes() for clip in clips}) == 8


def test_measuring_survives_blur_noise_and_a_grey_world() -> None:
    draw = np.random.default_rng(0)
    for index in range(24):
        clip = render_clip(index, SMALL).astype(float)
        blurred = sum(np.roll(clip, (y, x), axis=(1, 2)) for y in (-2, 0, 2) for x in (-2, 0, 2)) / 9
        noisy = 0.6 * blurred + 50 + draw.normal(0, 12, clip.shape)
        assert measure_clip(np.clip(noisy, 0, 255).astype(np.uint8)) == expected(index)


def test_a_clip_that_shows_nothing_reads_none() -> None:
    grey = np.full((9, 64, 64, 3), 90, np.uint8)
    assert measure_clip(grey) == ToyReading("none", "none")
    still = np.repeat(render_clip(0, SMALL)[:1], 9, axis=0)
    assert measure_clip(still) == ToyReading("red", "none")
    assert measure_clip(still[:1]) == ToyReading("red", "none")
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        measure_clip(grey[0])


def test_playing_backwards_and_turning_turns_the_direction() -> None:
    clip = render_clip(CAPTIONS.index("a blue square moving right"), SMALL)
    assert measure_clip(clip[::-1]) == ToyReading("blue", "left")
    assert measure_clip(clip[:, :, ::-1]) == ToyReading("blue", "left")
    assert measure_clip(clip.transpose(0, 2, 1, 3)) == ToyReading("blue", "down")
    assert measure_clip(clip[..., ::-1]) == ToyReading("red", "right")
    assert set(DIRECTIONS) == {"right", "left", "up", "down"}
    assert tuple(COLOURS) == ("red", "green", "blue")  # measure_clip reads channels in this order


def test_equal_options_give_equal_files(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", SMALL)
    make_dataset(tmp_path / "b" / "deep", SMALL)
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    second = tmp_path / "b" / "deep"
    assert first == {path.relative_to(second): path.read_bytes() for path in second.rglob("*.*")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_finished_dataset_is_left_alone_and_other_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    options = ToyOptions(clips=2, size=32)
    assert make_dataset(folder, options)  # an empty folder is fine
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not make_dataset(folder, options)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        make_dataset(folder, ToyOptions(clips=2, size=32, seed=1))
    (folder / "clips" / "00001.mp4").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its files, first clips/00001\.mp4"):
        make_dataset(folder, options)
    (folder / "toy.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        make_dataset(folder, options)
    (folder / "toy.json").unlink()
    with pytest.raises(ValueError, match="not empty"):
        make_dataset(folder, options)
    with pytest.raises(ValueError, match="is a file"):
        make_dataset(folder / "metadata.csv", options)


def test_a_dataset_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, frames: Frames, fps: float) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("megawan.data.toy.write_mp4", full_disk)
    with pytest.raises(OSError, match="no space"):
        make_dataset(tmp_path / "toy", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values", [{"clips": 0}, {"frames": 8}, {"frames": 1}, {"size": 40}, {"size": 16}, {"fps": 0}]
)
def test_illegal_options_say_what_is_legal(values: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(values))} must be .*given: {next(iter(values.values()))}"
    ):
        ToyOptions(**values)


def test_the_command_makes_a_dataset_once_and_refuses_in_one_line(tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "make_toy_dataset.py"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    flags = ("--output", "toy", "--clips", "3", "--size", "32")
    done = run(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 clips" in done.stdout
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["clips"] == 3
    assert "nothing to do" in run(*flags).stdout
    refused = run("--output", "other", "--frames", "8")
    assert refused.returncode == 2
    assert refused.stderr.startswith("tools/make_toy_dataset.py: error: frames must be 4n+1")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
