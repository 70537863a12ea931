"""One picture that shows many short clips: a row per caption, a column per source, a few frames of each side
by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Frames = np.ndarray  # uint8 [T, H, W, 3]

MARGIN = 8
GAP = 2
TEXT_HEIGHT = 18


@dataclass(frozen=True)
class Row:
    """One caption with a clip for every column; None leaves the cell empty."""

    caption: str
    clips: Sequence[Frames | None]


def contact_sheet(
    columns: Sequence[str], rows: Sequence[Row], frames_shown: int = 5, cell_height: int = 96
) -> Image.Image:
    """Return the picture: column titles on top, each row's caption above its cells, time running to the
    right.

    Each cell shows `frames_shown` frames spread evenly from the first to the last, scaled to `cell_height`
    pixels. Raises ValueError when there is nothing to show or a row has another number of clips than there
    are columns.
    """
    clips = [clip for row in rows for clip in row.clips if clip is not None]
    if not all(map(len, clips)) or not clips or any(len(row.clips) != len(columns) for row in rows):
        raise ValueError(
            f"a contact sheet needs rows of {len(columns)} clips with frames, at least one of them not None"
        )
    width = max(_width(clip, cell_height) for clip in clips)
    cell = frames_shown * width
    sheet = Image.new(
        "RGB",
        (
            MARGIN + len(columns) * (cell + MARGIN),
            MARGIN + TEXT_HEIGHT + len(rows) * (TEXT_HEIGHT + cell_height + MARGIN),
        ),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(columns):
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN // 2), title, fill="black", font=font)
    top = MARGIN + TEXT_HEIGHT
    for row in rows:
        draw.text((MARGIN, top), " ".join(row.caption.split()), fill="dimgray", font=font)
        top += TEXT_HEIGHT
        for column, clip in enumerate(row.clips):
            if clip is None:
                continue
            left = MARGIN + column * (cell + MARGIN)
            for place, index in enumerate(np.linspace(0, len(clip) - 1, frames_shown).round().astype(int)):
                picture = Image.fromarray(clip[index]).resize(
                    (_width(clip, cell_height) - GAP, cell_height), Image.Resampling.NEAREST
                )
                sheet.paste(picture, (left + place * width, top))
        top += cell_height + MARGIN
    return sheet


def _width(clip: Frames, cell_height: int) -> int:
    """Return the pixels that one frame and the gap after it take at this height."""
    return max(1, round(clip.shape[2] * cell_height / clip.shape[1]) - GAP) + GAP
