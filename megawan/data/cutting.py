"""How a file becomes samples: its windows in time and the size they are cut to, asked for by flags.

`cut` reads a file and gives its windows; `plan_windows` says the same of a file whose length and size are
known, so that a check of a dataset promises what its encoding will do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megawan.data.buckets import Bucket, Budget, Stride, halving_lengths
from megawan.data.video import BadClip, Frames, TooShort, pictures, read_windows

# Pixels per latent position of the codecs, by name: known before any weights are read.
CODEC_STRIDES: Mapping[str, Stride] = MappingProxyType(
    {"dct": (4, 8, 8), "wan2.1": (4, 8, 8), "wan2.2": (4, 16, 16)}
)


@dataclass(frozen=True)
class ClipSize:
    """What every clip is cut and scaled to: one size, or a bucket of a budget."""

    num_frames: int
    """Frames of a window; with a budget the most of them. A still image has one frame."""
    height: int
    width: int
    fps: float | None
    """Frames a second after resampling; None keeps the file's frames."""
    budget: Budget | None = None
    """Where given, each clip gets its bucket, and height and width mean nothing."""
    windows: int | None = 1
    """Most windows of a clip, from its start on; None for all that are whole."""
    window_stride: int | None = None
    """Frames from the start of a window to the next; None: as long as a window, so none overlap."""
    spread: bool = False
    """The windows are spread evenly from the start of a clip to its end, instead of following each other."""
    least: int = 1
    """Fewest frames of a sample: 2 for a model that needs a first and a last one, so it takes no images."""

    def length_of(self, frames: int, still: bool = False) -> int | None:
        """Return the frames of a window of a clip of so many frames, None when they are too few."""
        if still:
            length: int | None = 1
        elif self.budget is not None:
            length = self.budget.length_of(frames)
        else:
            length = self.num_frames if frames >= self.num_frames else None
        return length if length is not None and length >= self.least else None

    def size_of(self, length: int, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of windows of `length` frames of height x width; ValueError: none fits."""
        if self.budget is None:
            return self.height, self.width
        return self.budget.size_of(length, height, width)

    @property
    def most_frames(self) -> int | None:
        """Return how many frames of a clip (after resampling) its windows can reach; None: all it has."""
        if self.windows is None:
            return None
        return (self.windows - 1) * (self.window_stride or self.num_frames) + self.num_frames

    def settings(self) -> dict[str, Any]:
        """Return what a store says of itself; what is as by default is not mentioned."""
        settings: dict[str, Any] = {"num_frames": self.num_frames}
        if self.budget is None:
            settings |= {"height": self.height, "width": self.width}
        else:
            settings["bucket"] = {
                "lengths": sorted(self.budget.lengths),
                "max_area": self.budget.max_area,
                "max_tokens": self.budget.max_tokens,
                "step": self.budget.step,
                "max_upscale": self.budget.max_upscale,
            }
        settings["fps"] = self.fps
        if self.spread:
            settings |= {"windows": self.windows, "window_placement": "uniform"}
        elif self.windows != 1:
            settings |= {"windows": self.windows or "all", "window_stride": self.window_stride}
        return settings

    def fewest_frames(self, still: bool = False) -> int:
        """Return how many frames a clip needs at least, for messages."""
        if still:
            return self.least
        lengths = self.budget.lengths if self.budget else (self.num_frames,)
        return min(length for length in lengths if length >= self.least)

    def starts_of(self, frames: int, length: int) -> list[int]:
        """Return where windows of `length` frames start in a clip of so many frames, ascending."""
        last = frames - length
        if not self.spread:
            starts = range(0, last + 1, self.window_stride or length)
            return list(starts if self.windows is None else starts[: self.windows])
        gaps = (self.windows or 1) - 1
        # Rounded down, in whole numbers; a clip with fewer places than windows gives each place once.
        return list(dict.fromkeys(number * last // gaps for number in range(gaps + 1))) if gaps else [0]


@dataclass(frozen=True)
class Window:
    """One sample's frames."""

    number: int
    """Which window of its file, from 0."""
    start: int
    """Frames of the file before it, after resampling."""
    frames: Frames
    last: bool
    cut_short: str | None
    """With the last one: why the file gave no more, where that is damage."""


def cut(path: Path, size: ClipSize) -> Iterator[Window]:
    """Yield the windows of a file, at least one, in order.

    The longest window is tried first and its frames are decoded once; a shorter clip is read again at its own
    length, and windows that are spread over a clip are cut in a second reading, when its length is known.
    Damage behind a whole window ends the file there; in front of one it is the file's end. Raises BadClip for
    a file that gives none.
    """
    if size.spread:
        yield from _spread_windows(path, size)
        return
    length = size.num_frames
    while True:
        try:
            yield from _windows(path, size, length)
            return
        except TooShort as short:
            shorter = size.length_of(short.frames, short.still)
            if shorter is None or shorter >= length:
                raise TooShort(
                    path, size.fewest_frames(short.still), short.frames, size.fps, short.still
                ) from None
            length = shorter


def plan_windows(
    frames: int, height: int, width: int, size: ClipSize, *, still: bool = False, damaged: bool = False
) -> tuple[Bucket, list[int]]:
    """Return the bucket and the starts of the windows that `cut` gives of a file of so many frames.

    `frames` are counted after resampling, and up to the damage where the file is `damaged`. Raises ValueError
    with the reason when it gives none.
    """
    length = size.length_of(frames, still)
    if length is None or (damaged and length < size.num_frames and not still):
        least = size.num_frames if damaged else size.fewest_frames(still)
        raise ValueError(f"has {frames} frames; {least} are needed")
    bucket = Bucket(length, *size.size_of(length, height, width))
    return bucket, size.starts_of(frames, length)


def _spread_windows(path: Path, size: ClipSize) -> Iterator[Window]:
    """Yield windows spread over the clip, up to its damage if it has any: read once to count its frames."""
    frames, still, damage = 0, False, None
    try:
        for picture in pictures(path, size.fps):
            frames, still = frames + 1, picture.still
    except BadClip as error:
        damage = error
    length = size.length_of(frames, still)
    if damage and (length is None or (length < size.num_frames and not still)):
        raise damage
    if length is None:
        raise TooShort(path, size.fewest_frames(still), frames, size.fps, still)
    starts = size.starts_of(frames, length)
    reading = read_windows(path, length, partial(size.size_of, length), size.fps, limit=None, starts=starts)
    for number, (start, pixels) in enumerate(reading):
        last = number + 1 == len(starts)
        yield Window(number, start, pixels, last, damage.reason if damage and last else None)


def _windows(path: Path, size: ClipSize, length: int) -> Iterator[Window]:
    """Yield the windows of one length, each held back until it is known whether it is the last."""
    held: tuple[int, int, Frames] | None = None
    reading = read_windows(
        path, length, partial(size.size_of, length), size.fps, stride=size.window_stride, limit=size.windows
    )
    try:
        for number, (start, frames) in enumerate(reading):
            if held is not None:
                yield Window(*held, last=False, cut_short=None)
            held = number, start, frames
    except BadClip as error:
        if held is None:
            raise
        yield Window(*held, last=True, cut_short=error.reason)
        return
    if held is not None:
        yield Window(*held, last=True, cut_short=None)


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """The flags of size and length, the same for every tool that reads clips."""

    num_frames: int = 81
    """Frames of every clip, 4n+1; with --bucket auto the most of them. Still images have one."""
    height: int = 480
    """Pixel height; a multiple of 16 (32 for wan2.2)."""
    width: int = 832
    """Pixel width; likewise."""
    fps: str = "16"
    """Resample to so many frames a second (24 for ti2v-5B), or keep the file's frames."""
    bucket: Literal["fixed", "auto"] = "fixed"
    """fixed: every clip is cut to --height x --width x --num_frames, shorter ones are rejected. auto: every
    clip gets the size that shows most of it within the budgets, and the longest length that it has."""
    max_area: str | None = None
    """With auto, the most pixels of a frame: a number, or HEIGHTxWIDTH. Default: --height x --width."""
    max_tokens: int | None = None
    """With auto, the most tokens of a clip in the transformer (81 frames of 480x832 are 32760); long clips
    become smaller to fit. Default: no limit besides the area."""
    frame_buckets: str | None = None
    """With auto, the legal lengths, 4n+1, such as 81,49,17. Default: --num_frames, then each about half the
    one before: 81,41,21,9,5."""
    bucket_step: int | None = None
    """With auto, heights and widths are multiples of this; a larger one makes fewer buckets. Default: 16, and
    32 for wan2.2."""
    max_upscale: float = 1.0
    """With auto, the most that a small picture is enlarged."""
    windows: str = "1"
    """Windows that a long clip is cut into, each a sample of its own: a number, counted from its start, or
    all that are whole."""
    window_stride: int | None = None
    """Frames from the start of a window to the next, after resampling; fewer than a window has make them
    overlap. Default: the window's own length."""
    window_placement: Literal["start", "uniform"] = "start"
    """start: windows are counted from the clip's start. uniform: --windows N (2 or more) of them are spread
    evenly, the first at its start, the last at its end; in a short clip they overlap."""


def clip_size(options: CutOptions, stride: Stride, *, still_images: bool = True) -> ClipSize:
    """Return what the flags ask for, for a codec of `stride`; without `still_images` they are left out.

    Raises ValueError naming the flag.
    """
    if options.num_frames < 1 or (options.num_frames - 1) % stride[0]:
        raise ValueError(f"--num_frames {options.num_frames} must be {stride[0]}n+1")
    for name, value, step in (
        ("height", options.height, 2 * stride[1]),
        ("width", options.width, 2 * stride[2]),
    ):
        if value < step or value % step:
            raise ValueError(f"--{name} {value} must be a multiple of {step}")
    windows = None if options.windows == "all" else _number("--windows", options.windows, "or all")
    if options.window_stride is not None and options.window_stride < 1:
        raise ValueError(f"--window_stride {options.window_stride} must be 1 or more")
    if options.window_stride is not None and windows == 1:
        raise ValueError("--window_stride means nothing with one window; give --windows N or all")
    if not still_images and options.num_frames == 1:
        raise ValueError("a model of first and last frame needs two frames; give --num_frames 5 or more")
    spread = options.window_placement == "uniform"
    if spread and (windows is None or windows < 2):
        raise ValueError(f"--window_placement uniform needs --windows 2 or more, not {options.windows}")
    if spread and options.window_stride is not None:
        raise ValueError("--window_stride means nothing with --window_placement uniform; give one of them")
    return ClipSize(
        options.num_frames,
        options.height,
        options.width,
        frame_rate(options.fps),
        _budget(options, stride),
        windows,
        options.window_stride,
        spread,
        1 if still_images else 2,
    )


def frame_rate(text: str) -> float | None:
    """Return the --fps value, None for keep. Raises ValueError for anything else."""
    if text == "keep":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise ValueError(f"--fps {text} must be a number above 0, or keep")
    return value


def _budget(options: CutOptions, stride: Stride) -> Budget | None:
    if options.bucket == "fixed":
        given = {
            "max_area": options.max_area is not None,
            "max_tokens": options.max_tokens is not None,
            "frame_buckets": options.frame_buckets is not None,
            "bucket_step": options.bucket_step is not None,
            "max_upscale": options.max_upscale != 1.0,
        }
        needless = [name for name, is_given in given.items() if is_given]
        if needless:
            raise ValueError(f"--{needless[0]} needs --bucket auto; with one fixed size it means nothing")
        return None
    if options.frame_buckets is None:
        lengths = halving_lengths(options.num_frames)
    else:
        words = options.frame_buckets.replace(",", " ").split()
        lengths = tuple(_number("--frame_buckets", word, "or several with commas") for word in words)
        too_long = [length for length in lengths if length > options.num_frames]
        if options.num_frames not in lengths:
            raise ValueError(
                f"--frame_buckets {options.frame_buckets} must contain --num_frames {options.num_frames}, the"
                " longest of them"
            )
        if too_long:
            raise ValueError(f"--frame_buckets {too_long[0]} is above --num_frames {options.num_frames}")
    return Budget(
        lengths,
        options.height * options.width if options.max_area is None else _area(options.max_area),
        options.max_tokens,
        options.bucket_step or 2 * max(stride[1:]),
        stride,
        options.max_upscale,
    )


def _area(text: str) -> int:
    sides = text.lower().replace("*", "x").split("x")
    if len(sides) > 2:
        raise ValueError(f"--max_area {text} must be a number of pixels, or HEIGHTxWIDTH")
    area = 1
    for side in sides:
        area *= _number("--max_area", side, "or HEIGHTxWIDTH")
    return area


def _number(flag: str, text: str, otherwise: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{flag} {text} must be a whole number above 0, {otherwise}")
    return int(text)
