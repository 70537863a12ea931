"""Reading and writing clips: exact shapes from real files, and one line for every file that gives none."""

import io
import multiprocessing
import struct
import time
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megawan.data import video
from megawan.data.video import (
    MAX_FRAMES,
    BadClip,
    Frames,
    TooShort,
    crop_and_resize,
    read_all,
    read_clip,
    read_windows,
    write_mp4,
)


def ramp(frames: int, height: int = 48, width: int = 64) -> Frames:
    """Flat grey frames whose brightness tells their number: 10, 18, 26, …"""
    level = 10 + 8 * np.arange(frames)
    return np.broadcast_to(level[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(clip: Frames) -> list[int]:
    return [round((float(frame.mean()) - 10) / 8) for frame in clip]


def write(path: Path, codec: str, frames: Frames, pix_fmt: str, rate: int = 16) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def mp4(tmp_path: Path) -> Path:
    path = tmp_path / "ramp.mp4"
    write_mp4(path, ramp(20), 16)
    return path


# Good files.


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    x = np.linspace(0, 255, 64)
    frames = np.stack(
        [
            np.stack([np.tile(x, (48, 1)), np.full((48, 64), 20.0 * t), np.tile(255 - x, (48, 1))], axis=2)
            for t in range(9)
        ]
    ).astype(np.uint8)
    write_mp4(tmp_path / "clip.mp4", frames, 16)
    back, fps = read_all(tmp_path / "clip.mp4")
    assert fps == 16
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_written_file_is_h264_that_players_open_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, ramp(5), 24000 / 1001)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("frames", "fps", "said"),
    [
        (np.zeros((1, 48, 63, 3), np.uint8), 16, "even"),
        (np.zeros((0, 48, 64, 3), np.uint8), 16, "frames must be"),
        (np.zeros((1, 48, 64, 3), np.float32), 16, "float32"),
        (np.zeros((1, 48, 64, 3), np.uint8), 0, "fps"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(
    tmp_path: Path, frames: Frames, fps: float, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        write_mp4(tmp_path / "clip.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_keeps_the_old_file(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mp4.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_mp4(mp4, ramp(5), 16)
    assert mp4.read_bytes() == before
    assert [path.name for path in mp4.parent.iterdir()] == [mp4.name]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (8, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (32, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (10, [0, 1, 3, 4, 6, 8, 9, 11, 12]),
        (24, [0, 0, 1, 2, 2, 3, 4, 4, 5]),
    ],
)
def test_frames_are_those_on_screen_at_the_asked_times(
    mp4: Path, fps: float | None, expected: list[int]
) -> None:
    assert numbers(read_clip(mp4, 9, 48, 64, fps)) == expected


def test_the_last_frame_lasts_as_long_as_the_others(mp4: Path) -> None:
    # 20 frames at 16 a second are 1.25 s: 10 frames at 8 a second, 40 at 32.
    assert len(read_clip(mp4, 37, 16, 16, 32)) == 37
    with pytest.raises(BadClip, match="has 40 frames at 32 fps; 41 are needed"):
        read_clip(mp4, 41, 16, 16, 32)
    with pytest.raises(BadClip, match="has 10 frames at 8 fps; 13 are needed"):
        read_clip(mp4, 13, 16, 16, 8)
    with pytest.raises(BadClip, match="has 20 frames; 21 are needed"):
        read_clip(mp4, 21, 16, 16, None)


def test_a_variable_rate_is_sampled_by_its_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "variable.mkv"
    seconds = [0, 1, 2, 10, 20, 21, 30]  # tenths
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for pixels, pts in zip(ramp(7), seconds, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = pts, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert numbers(read_clip(path, 5, 48, 64, 2)) == [0, 2, 3, 3, 4]
    assert numbers(read_clip(path, 5, 48, 64, None)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "libx264", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.mp4", "libx264", "gray"),
        ("alpha.mov", "png", "rgba"),
        ("a: concat|-x.mkv", "ffv1", "yuv444p"),
    ],
)
def test_other_containers_and_pixel_formats_give_the_asked_shape(
    tmp_path: Path, name: str, codec: str, pix_fmt: str
) -> None:
    write(tmp_path / name, codec, ramp(9), pix_fmt)
    clip = read_clip(tmp_path / name, 9, 32, 16, None)
    assert clip.shape == (9, 32, 16, 3)
    assert clip.dtype == np.uint8
    level = clip.mean(axis=(1, 2, 3))
    assert (np.abs(level - (10 + 8 * np.arange(9))) < 20).all()  # gif has a palette of few greys
    assert level[8] > level[0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".PNG"])
def test_an_image_is_a_video_of_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.full((30, 50, 3), (200, 100, 50), np.uint8)).save(path)
    clip = read_clip(path, 1, 16, 16, 16)
    assert clip.shape == (1, 16, 16, 3)
    assert np.abs(clip.astype(int) - (200, 100, 50)).max() <= 4
    assert read_all(path)[0].shape == (1, 30, 50, 3)
    with pytest.raises(BadClip, match="has 1 frames.*5 are needed"):
        read_clip(path, 5, 16, 16, None)


def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path, exif=exif)
    assert read_all(path)[0].shape == (1, 40, 20, 3)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))],
)
def test_a_video_is_turned_as_its_camera_was_held(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    # (a, b, c, d) sends the point (x, y) to (a x + c y, b x + d y), y downwards: the first is a quarter
    # clockwise, which takes the top left corner to the top right.
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255
    write_mp4(tmp_path / "a.mp4", frames, 16)
    data = (tmp_path / "a.mp4").read_bytes()
    identity, one = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), 1 << 16
    a, b, c, d = (one * value for value in matrix)
    place = data.index(identity, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:place] + turned + data[place + len(turned) :])
    clip, _ = read_all(tmp_path / "b.mp4")
    assert clip.shape == ((5, 48, 64, 3) if matrix[0] else (5, 64, 48, 3))
    assert clip[0][corner].min() > 250
    assert clip[0].mean() < 100


