"""What players show is what is read: aspect, rotation, colours, transparency, time; and headers that lie."""

import os
import struct
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from megawan.data.inspection import look
from megawan.data.video import BadClip, Frames, pictures, read_all, write_mp4
from tests.data.encoding import numbers, ramp, write, write_image
from tools.check_dataset import main as check_dataset
from tools.encode_dataset import main as encode_dataset

COLOUR = (200, 60, 30)
# (kr, kb) of the colour matrices, and FFmpeg's numbers for (matrix, primaries, transfer).
MATRICES = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encoded(
    path: Path,
    frames: "list[av.VideoFrame]",
    codec: str,
    pix_fmt: str,
    setup: Callable[[Any], None] = lambda _: None,
    options: "dict[str, str] | None" = None,
) -> Path:
    """Write ready frames, with whatever `setup` says of the codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        setup(stream.codec_context)
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def halves(frames: int = 5, size: tuple[int, int] = (48, 64)) -> Frames:
    """Left half red, right half blue, and the upper left quarter white."""
    found = np.zeros((frames, *size, 3), np.uint8)
    found[:, :, : size[1] // 2], found[:, :, size[1] // 2 :] = RED, BLUE
    found[:, : size[0] // 2, : size[1] // 2] = WHITE
    return found


def rgb_frames(frames: Frames) -> "list[av.VideoFrame]":
    kind = {3: "rgb24", 4: "rgba"}[frames.shape[3]]
    return [av.VideoFrame.from_ndarray(frame, format=kind) for frame in frames]


def yuv_frames(matrix: str, full: bool, bits: int) -> "list[av.VideoFrame]":
    """COLOUR by the formulas of the standards, in 4:4:4."""
    red, green, blue = (value / 255 for value in COLOUR)
    kr, kb = MATRICES[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / 2 / (1 - kb), (red - luma) / 2 / (1 - kr)
    unit = 1 << (bits - 8)
    if full:
        levels = [luma * (256 * unit - 1), *(value * (256 * unit - 1) + 128 * unit for value in chroma)]
    else:
        levels = [(16 + 219 * luma) * unit, *((128 + 224 * value) * unit for value in chroma)]
    found = []
    for _ in range(5):
        frame = av.VideoFrame(64, 48, "yuv444p" if bits == 8 else "yuv444p10le")
        for plane, level in zip(frame.planes, levels, strict=True):
            kind = np.uint8 if bits == 8 else np.uint16
            rows = np.full((plane.height, plane.line_size // np.dtype(kind).itemsize), round(level), kind)
            plane.update(rows.tobytes())
        found.append(frame)
    return found


@pytest.mark.parametrize(
    ("matrix", "full", "bits", "tags", "remark"),
    [
        ("709", False, 8, (1, 1, 1), ""),
        ("709", True, 8, (1, 1, 1), ""),
        ("601", False, 8, (5, 5, 6), ""),
        ("601", False, 8, None, ""),  # untagged: as players take it
        ("709", False, 10, (1, 1, 1), ""),
        ("2020", False, 10, (9, 9, 16), "HDR (PQ)"),
        ("2020", False, 10, (9, 9, 18), "HDR (HLG)"),
    ],
)
def test_colours_are_those_of_the_files_own_matrix_and_range(
    tmp_path: Path, matrix: str, full: bool, bits: int, tags: tuple[int, int, int] | None, remark: str
) -> None:
    def tag(context: Any) -> None:
        if tags is not None:
            context.colorspace, context.color_primaries, context.color_trc = tags
            context.color_range = 2 if full else 1

    path = encoded(
        tmp_path / "a.mkv",
        yuv_frames(matrix, full, bits),
        "ffv1",
        "yuv444p" if bits == 8 else "yuv444p10le",
        tag,
    )
    frames, _ = read_all(path)
    assert np.abs(frames.astype(int) - COLOUR).max() <= 2
    assert [note.startswith(remark) for note in look(path, None).remarks] == [True] * bool(remark)


def test_colours_follow_a_stream_that_changes_on_the_way(tmp_path: Path) -> None:
    """Its size, its matrix and its range, as of two cameras: each frame is as FFmpeg gives it alone."""
    path, parts = tmp_path / "a.mkv", [((64, 48), "709", True, (1, 2)), ((96, 32), "601", False, (5, 1))]
    with av.open(str(path), "w") as container:
        stream, packets = container.add_stream("libx264", rate=16), []
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for (width, height), matrix, full, tags in parts:
            context: Any = av.CodecContext.create("libx264", "w")
            context.width, context.height, context.pix_fmt = width, height, "yuv444p"
            context.time_base, context.options = Fraction(1, 16), {"crf": "0", "bf": "0"}
            context.colorspace, context.color_range = tags
            for frame in yuv_frames(matrix, full, 8):
                small = frame.reformat(width=width, height=height)
                small.pts, small.colorspace, small.color_range = len(packets), *tags
                packets += context.encode(small)
            packets += context.encode(None)
        for number, packet in enumerate(packets):
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 16)
            container.mux(packet)
    with av.open(str(path)) as container:
        alone = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    found = [picture.pixels for picture in pictures(path, None)]
    assert [x.shape for x in found] == [(48, 64, 3)] * 5 + [(32, 96, 3)] * 5
    assert all(np.array_equal(x, y) for x, y in zip(found, alone, strict=True))
    assert max(np.abs(x.astype(int) - COLOUR).max() for x in found) <= 4


@pytest.mark.parametrize(
    ("name", "codec", "aspect", "size"),
    [
        ("a.mp4", "libx264", Fraction(2), (48, 128)),
        ("a.mkv", "libx264", Fraction(64, 45), (48, 91)),
        ("a.avi", "mpeg4", Fraction(1, 2), (96, 64)),
        ("a.mp4", "libx264", Fraction(1), (48, 64)),
    ],
)
def test_pixels_that_are_not_square_are_made_square(
    tmp_path: Path, name: str, codec: str, aspect: Fraction, size: tuple[int, int]
) -> None:
    def stretch(context: Any) -> None:
        context.sample_aspect_ratio = aspect

    path = encoded(tmp_path / name, rgb_frames(halves()), codec, "yuv420p", stretch)
    frames, _ = read_all(path)
    assert frames.shape[1:3] == size
    height, width = size
    assert frames[0, height // 4, width // 4].min() > 200 and frames[0, -height // 4, -width // 4, 2] > 200
    assert (look(path, None).height, look(path, None).width) == size


@pytest.mark.parametrize(
    "matrix",
    [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)],
)
def test_a_display_matrix_turns_and_mirrors(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    write_mp4(tmp_path / "a.mp4", halves(), 16)
    data = (tmp_path / "a.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = matrix
    place = data.index(identity, data.index(b"tkhd"))
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    frames, _ = read_all(tmp_path / "b.mp4")
    height, width = frames.shape[1:3]
    assert (height, width) == ((48, 64) if a else (64, 48))
    # Where each quarter's centre, counted from the middle of the picture, is sent.
    for x, y, colour in ((-16, -12, WHITE), (-16, 12, RED), (16, -12, BLUE), (16, 12, BLUE)):
        to_x, to_y = a * x + c * y, b * x + d * y
        assert np.abs(frames[0, height // 2 + to_y, width // 2 + to_x].astype(int) - colour).max() < 40


@pytest.mark.parametrize("name", ["a.mov", "a.png", "a.webp", "moving.png", "moving.webp", "a.gif"])
def test_what_is_transparent_is_white(tmp_path: Path, name: str) -> None:
    frames = np.zeros((3, 48, 64, 4), np.uint8)
    frames[..., 0], frames[:, :, :32, 3] = 255, 255  # red, and the right half of it is not to be seen
    frames[1:, :8] = 0, 255, 0, 255  # frames that are all alike would be one
    frames[2, :4] = 0, 0, 255, 255
    if name == "a.mov":
        encoded(tmp_path / name, rgb_frames(frames), "png", "rgba")
    else:
        first, *others = [
            Image.fromarray(frame) for frame in frames[: 1 if name in ("a.png", "a.webp") else 3]
        ]
        moves: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 100} if others else {}
        first.save(tmp_path / name, **moves, **({"lossless": True, "exact": True} if "webp" in name else {}))
    found, _ = read_all(tmp_path / name)
    assert len(found) == (1 if name in ("a.png", "a.webp") else 3)
    assert (found[:, 30, 50] == WHITE).all() and (np.abs(found[:, 30, 10].astype(int) - RED) < 12).all()
    assert look(tmp_path / name, None).remarks == ("transparent: shown on white",)


def test_transparency_that_the_decoder_leaves_out_is_told(tmp_path: Path) -> None:
    frames = np.full((5, 48, 64, 4), 128, np.uint8)
    path = encoded(
        tmp_path / "a.webm", rgb_frames(frames), "libvpx-vp9", "yuva420p", options={"cpu-used": "8"}
    )
    assert "not read" in look(path, None).remarks[0]


def test_interlaced_frames_are_told(tmp_path: Path) -> None:
    def interlace(context: Any) -> None:
        context.flags |= 0x20040000  # interlaced DCT and motion estimation

    path = encoded(tmp_path / "a.mkv", rgb_frames(ramp(9)), "mpeg2video", "yuv420p", interlace)
    assert look(path, None).remarks[0].startswith("interlaced")


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("I;16", 40000, 156), ("L", 100, 100), ("1", 1, 255), ("LA", (100, 255), 100), ("P", 0, 0)],
)
def test_images_of_every_depth_keep_their_brightness(
    tmp_path: Path, mode: str, value: Any, expected: int
) -> None:
    Image.new(mode, (64, 48), value).save(tmp_path / "a.png")
    assert (read_all(tmp_path / "a.png")[0] == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_without_a_suffix_is_known_by_its_beginning(tmp_path: Path, kind: str) -> None:
    with (tmp_path / "4f1c").open("wb") as file:
        Image.new("RGB", (64, 48), COLOUR).save(file, kind)
    (found,) = pictures(tmp_path / "4f1c", 16)
    assert found.still and np.abs(found.pixels.astype(int) - COLOUR).max() < 8


# Time, and headers that lie.


@pytest.mark.parametrize(
    ("pts", "expected"),
    [
        ([-4, -3, -2, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([0, 1, 2, 2, 2, 3, 4, 5, 6], [0, 1, 4, 5, 6, 7, 8]),  # three at one time: the last is seen
        ([0, 1, 2, 3, 6, 7, 8, 9, 10], [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]),  # a gap
    ],
)
def test_times_below_zero_twice_or_with_gaps(tmp_path: Path, pts: list[int], expected: list[int]) -> None:
    frames = rgb_frames(ramp(9))
    for frame, number in zip(frames, pts, strict=True):
        frame.pts, frame.time_base = number, Fraction(1, 16)
    path = encoded(
        tmp_path / "a.mkv",
        frames,
        "ffv1",
        "yuv444p",
        lambda context: setattr(context, "time_base", Fraction(1, 16)),
    )
    assert numbers(np.stack([frame.pixels for frame in pictures(path, 16)])) == expected
    assert numbers(np.stack([frame.pixels for frame in pictures(path, None)])) == list(range(9))


def patched(data: bytes, box: bytes, offset: int, value: int) -> bytes:
    """Return an mp4 with another 32-bit number in the first `box`."""
    place = data.index(box) + offset
    return data[:place] + struct.pack(">I", value) + data[place + 4 :]


@pytest.mark.parametrize(
    ("box", "offset", "value", "expected"),
    [
        (b"mvhd", 20, 0x7FFFFFF0, 20),  # the durations: years
        (b"tkhd", 24, 0x7FFFFFF0, 20),
        (b"mdhd", 20, 0x7FFFFFF0, 20),
        (b"elst", 12, 0x7FFFFFFF, 20),
        (b"elst", 16, 5 * 1024, 15),  # an edit that begins at the sixth frame
        (b"stts", 16, 0x7FFFFFFF, "more than 200,000 frames at 16 fps"),  # each picture stays for years
        (b"stsz", 12, 0x7FFFFFFF, "declares|no video|cannot be decoded|no frames"),  # frames without end
    ],
)
def test_headers_of_an_mp4_that_lie(
    tmp_path: Path, box: bytes, offset: int, value: int, expected: int | str
) -> None:
    options = {"bf": "0", "crf": "10", "preset": "ultrafast"}
    whole = encoded(
        tmp_path / "whole.mp4", rgb_frames(ramp(20)), "libx264", "yuv420p", options=options
    ).read_bytes()
    (tmp_path / "a.mp4").write_bytes(patched(whole, box, offset, value))
    begun = time.monotonic()
    if isinstance(expected, int):
        found = [frame.pixels for frame in pictures(tmp_path / "a.mp4", 16)]
        assert numbers(np.stack(found)) == list(range(20 - expected, 20))
    else:
        with pytest.raises(BadClip, match=expected):
            list(pictures(tmp_path / "a.mp4", 16))
    assert time.monotonic() - begun < 10


def test_a_gif_that_claims_to_be_huge_is_refused_at_once(tmp_path: Path) -> None:
    data = bytearray(write_image(tmp_path / "a.gif", ramp(3, 40, 60)).read_bytes())
    struct.pack_into("<HH", data, 6, 65535, 65535)
    (tmp_path / "bomb.gif").write_bytes(data)
    with pytest.raises(BadClip, match="declares no size of its frames, or one above"):
        read_all(tmp_path / "bomb.gif")


def test_sizes_of_one_pixel_and_odd_ones(tmp_path: Path) -> None:
    assert read_all(write(tmp_path / "one.mkv", ramp(5, 1, 1)))[0].shape == (5, 1, 1, 3)
    odd = write(tmp_path / "odd.mkv", ramp(2, 481, 853), pix_fmt="yuv420p")
    assert read_all(odd)[0].shape == (2, 481, 853, 3)


# Names, and things that are no files.


@pytest.mark.timeout(60)
def test_the_commands_take_every_name_and_wait_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    good = write(tmp_path / "good.mkv", halves(9)).read_bytes()
    names = [
        b"a b.mkv",
        b'it\'s "q".mkv',
        "\u00fc \U0001f98a.mkv".encode(),
        b"new\nline.mkv",
        b"\xff\xfe.mkv",
        b"-x.mkv",
    ]
    for number, name in enumerate([*names, b"tab\t\x1b[31m.mkv"]):
        path = clips / os.fsdecode(name)
        path.write_bytes(good)
        path.with_suffix(".txt").write_text(f"caption {number}")
    (clips / "folder.mp4").mkdir()
    os.mkfifo(clips / "pipe.mp4")
    (clips / "zero.mp4").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "zero"):
        (clips / f"{name}.txt").write_text("caption")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--input",
        "clips",
        "--num_frames",
        "5",
        "--height",
        "32",
        "--width",
        "32",
        "--allow_outside_root",
    ]
    with pytest.raises(SystemExit, match="1"):
        check_dataset([*flags, "--variant", "debug"])
    assert "10 rows: 3 would be dropped" in capsys.readouterr().out
    encode_dataset([*flags, "--codec", "dct", "--output", "s"])
    assert "7 encoded, 0 kept, 3 rejected" in capsys.readouterr().out
