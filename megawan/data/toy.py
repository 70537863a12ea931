"""Toy videos whose captions can be checked by measuring: one shape of one colour that moves one way.

"a red circle moving right": 2 shapes x 3 colours x 4 directions make the 24 CAPTIONS. `measure_clip` reads
colour and direction back from pixels, so that a trained model's samples can be scored without looking at
them.
"""

import csv
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megawan.data.video import Frames, write_mp4
from megawan.rng import generator_at

SHAPES = ("circle", "square")
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 235)}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # (x, y), y counts downwards
BACKGROUND = (24, 24, 28)
CAPTIONS = tuple(
    f"a {colour} {shape} moving {direction}"
    for shape in SHAPES
    for colour in COLOURS
    for direction in DIRECTIONS
)
SETTINGS_FILE = "toy.json"  # written last: a folder that holds it is a finished dataset


@dataclass(frozen=True)
class ToyOptions:
    """What a toy dataset consists of; equal options give equal files."""

    clips: int = 192
    """Number of clips; clip i shows caption i mod 24."""
    seed: int = 0
    """Start, speed and size of every shape are drawn from it."""
    frames: int = 9
    """Frames of a clip, 4n+1 and at least 5."""
    size: int = 64
    """Height and width in pixels, a multiple of 16 from 32 to 1024."""
    fps: int = 16
    """Frames a second."""

    def __post_init__(self) -> None:
        if not 1 <= self.clips <= 100_000:
            raise ValueError(f"clips must be 1 to 100000; given: {self.clips}")
        if self.frames < 5 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4n+1 and at least 5 (5, 9, 13, …); given: {self.frames}")
        if not 32 <= self.size <= 1024 or self.size % 16:
            raise ValueError(f"size must be a multiple of 16 from 32 to 1024; given: {self.size}")
        if not 1 <= self.fps <= 120:
            raise ValueError(f"fps must be 1 to 120; given: {self.fps}")


@dataclass(frozen=True)
class ToyCaption:
    """The three facts that a caption states."""

    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class ToyReading:
    """What a clip shows: a colour of COLOURS and a direction of DIRECTIONS, or "none" where there is none."""

    colour: str
    direction: str


def parse_caption(caption: str) -> ToyCaption:
    """Return what a caption of this dataset states; ValueError for any other text."""
    words = re.fullmatch(r"a (\w+) (\w+) moving (\w+)", caption.strip())
    if words is None or caption.strip() not in CAPTIONS:
        raise ValueError(f"{caption!r} is no caption of the toy dataset; legal: like {CAPTIONS[0]!r}")
    colour, shape, direction = words.groups()
    return ToyCaption(colour, shape, direction)


def render_clip(index: int, options: ToyOptions) -> Frames:
    """Return clip `index` of the dataset, uint8 RGB [T, H, W, 3]; its caption is CAPTIONS[index % 24].

    The shape is inside the picture in every frame, runs through 85 to 100 % of the room that it has, within
    the middle 40 % of the room across, and its edges are antialiased. So where a clip starts already belongs
    to its caption: with shorter ways anywhere in the picture the debug model learned colours within 500
    steps, but directions not within 1,500.
    """
    caption = parse_caption(CAPTIONS[index % len(CAPTIONS)])
    size_draw, travel_draw, along_draw, across_draw = torch.rand(
        4, generator=generator_at(options.seed, "toy", index), dtype=torch.float64
    ).tolist()
    size = options.size
    radius = size * (0.14 + 0.04 * size_draw)
    edge = radius + 1
    room = size - 2 * edge
    travel = room * (0.85 + 0.15 * travel_draw)
    low = edge + along_draw * (room - travel)
    across = edge + room * (0.3 + 0.4 * across_draw)
    done = np.linspace(0, 1, options.frames)
    x_step, y_step = DIRECTIONS[caption.direction]
    along = low + travel * (done if x_step + y_step > 0 else 1 - done)
    constant = np.full(options.frames, across)
    x, y = (along, constant) if x_step else (constant, along)

    place = np.arange(size) + 0.5
    away_x = np.abs(place[None, None, :] - x[:, None, None])
    away_y = np.abs(place[None, :, None] - y[:, None, None])
    if caption.shape == "circle":
        cover = np.clip(radius - np.hypot(away_x, away_y) + 0.5, 0, 1)
    else:
        half = 0.9 * radius  # a square of a circle's radius would look larger than the circle
        cover = np.clip(half - away_x + 0.5, 0, 1) * np.clip(half - away_y + 0.5, 0, 1)
    paint, ground = np.array(COLOURS[caption.colour], float), np.array(BACKGROUND, float)
    clip: Frames = np.round(ground + cover[..., None] * (paint - ground)).astype(np.uint8)
    return clip


