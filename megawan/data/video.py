"""Media files to frames and back: a file gives a clip of the asked shape, or one line that says why not.

Nothing about a file is believed before it is decoded: the container must be one of CONTAINERS, it may open no
other file, its declared size is capped, and its frames are counted by decoding them. Frames are resized one
by one, so a clip costs memory for what is kept. An image is a video of one frame, an animated one (GIF, WebP,
PNG) a video.

A frame is what a player shows: turned and mirrored as its file says, with square pixels, the colours of its
own matrix and range, and white where it is transparent.
"""

import contextlib
import itertools
import os
import re
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megawan.files import sha256

Frames = NDArray[np.uint8]  # [T, H, W, 3], or one frame [H, W, 3]

# FFmpeg's names of what mp4, mov, mkv, webm, avi, gif, flv and wmv files hold. Playlists (concat, hls, dash),
# which would open other files, are not here: a file that is one is refused whatever its name ends in.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,flv,asf"
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".gif")
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
# How such a file begins, for one whose name does not say it: downloaded datasets are links to nameless files.
IMAGE_STARTS = (rb"\x89PNG\r\n\x1a\n", rb"\xff\xd8\xff", rb"RIFF.{4}WEBP")
HDR = {16: "PQ", 18: "HLG"}  # transfer functions, by FFmpeg's number
MAX_SIDE = 8192
MAX_PIXELS = 8192 * 4608
MAX_FRAMES = 200_000
MAX_BYTES_KEPT = 4 << 30
MAX_SECONDS = 600.0  # that decoding one file may take in all
TRANSPARENT = "transparent: shown on white"
UNREAD = "transparent, which is not read: the colours behind show"
UNTIMED = 0.1  # seconds that a picture of an animation stays when it says 0, as in browsers
CRF = 12  # visually lossless: what is written here is looked at and measured, not streamed