# Crop and resize.


def test_the_centre_is_kept_and_nothing_is_stretched() -> None:
    # A white square in the middle of a wide frame stays a square in the middle.
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[10:30, 50:70] = 255
    out = crop_and_resize(wide, 20, 20)
    assert out.shape == (20, 20, 3)
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[5:15, 5:15] = 255
    assert np.abs(out.astype(int) - expected)[[0, 7, 10, 19]][:, [0, 7, 10, 19]].max() == 0
    assert np.array_equal(crop_and_resize(wide, 40, 120), wide)


def test_the_scaled_size_is_rounded_and_then_cropped() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 53, 3), dtype=np.uint8)
    scaled = Image.fromarray(picture).resize((28, 16), Image.Resampling.BILINEAR)  # 53 x 16 / 30 = 28.3
    assert np.array_equal(crop_and_resize(picture, 16, 16), np.asarray(scaled)[:, 6:22])
    scaled = Image.fromarray(picture[:, :50]).resize((27, 16), Image.Resampling.BILINEAR)  # 26.7
    assert np.array_equal(crop_and_resize(picture[:, :50], 16, 16), np.asarray(scaled)[:, 6:22])


def test_making_smaller_averages_all_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    out = crop_and_resize(stripes, 8, 8).astype(int)
    assert np.abs(out[:, 1:-1] - 127).max() < 12


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (1, 1), (3, 100), (480, 832)])
@pytest.mark.parametrize("target", [(16, 16), (48, 32), (17, 31)])
def test_every_size_gives_the_asked_shape(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert crop_and_resize(np.zeros((*size, 3), np.uint8), *target).shape == (*target, 3)


# Illegal requests and bad files.


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ((4, 16, 16, None), "4n"),
        ((0, 16, 16, None), "4n"),
        ((5, 0, 16, None), "height"),
        ((5, 16, 16, 0), "fps"),
    ],
)
def test_illegal_requests_are_not_blamed_on_the_file(
    mp4: Path, request_: tuple[int, int, int, float | None], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read_clip(mp4, *request_)
    assert not isinstance(caught.value, BadClip)


def huge_mkv(folder: Path) -> bytes:
    """A small file that declares frames of 60000x60000 pixels (ffv1 takes its size from the container)."""
    write(folder / "small.mkv", "ffv1", ramp(9, 256, 480), "yuv420p")
    data = (folder / "small.mkv").read_bytes()
    for element, size in ((b"\xb0", 480), (b"\xba", 256)):
        declared = element + b"\x82" + struct.pack(">H", size)
        assert data.count(declared) == 1
        data = data.replace(declared, element + b"\x82" + struct.pack(">H", 60000))
    return data


def png_of(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """Write every kind of bad file into `folder`; return name -> what its line must say."""
    data = good.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    files = {
        "empty.mp4": (b"", "is empty"),
        "random.mp4": (noise, "no video"),
        "random.mkv": (noise, "no video"),
        "text.mp4": (b"just some words\n" * 50, "no video"),
        "no_index.mp4": (data[: len(data) // 2], "no video|cannot be decoded|frames"),
        "head.mp4": (data[:40], "no video|frames|no video stream"),
        "concat.mp4": (f"ffconcat version 1.0\nfile '{good.name}'\n".encode(), "no video"),
        "playlist.mp4": (f"#EXTM3U\n#EXTINF:1,\n{good.name}\n#EXT-X-ENDLIST\n".encode(), "no video"),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "as an image"),
        "empty.png": (b"", "is empty"),
        "noise.jpg": (noise, "as an image"),
        "bomb.png": (png_of(60000, 60000), "declares"),
        "wide.png": (png_of(20000, 2), "declares frames of 20000x2"),
        "huge.mkv": (huge_mkv(folder), "declares no size of its frames, or one above"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    said = {name: line for name, (_, line) in files.items()}
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    write(folder / "long_side.mp4", "libx264", np.zeros((5, 16, 8208, 3), np.uint8), "yuv420p")
    said["long_side.mp4"] = "declares frames of 8208x16"
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(20):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return said | {
        "folder.mp4": "is a folder",
        "dangling.mp4": "does not exist",
        "missing.mp4": "does not exist",
        "sound.mp4": "has no video stream",
        "x/../missing\0.mp4": "NUL",
        "two\nlines.mp4": "does not exist",
        "n" * 300: "cannot be opened|does not exist",
    }


def test_every_bad_file_gives_one_line_that_says_why(tmp_path: Path, mp4: Path) -> None:
    for name, said in bad_files(tmp_path, mp4).items():
        for read in (lambda path: read_clip(path, 5, 16, 16, 16), read_all):
            with pytest.raises(BadClip, match=said) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value), name
            assert str(caught.value).endswith(caught.value.reason)


def test_a_file_cut_or_zeroed_in_the_middle_gives_the_shape_or_one_line(tmp_path: Path, mp4: Path) -> None:
    mkv = tmp_path / "whole.mkv"
    write(
        mkv, "libx264", np.random.default_rng(1).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8), "yuv420p"
    )
    refused = 0
    for source in (mp4, mkv):
        data = source.read_bytes()
        for place in range(1, 10):
            cut = len(data) * place // 10
            for content in (data[:cut], data[:cut] + bytes(200) + data[cut + 200 :]):
                path = tmp_path / f"damaged{source.suffix}"
                path.write_bytes(content)
                try:
                    assert read_clip(path, 17, 16, 16, None).shape == (17, 16, 16, 3)
                except BadClip as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert refused >= 9


def test_a_frame_that_its_decoder_calls_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.avi"
    noise = np.random.default_rng(1).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    write(path, "mpeg4", noise, "yuv420p")
    data = path.read_bytes()
    place = len(data) // 2
    path.write_bytes(data[:place] + bytes(300) + data[place + 300 :])
    with pytest.raises(BadClip, match="has a damaged frame, number"):
        read_all(path)


def test_a_clip_that_is_long_enough_before_the_damage_is_used(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    write(whole, "ffv1", ramp(20), "yuv420p")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert numbers(read_clip(cut, 5, 16, 16, None)) == [0, 1, 2, 3, 4]
    with pytest.raises(BadClip):
        read_clip(cut, 17, 16, 16, None)


def test_declared_sizes_are_checked_before_decoding(
    tmp_path: Path, mp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "MAX_SIDE", 63)
    with pytest.raises(BadClip, match="declares frames of 64x48"):
        read_all(mp4)
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadClip, match="64x48|opened|decoded"):
        read_all(mp4)
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_FRAMES", 19)
    with pytest.raises(BadClip, match="declares 20 frames"):
        read_all(mp4)
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_BYTES_KEPT", 10 * 64 * 48 * 3)
    with pytest.raises(BadClip, match="GiB of pixels"):
        read_all(mp4)


def test_frames_are_counted_by_decoding_where_nothing_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ramp.mkv"
    write(path, "ffv1", ramp(20), "yuv420p")
    assert len(read_all(path)[0]) == 20
    monkeypatch.setattr(video, "MAX_FRAMES", 19)
    with pytest.raises(BadClip, match="more than 19 frames"):
        read_all(path)


def test_a_thin_picture_is_not_blown_up(tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (8000, 1)).save(path)
    with pytest.raises(BadClip, match="too thin"):
        read_clip(path, 1, 512, 512, None)


# More of what people have, and what breaks.


def test_a_cut_tail_and_odd_sizes_are_no_reason(tmp_path: Path, mp4: Path) -> None:
    (tmp_path / "tail.mp4").write_bytes(mp4.read_bytes()[:-10])
    try:
        assert numbers(read_clip(tmp_path / "tail.mp4", 17, 48, 64, 16)) == list(range(17))
    except BadClip as error:  # an index at the end is what is cut
        assert "\n" not in str(error)
    write(tmp_path / "odd.mkv", "ffv1", ramp(9, 47, 63), "yuv444p")
    assert read_clip(tmp_path / "odd.mkv", 9, 32, 48, None).shape == (9, 32, 48, 3)
    assert read_all(tmp_path / "odd.mkv")[0].shape == (9, 47, 63, 3)


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 9])
def test_clips_of_few_frames_give_what_they_have(tmp_path: Path, frames: int) -> None:
    path = tmp_path / "few.mp4"
    write_mp4(path, ramp(frames), 16)
    for wanted in (1, 5, 9):
        if wanted <= frames:
            assert numbers(read_clip(path, wanted, 48, 64, None)) == list(range(wanted))
        else:
            with pytest.raises(TooShort, match=f"has {frames} frames; {wanted} are needed") as caught:
                read_clip(path, wanted, 48, 64, None)
            assert (caught.value.frames, caught.value.still) == (frames, False)


@pytest.mark.parametrize("declared", [3, 2_000_000])
def test_a_declared_number_of_frames_is_not_believed(tmp_path: Path, declared: int) -> None:
    path = tmp_path / "lies.avi"
    write(path, "mpeg4", ramp(20), "yuv420p")
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):  # dwTotalFrames, dwLength
        assert struct.unpack_from("<I", data, place) == (20,)
        struct.pack_into("<I", data, place, declared)
    path.write_bytes(data)
    if declared < MAX_FRAMES:
        assert numbers(read_all(path)[0])[::19] == [0, 19]
    else:
        with pytest.raises(BadClip, match="declares 2,000,000 frames"):
            read_clip(path, 5, 16, 16, None)