def make_dataset(output: Path, options: ToyOptions) -> bool:
    """Write the dataset into the folder `output`; return False when it is already there with these options.

    It holds clips/00000.mp4 …, metadata.csv (`video,prompt`) and toy.json, and appears whole or not at all.
    Raises ValueError when `output` holds anything else, OSError when it cannot be written.
    """
    if _is_done(output, options):
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        (partial / "clips").mkdir(parents=True)
        with open(partial / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["video", "prompt"])
            for index in tqdm(range(options.clips), desc="toy clips", unit="clip", disable=None):
                name = _clip_name(index)
                write_mp4(partial / name, render_clip(index, options), options.fps)
                table.writerow([name, CAPTIONS[index % len(CAPTIONS)]])
        (partial / SETTINGS_FILE).write_text(json.dumps(asdict(options), indent=2) + "\n", "utf-8")
        os.rename(partial, output)  # over nothing or over an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def measure_clip(frames: Frames) -> ToyReading:
    """Return the colour and direction that `frames`, uint8 RGB [T, H, W, 3], show.

    Each pixel weighs as much as it is more colourful than the clip's background, less a quarter of the
    strongest. Colour is the channel that stands out over these; direction is the slope of their centroid over
    all frames, and "none" below 3 % of the picture from first to last frame.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must be [T, H, W, 3]; given: {list(frames.shape)}")
    pixels = frames.astype(np.float64)
    raised = np.clip(pixels - np.median(pixels, axis=(0, 1, 2)), 0, None)
    saturation = raised.max(axis=3) - raised.min(axis=3)
    strongest = np.quantile(saturation, 0.995)
    if strongest < 16:  # of 255: coding noise, no shape
        return ToyReading("none", "none")
    weight = np.clip(np.minimum(saturation, strongest) - strongest / 4, 0, None)
    colour = tuple(COLOURS)[int(np.argmax((weight[..., None] * raised).sum(axis=(0, 1, 2))))]
    return ToyReading(colour, _direction(weight))


def _direction(weight: NDArray[np.float64]) -> str:
    frames, height, width = weight.shape
    mass = weight.sum(axis=(1, 2))
    if frames < 2 or np.count_nonzero(mass) < 2:
        return "none"
    safe = np.maximum(mass, 1e-9)
    x = (weight.sum(axis=1) * np.arange(width)).sum(axis=1) / safe / width
    y = (weight.sum(axis=2) * np.arange(height)).sum(axis=1) / safe / height
    time = np.linspace(0, 1, frames)
    time = time - (time * mass).sum() / mass.sum()
    spread = (mass * time**2).sum()
    slope_x, slope_y = ((mass * time * place).sum() / spread for place in (x, y))
    if max(abs(slope_x), abs(slope_y)) < 0.03:
        return "none"
    if abs(slope_x) > abs(slope_y):
        return "right" if slope_x > 0 else "left"
    return "down" if slope_y > 0 else "up"


def _clip_name(index: int) -> str:
    return f"clips/{index:05d}.mp4"


def _is_done(output: Path, options: ToyOptions) -> bool:
    """Return whether `output` is this very dataset; ValueError when it is there and is something else."""
    if output.is_symlink() and not output.exists():
        raise ValueError(f"{output} is a link to nothing; give another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a new or empty folder")
    if not output.exists() or not any(output.iterdir()):
        return False
    settings = output / SETTINGS_FILE
    if not settings.is_file():
        raise ValueError(f"{output} is not empty and holds no toy dataset; give a new or empty folder")
    try:
        found = json.loads(settings.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{settings} cannot be read as JSON settings; give a new or empty folder")
    wanted = asdict(options)
    if found != wanted:
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        said = ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in names)
        raise ValueError(f"{output} holds another toy dataset ({said}); give a new or empty folder")
    missing = [
        name
        for name in ("metadata.csv", *(_clip_name(index) for index in range(options.clips)))
        if not (output / name).is_file()
    ]
    if missing:
        raise ValueError(
            f"{output} lacks {len(missing)} of its files, first {missing[0]}; remove it and run again"
        )
    return True