class BadClip(ValueError):
    """A media file that gives no usable clip; the message is one line that names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        name = str(path) if str(path).isprintable() else ascii(str(path))
        self.reason = " ".join(reason.split())
        super().__init__(f"{name}: {self.reason}")


class TooShort(BadClip):
    """A readable file without enough frames; `frames` says how many it has, `still` that it is an image."""

    def __init__(self, path: Path, needed: int, frames: int, fps: float | None, still: bool) -> None:
        rate = "" if fps is None else f" at {fps:g} fps"
        super().__init__(path, f"has {frames} frames{rate}; {needed} are needed")
        self.frames = frames
        self.still = still


@dataclass(frozen=True)
class Picture:
    """One frame of a file, as it is seen: upright, RGB."""

    pixels: Frames
    """[h, w, 3]."""
    start: float
    """Seconds since the first frame."""
    end: float
    """When the next frame is due."""
    repeated: bool = False
    """The same picture as the one before, which stays on screen."""
    still: bool = False
    """The file is an image that does not move."""
    remark: str = ""
    """What is not as a training wants it, though it can be shown."""


def read_clip(path: Path, num_frames: int, height: int, width: int, fps: float | None) -> Frames:
    """Return the first `num_frames` frames of a video or an image, uint8 RGB [num_frames, height, width, 3].

    Each frame is scaled until it covers height x width (antialiased) and its centre is kept. `fps` samples
    the video at that rate by its timestamps, from its first frame on (a slower video repeats frames); None
    keeps consecutive frames as they are. An image is a video of one frame.

    Raises BadClip for every file that does not give such a clip, ValueError for an illegal request:
    num_frames must be 4n+1 (Wan's VAE), the sizes and fps positive.
    """
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"height and width must be 1 to {MAX_SIDE}; given: {height} and {width}")
    windows = read_windows(path, num_frames, lambda _h, _w: (height, width), fps)
    with contextlib.closing(windows):
        return next(windows)[1]


def check_file(path: Path) -> None:
    """Raise BadClip unless `path` is a file with something in it; a pipe would be waited on for ever."""
    if "\0" in str(path):
        raise BadClip(path, "has a NUL byte in its name")
    try:
        if path.is_dir():
            raise BadClip(path, "is a folder, not a video")
        if not path.exists():
            raise BadClip(path, "does not exist")
        if not path.is_file():
            raise BadClip(path, "is not a regular file")
        if not path.stat().st_size:
            raise BadClip(path, "is empty")
    except OSError as error:
        raise BadClip(path, f"cannot be opened ({error.strerror or error})") from None


def source_digest(path: Path) -> str:
    """Return the SHA-256 of a media file. Raises BadClip unless it is one that can be read."""
    check_file(path)
    try:
        return sha256(path)
    except OSError as error:
        raise BadClip(path, f"cannot be read ({error.strerror or error})") from None


def read_windows(
    path: Path,
    num_frames: int,
    fit: Callable[[int, int], tuple[int, int]],
    fps: float | None,
    *,
    stride: int | None = None,
    limit: int | None = 1,
    starts: Sequence[int] | None = None,
) -> Generator[tuple[int, Frames], None, None]:
    """Yield (start, frames [num_frames, height, width, 3]) of every window of a file, cut as by `read_clip`.

    Windows start every `stride` frames (default: num_frames, so that they follow each other), counted after
    resampling, or at the ascending `starts`; `limit` stops after so many, None takes all that are whole.
    `fit` gives the (height, width) of the windows for the size of the first frame. The file is decoded once
    and no further than needed.

    Raises TooShort when there is not one window, BadClip where a file cannot be decoded any further (the
    windows before that have been given) and for whatever `fit` raises as ValueError.
    """
    if num_frames < 1 or num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4n+1 (1, 5, 9, …); given: {num_frames}")
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f"fps must be above 0 and at most 1000, or None to keep all frames; given: {fps}")
    step = num_frames if stride is None else stride
    if step < 1 or (limit is not None and limit < 1):
        raise ValueError(f"windows and their stride must be 1 or more; given: {limit} and {stride}")
    coming = itertools.count(0, step) if starts is None else iter(starts)
    start, seen, given, still = next(coming), 0, 0, False
    size: tuple[int, int] | None = None
    kept: deque[Frames] = deque()
    for frame in pictures(path, fps):
        if size is None:
            size, still = _fitting(path, frame, fit), frame.still
        if seen >= start:
            # A repeated frame is one object, so it is resized once.
            kept.append(kept[-1] if kept and frame.repeated else _fit(path, frame.pixels, *size))
        seen += 1
        if len(kept) == num_frames:
            yield start, np.stack(kept)
            given += 1
            later = None if given == limit else next(coming, None)
            if later is None:
                return
            for _ in range(min(later - start, num_frames)):
                kept.popleft()
            start = later
    if not given:
        raise TooShort(path, num_frames, seen, fps, still)


def read_all(path: Path) -> tuple[Frames, float]:
    """Return every frame of a small video or image, uint8 RGB [T, H, W, 3], and its mean frames a second.

    An image's rate is 1. Raises BadClip for a file that cannot be read or is larger than MAX_BYTES_KEPT as
    pixels.
    """
    frames: list[Frames] = []
    times: list[float] = []
    size = 0
    for frame in _decoded(path):
        size += frame.pixels.nbytes
        if size > MAX_BYTES_KEPT:
            raise BadClip(
                path, f"has more than {MAX_BYTES_KEPT >> 30} GiB of pixels, too many to read at once"
            )
        if frames and frame.pixels.shape != frames[0].shape:
            raise BadClip(path, "changes its frame size in the middle")
        frames.append(frame.pixels)
        times.append(frame.end)
    if not frames:
        raise BadClip(path, "has no frames")
    return np.stack(frames), len(frames) / times[-1] if times[-1] > 0 else 1.0


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write `frames`, uint8 RGB [T, H, W, 3] with even H and W, as an H.264 mp4 that every player opens.

    The file appears whole or not at all; its bytes depend on nothing but the frames, fps and the x264
    version. Raises ValueError for frames that cannot be written, OSError when the folder cannot be.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 [T, H, W, 3]; given: {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"an H.264 video needs an even height and width; given: {width}x{height}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be above 0 and at most 1000; given: {fps}")
    import av

    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file, av.open(file, "w", format="mp4") as container:
            # One thread, because x264's output depends on their number; no B frames and no macroblock tree,
            # with which one file in some hundreds came out a byte different.
            stream = container.add_stream(
                "libx264",
                rate=Fraction(fps).limit_denominator(1001),
                options={"crf": str(CRF), "preset": "medium", "threads": "1", "bf": "0", "mbtree": "0"},
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for pixels in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def crop_and_resize(pixels: Frames, height: int, width: int) -> Frames:
    """Return one frame [height, width, 3]: scaled by max(height/h, width/w), antialiased, then its centre."""
    h, w = pixels.shape[:2]
    scale = max(height / h, width / w)
    scaled_h, scaled_w = max(height, round(h * scale)), max(width, round(w * scale))
    image = Image.fromarray(pixels).resize((scaled_w, scaled_h), Image.Resampling.BILINEAR)
    top, left = round((scaled_h - height) / 2), round((scaled_w - width) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _fitting(path: Path, frame: Picture, fit: Callable[[int, int], tuple[int, int]]) -> tuple[int, int]:
    try:
        return fit(frame.pixels.shape[0], frame.pixels.shape[1])
    except ValueError as error:
        raise BadClip(path, str(error)) from None


def _fit(path: Path, pixels: Frames, height: int, width: int) -> Frames:
    h, w = pixels.shape[:2]
    scale = max(height / h, width / w)
    if h * scale * w * scale > MAX_PIXELS:
        raise BadClip(path, f"is {w}x{h}, too thin to fill {width}x{height}")
    return crop_and_resize(pixels, height, width)


def pictures(
    path: Path, fps: float | None, decoded: Callable[[Picture], None] = lambda _: None
) -> Iterator[Picture]:
    """Yield the picture that is on screen at each k / fps, in order; all pictures when fps is None.

    `decoded` is called with every picture of the file, also those that the rate leaves out. Raises BadClip
    where the file cannot be decoded any further.
    """
    due = 0
    # A frame that is due exactly at k / fps must not lose to rounding, and Matroska counts milliseconds.
    tolerance = 0.0 if fps is None else min(6e-4, 0.1 / fps)
    for frame in _decoded(path):
        decoded(frame)
        if fps is None:
            yield frame
            continue
        repeated = False
        # The first frame is always due, also that of an image, which lasts no time.
        while due == 0 or (due / fps < frame.end - tolerance and not frame.still):
            if due == MAX_FRAMES:  # the file may claim that a picture lasts for years
                raise BadClip(path, f"has more than {MAX_FRAMES:,} frames at {fps:g} fps")
            yield replace(frame, repeated=repeated)
            repeated = True
            due += 1


def _decoded(path: Path) -> Iterator[Picture]:
    """Yield every frame of a video, or the one of an image; raises BadClip where it cannot go on."""
    check_file(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise BadClip(path, f"cannot be opened ({error.strerror or error})") from None
    with file:
        if _is_image(path, file):
            yield from _image(path, file)
        else:
            yield from _video(path, file)


def _is_image(path: Path, file: BinaryIO) -> bool:
    """Return whether a file is read as an image: by its name, or its beginning where that says nothing."""
    suffix = path.suffix.lower()
    if suffix in IMAGES or suffix in VIDEOS:
        return suffix in IMAGES
    try:
        start = file.read(16)
        file.seek(0)
    except OSError as error:
        raise BadClip(path, f"cannot be read ({error.strerror or error})") from None
    return any(re.match(begin, start, re.DOTALL) for begin in IMAGE_STARTS)


def _image(path: Path, file: BinaryIO) -> Iterator[Picture]:
    broken = (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        LookupError,
        ArithmeticError,
        struct.error,
        zlib.error,
    )
    shown = 0
    try:
        with Image.open(file, formats=sorted(set(IMAGES.values()))) as image:
            _check_size(path, image.width, image.height)
            # Of the formats here only these move; a JPEG of several pictures holds views or previews.
            count = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG") else 1
            if count > MAX_FRAMES:
                raise BadClip(path, f"declares {count:,} frames; at most {MAX_FRAMES:,} are legal")
            # A PNG may begin with a picture for programs that cannot show its animation.
            first = 1 if count > 1 and getattr(image, "default_image", False) else 0
            now, spent = 0.0, 0.0
            for number in range(first, count):
                begun = time.monotonic()
                if count > 1:
                    image.seek(number)
                clear = image.has_transparency_data
                upright = np.asarray(ImageOps.exif_transpose(_as_rgb(image)))
                remark = TRANSPARENT if clear else ""
                spent += time.monotonic() - begun
                if spent > MAX_SECONDS:
                    raise BadClip(path, f"takes more than {MAX_SECONDS:g} s to decode")
                stays = float(image.info.get("duration", 0)) / 1000
                if count - first == 1:
                    yield Picture(upright, 0.0, 0.0, still=True, remark=remark)
                    return
                yield Picture(upright, now, now + (stays if stays > 0 else UNTIMED), remark=remark)
                now += stays if stays > 0 else UNTIMED
                shown += 1
    except BadClip:
        raise
    except Image.DecompressionBombError:
        raise BadClip(path, f"declares more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise BadClip(path, "cannot be decoded as an image (legal: png, jpeg, webp, bmp)") from None
    except broken as error:
        after = f" after {shown} frames" if shown else ""
        raise BadClip(path, f"cannot be decoded as an image{after} ({_said(error)})") from None


def _video(path: Path, file: BinaryIO) -> Iterator[Picture]:
    import av

    # The open file is given, not its name: a name such as "concat:a|b" means nothing here.
    broken = (av.error.FFmpegError, OSError, ValueError, RuntimeError, EOFError, MemoryError, struct.error)
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(
                av.open(
                    file,
                    options={"max_pixels": str(MAX_PIXELS)},
                    container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
                    buffer_size=1 << 18,
                    metadata_errors="replace",
                )
            )
            stream = _video_stream(path, container)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        except BadClip:
            raise
        except broken as error:
            legal = "legal: mp4, mov, mkv, webm, avi, gif, flv, wmv"
            raise BadClip(path, f"is no video that can be opened ({_said(error)}; {legal})") from None
        coming = _coming(container, stream)
        # One for all frames: a frame's own would set up FFmpeg's scaler and its threads anew.
        reformatter = av.video.reformatter.VideoReformatter()
        moves = container.format.name != "gif"
        # FFmpeg's own VP8 and VP9 decoders leave the transparency out.
        hidden = UNREAD if stream.metadata.get("alpha_mode") == "1" else ""
        period = float(1 / stream.average_rate) if stream.average_rate else 0.0
        held: tuple[Frames, float, str] | None = None
        first, count, spent = None, 0, 0.0
        while True:
            begun = time.monotonic()
            try:
                picture = next(coming, None)
                if picture is None:
                    break
                _check_size(path, picture.width, picture.height)
                if picture.is_corrupt:
                    raise BadClip(path, f"has a damaged frame, number {count}")
                seen = float(picture.time) if picture.time is not None else count * period
                shown = _square(path, _rgb_of(picture, reformatter), stream.sample_aspect_ratio)
                pixels = np.ascontiguousarray(_upright(shown, picture))
                remark = _remark(picture) or hidden
            except BadClip:
                raise
            except broken as error:
                raise BadClip(path, f"cannot be decoded after {count} frames ({_said(error)})") from None
            first = seen if first is None else first
            now = seen - first
            count += 1
            spent += time.monotonic() - begun
            if count > MAX_FRAMES:
                raise BadClip(path, f"has more than {MAX_FRAMES:,} frames")
            if spent > MAX_SECONDS:
                raise BadClip(path, f"takes more than {MAX_SECONDS:g} s to decode")
            if held is not None:
                # Time never runs back, whatever the file says.
                now = max(now, held[1])
                yield Picture(held[0], held[1], now, remark=held[2])
            held = pixels, now, remark
        if held is None:
            raise BadClip(path, "has no frames")
        yield Picture(held[0], held[1], held[1] + period, still=count == 1 and not moves, remark=held[2])


def _rgb_of(picture: Any, reformatter: Any) -> Frames:
    """Return the frame's colours, by FFmpeg in its own matrix and range; transparent is white."""
    clear = any(component.is_alpha for component in picture.format.components)
    pixels: Frames = reformatter.reformat(
        picture, format="rgba" if clear else "rgb24", threads=1
    ).to_ndarray()
    return _on_white(pixels) if clear else pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return an image's colours; transparent is white, and 16 bits of grey are scaled, not cut off."""
    if image.has_transparency_data:
        return Image.fromarray(_on_white(np.asarray(image.convert("RGBA"))))
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _on_white(pixels: NDArray[np.uint8]) -> Frames:
    colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _square(path: Path, pixels: Frames, aspect: Fraction | None) -> Frames:
    """Return the frame with square pixels; `aspect` is how much wider than high they are stored."""
    height, width = pixels.shape[:2]
    if not aspect or aspect <= 0:
        return pixels
    size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    if size == (width, height):
        return pixels
    _check_size(path, *size)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _upright(pixels: Frames, picture: Any) -> Frames:
    """Return the frame turned and mirrored as its display matrix says: phones store pictures lying.

    The matrix (a, b, c, d) sends a point (x, y) to (a x + c y, b x + d y), y downwards.
    """
    data = picture.side_data.get("DISPLAYMATRIX")
    if data is None:
        return pixels
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _remark(picture: Any) -> str:
    """Return what is not as it should be about a frame that can be shown."""
    if picture.interlaced_frame:
        return "interlaced: each frame mixes two moments; deinterlace it first"
    if int(picture.color_trc) in HDR:
        return f"HDR ({HDR[int(picture.color_trc)]}), shown without tone mapping: its colours are flat"
    if any(component.is_alpha for component in picture.format.components):
        return TRANSPARENT
    return ""


def _coming(container: Any, stream: Any) -> Iterator[Any]:
    yield from container.decode(stream)


def _video_stream(path: Path, container: Any) -> Any:
    """Return the first real video stream, its declared size and length within the caps."""
    import av

    covers = av.stream.Disposition.attached_pic  # the picture of a song
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise BadClip(path, "has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise BadClip(path, "has a video codec that is not known here")
    _check_size(path, stream.codec_context.width, stream.codec_context.height)
    if stream.frames > MAX_FRAMES:
        raise BadClip(path, f"declares {stream.frames:,} frames; at most {MAX_FRAMES:,} are legal")
    return stream


def _check_size(path: Path, width: int, height: int) -> None:
    if width < 1 or height < 1:  # FFmpeg itself puts 0x0 in the place of a size above max_pixels
        raise BadClip(path, f"declares no size of its frames, or one above {MAX_PIXELS} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadClip(
            path,
            f"declares frames of {width}x{height}; legal: at most {MAX_SIDE} a side and {MAX_PIXELS} pixels",
        )


def _said(error: BaseException) -> str:
    """Return the error's own words, without the path that FFmpeg and the system repeat."""
    # Errors of the system and of FFmpeg have them in `strerror`.
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