def test_a_container_that_is_not_on_the_list_is_refused_under_any_name(tmp_path: Path) -> None:
    write(tmp_path / "a.ts", "mpeg2video", ramp(9), "yuv420p", rate=25)
    for name in ("a.ts", "b.mp4", "c.mkv"):
        (tmp_path / name).write_bytes((tmp_path / "a.ts").read_bytes())
        with pytest.raises(BadClip, match="no video that can be opened"):
            read_all(tmp_path / name)


def test_a_decoder_that_stalls_is_given_up(
    mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = tmp_path / "moving.webp"
    pictures = [Image.fromarray(frame) for frame in ramp(5)]
    pictures[0].save(moving, save_all=True, append_images=pictures[1:], lossless=True)
    monkeypatch.setattr(video, "MAX_SECONDS", -1.0)
    for path in (mp4, moving):
        with pytest.raises(BadClip, match="takes more than -1 s to decode"):
            read_all(path)


def test_a_picture_that_lasts_for_years_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slow.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for pixels, pts in zip(ramp(2), (0, 40_000_000), strict=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = pts, Fraction(1, 1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert numbers(read_clip(path, 5, 48, 64, 16)) == [0] * 5
    monkeypatch.setattr(video, "MAX_FRAMES", 500)
    every = video.read_windows(path, 5, lambda _h, _w: (16, 16), 16, stride=100, limit=None)
    with pytest.raises(BadClip, match="has more than 500 frames at 16 fps"):
        list(every)


# Anything at all: damaged copies of good files, in a process of their own.

FUZZED = 60


def good_files(folder: Path) -> dict[str, bytes]:
    noise = np.random.default_rng(5).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    codecs = (
        *(("a.mp4", "libx264", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.gif", "gif", "rgb8")),
        *(("a.mkv", "ffv1", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"), ("a.mov", "png", "rgba")),
        *(("a.flv", "flv", "yuv420p"), ("a.wmv", "wmv2", "yuv420p")),
    )
    for name, codec, pix_fmt in codecs:
        write(folder / name, codec, noise, pix_fmt)
    first, *others = [Image.fromarray(frame) for frame in noise]
    for name in ("moving.webp", "moving.png"):
        first.save(folder / name, save_all=True, append_images=others, duration=60)
    for name in ("still.webp", "still.png", "still.jpg", "still.bmp"):
        first.save(folder / name)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Return a copy that is cut, has other bytes or bits (most in its head), or a stretch of noise."""
    out = bytearray(data)
    kind = generator.integers(0, 4)
    if kind == 0:
        return bytes(out[: generator.integers(0, len(out))])
    if kind == 1:
        for place in generator.integers(0, len(out), generator.integers(1, 12)):
            out[place] = generator.integers(0, 256)
    elif kind == 2:
        for place in generator.integers(0, min(len(out), 400), generator.integers(1, 8)):
            out[place] ^= 1 << int(generator.integers(0, 8))
    else:
        start, length = generator.integers(0, len(out)), generator.integers(1, 60)
        out[start : start + length] = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
    return bytes(out)


def read_damaged(folder: str, seed: int) -> None:
    """Read damaged files in every way: a clip of the asked shape or BadClip, and each in a few seconds."""
    generator = np.random.default_rng(seed)
    good = Path(folder, "good")
    good.mkdir()
    whole = good_files(good)
    for name in whole:
        assert read_clip(good / name, 1, 16, 16, None).shape == (1, 16, 16, 3), name
    outcomes: Counter[bool] = Counter()
    for number in range(FUZZED):
        for name, data in whole.items():
            path = Path(folder, f"damaged{Path(name).suffix}")
            path.write_bytes(damaged(data, generator))
            begun = time.monotonic()
            try:
                windows = read_windows(path, 5, lambda _h, _w: (16, 32), 16, stride=2, limit=None)
                assert all(frames.shape == (5, 16, 32, 3) for _, frames in windows)
                frames, fps = read_all(path)
                assert frames.ndim == 4 and frames.dtype == np.uint8 and fps > 0
                outcomes[True] += 1
            except BadClip as error:
                assert "\n" not in str(error) and str(error).startswith(str(path))
                outcomes[False] += 1
            assert time.monotonic() - begun < 20, (name, number)
    assert min(outcomes[True], outcomes[False]) > FUZZED, outcomes


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_never_crash_or_hang(tmp_path: Path, seed: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=read_damaged, args=(str(tmp_path), seed))
    child.start()
    child.join(120)
    child.kill()
    child.join(30)
    assert child.exitcode == 0
