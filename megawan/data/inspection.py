"""A dataset looked at before anything is encoded: what each file shows and becomes, what speaks against it.

Every file is decoded whole, as the encoder would, but each picture is only kept as a thumbnail; the numbers
below are in grey levels, 0 to 255, of thumbnails of THUMB x THUMB.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megawan.data.buckets import Bucket, Stride, kept_share, tokens_of, upscale
from megawan.data.cutting import ClipSize, plan_windows
from megawan.data.manifest import Manifest, Row
from megawan.data.video import BadClip, Frames, Picture, pictures, source_digest

THUMB = 32
BLACK = 24  # a picture is black when nearly all of it is darker
STATIC = 0.5  # a video is static when no picture differs more from its first on average
CUT = (
    25.0  # a scene ends where a picture differs more than this, and five times the usual, from the one before
)
ALIKE = 2.0  # two clips look alike when their first, middle and last pictures differ less on average
LITTLE_KEPT = 0.7  # of the area, or of the first picture's detail, in the crop


@dataclass(frozen=True)
class Look:
    """What a file shows."""

    sha256: str
    frames: int
    """After resampling, up to the damage if there is any."""
    height: int
    width: int
    fps: float
    """The file's own, on average; 0 for an image."""
    still: bool
    """An image that does not move."""
    damage: str | None
    """Why it cannot be decoded any further."""
    black: float
    """Share of black pictures."""
    starts_black: bool
    static: bool
    """A video that does not move."""
    cuts: tuple[int, ...]
    """Frames that begin another scene."""
    detail: NDArray[np.float32]
    """[THUMB, THUMB], where the first picture has edges."""
    signature: NDArray[np.uint8]
    """[3, 8, 8, 3], the first, middle and last picture, very small."""
    remarks: tuple[str, ...] = ()
    """What the reader of the file noticed."""


@dataclass
class Checked:
    """One row of the manifest: what it becomes and what was noticed."""

    row: Row
    look: Look | None = None
    bucket: Bucket | None = None
    starts: list[int] = field(default_factory=list)
    """Where its windows start, in frames after resampling: as many samples."""
    tokens: int = 0
    """Of one sample."""
    kept: float = 0.0
    """Share of the picture's area inside the crop."""
    detail_kept: float = 0.0
    """Share of the first picture's edges inside the crop."""
    caption_tokens: int | None = None
    caption_cut: bool = False
    """The caption is longer than the model reads."""
    dropped: str | None = None
    """Why nothing of it would be encoded."""
    warnings: list[str] = field(default_factory=list)


def check(
    manifest: Manifest,
    size: ClipSize,
    stride: Stride,
    *,
    count_tokens: Callable[[str], int] | None = None,
    text_len: int = 512,
    workers: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> list[Checked]:
    """Return what every row of the manifest becomes, with the encoder's own decisions, and what was noticed.

    `count_tokens` measures captions; `workers` processes read files at the same time, 0 reads them here;
    `tick` is called after every file. Raises ValueError when a reading process dies.
    """
    found: list[Checked] = []
    first_with: dict[str, Checked] = {}
    listed: set[tuple[str, str]] = set()
    for row, (seen, refused) in zip(manifest.rows, _looks(manifest.rows, size.fps, workers), strict=True):
        checked = Checked(row, seen, dropped=refused)
        found.append(checked)
        if count_tokens is not None:
            checked.caption_tokens = count_tokens(row.prompt)
            checked.caption_cut = checked.caption_tokens > text_len
            if checked.caption_cut:
                checked.warnings.append(f"caption cut from {checked.caption_tokens} to {text_len} tokens")
        if seen is not None:
            if (seen.sha256, row.prompt) in listed:
                checked.dropped = "the same file with the same caption is listed before"
            else:
                _judge(checked, seen, size, stride)
                twin = first_with.setdefault(seen.sha256, checked)
                if twin is not checked:
                    checked.warnings.append(f"the same bytes as row {twin.row.number}")
            if checked.dropped is None:  # the encoder looks for repeated rows only among those it can use
                listed.add((seen.sha256, row.prompt))
        tick()
    for checked, twin in _lookalikes([one for one in found if one.dropped is None]):
        checked.warnings.append(f"looks like row {twin.row.number}")
    return found


def look(path: Path, fps: float | None) -> Look:
    """Return what a file shows at `fps`. Raises BadClip for a file without one that can be decoded."""
    digest = source_digest(path)
    thumbs: list[NDArray[np.uint8]] = []
    height = width = 0
    decoded, lasts, still = 0, 0.0, False
    damage: str | None = None
    remarks: dict[str, None] = {}

    def count(picture: Picture) -> None:
        nonlocal decoded, lasts
        decoded, lasts = decoded + 1, picture.end

    try:
        for picture in pictures(path, fps, count):
            if not thumbs:
                height, width = picture.pixels.shape[:2]
                still = picture.still
            if picture.remark:
                remarks[picture.remark] = None
            thumbs.append(thumbs[-1] if picture.repeated else _thumb(picture.pixels))
    except BadClip as error:
        if not thumbs:
            raise
        damage = error.reason
    grey = np.stack([thumb.mean(axis=2, dtype=np.float32) for thumb in thumbs])
    dark = np.quantile(grey, 0.98, axis=(1, 2)) < BLACK
    away = np.abs(grey - grey[:1]).mean(axis=(1, 2))
    change = np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))
    cut = (change > CUT) & (change > 3 * (np.median(change) if len(change) else 0))
    down, right = np.gradient(grey[0])
    chosen = [thumbs[0], thumbs[len(thumbs) // 2], thumbs[-1]]
    return Look(
        digest,
        len(thumbs),
        height,
        width,
        decoded / lasts if lasts > 0 and not still else 0.0,
        still,
        damage,
        float(dark.mean()),
        bool(dark[0]),
        bool(not still and away.max() < STATIC),
        tuple(int(place) + 1 for place in np.flatnonzero(cut)),
        np.hypot(down, right).astype(np.float32),
        np.stack([_average(thumb, 8) for thumb in chosen]),
        tuple(remarks),
    )


def _judge(checked: Checked, seen: Look, size: ClipSize, stride: Stride) -> None:
    """Fill in what the clip becomes, and what speaks against it."""
    try:
        bucket, starts = plan_windows(
            seen.frames, seen.height, seen.width, size, still=seen.still, damaged=seen.damage is not None
        )
    except ValueError as error:
        checked.dropped = seen.damage or str(error)
        return
    checked.bucket, checked.starts, checked.tokens = bucket, starts, tokens_of(bucket, stride)
    checked.kept = kept_share(seen.height, seen.width, bucket)
    checked.detail_kept = _detail_kept(seen, bucket)
    used = starts[-1] + bucket.frames
    inside = [cut for cut in seen.cuts if any(start < cut < start + bucket.frames for start in starts)]
    enlarged = upscale(seen.height, seen.width, bucket)
    notes = {
        f"damaged behind frame {used}: {seen.damage}": seen.damage is not None,
        f"black in {seen.black:.0%} of its frames": seen.black >= 0.5,
        "begins black": seen.starts_black and seen.black < 0.5,
        "static": seen.static,
        f"cuts to another scene at frame {', '.join(map(str, inside))}": bool(inside),
        f"the crop keeps {checked.kept:.0%} of the picture": checked.kept < LITTLE_KEPT,
        f"the crop keeps {checked.detail_kept:.0%} of the first frame's detail": (
            checked.detail_kept < LITTLE_KEPT <= checked.kept
        ),
        f"enlarged {enlarged:.2g} times": enlarged > 1.01,
    }
    checked.warnings += [note for note, applies in notes.items() if applies]
    checked.warnings += seen.remarks


def _detail_kept(seen: Look, bucket: Bucket) -> float:
    scale = max(bucket.height / seen.height, bucket.width / seen.width)
    share = bucket.height / (scale * seen.height), bucket.width / (scale * seen.width)
    weights = [_inside(kept) for kept in share]
    total = float(seen.detail.sum())
    return float(weights[0] @ seen.detail @ weights[1]) / total if total > 0 else 1.0


def _inside(kept: float) -> NDArray[np.float64]:
    """Return which share of each row of a thumbnail is inside the middle `kept` of a picture."""
    edges = np.arange(THUMB + 1) / THUMB
    low, high = (1 - kept) / 2, (1 + kept) / 2
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(covered, 0, None) * THUMB


def _lookalikes(found: Sequence[Checked]) -> Iterator[tuple[Checked, Checked]]:
    """Yield (clip, earlier clip) whose files differ but look alike; black and static ones do not count."""
    clips = [
        (checked, checked.look.signature.astype(np.float32).reshape(-1))
        for checked in found
        if checked.look is not None and checked.look.black < 0.5 and not checked.look.static
    ]
    if len(clips) < 2:
        return
    # Clips that look alike are alike in their mean, so only neighbours in its order are compared.
    means = np.array([signature.mean() for _, signature in clips])
    by_mean = np.argsort(means, kind="stable")
    signatures = np.stack([clips[place][1] for place in by_mean])
    sorted_means = means[by_mean]
    pairs: dict[int, int] = {}
    for place in range(len(clips)):
        end = int(np.searchsorted(sorted_means, sorted_means[place] + ALIKE, side="right"))
        difference = np.abs(signatures[place + 1 : end] - signatures[place]).mean(axis=1)
        for other in np.flatnonzero(difference < ALIKE):
            low, high = sorted((int(by_mean[place]), int(by_mean[place + 1 + other])))
            pairs[high] = min(low, pairs.get(high, low))
    for high in sorted(pairs):
        one, twin = clips[high][0], clips[pairs[high]][0]
        if one.look is not None and twin.look is not None and one.look.sha256 != twin.look.sha256:
            yield one, twin


def _thumb(pixels: Frames) -> NDArray[np.uint8]:
    small = Image.fromarray(pixels).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
    return np.asarray(small)


def _average(thumb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    part = THUMB // size
    blocks = thumb.reshape(size, part, size, part, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


Seen = tuple[Look | None, str | None]


def _looks(rows: Sequence[Row], fps: float | None, workers: int) -> Iterator[Seen]:
    """Yield (look, None) or (None, why not) of every row's file, in order."""
    paths = [row.path for row in rows]
    if workers < 1:
        yield from map(partial(_look_or_reason, fps=fps), paths)
        return
    # Started fresh: a forked copy of a process that holds threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(_look_or_reason, fps=fps), paths)
        except BrokenProcessPool:
            raise ValueError(
                "a reading process died (memory, or a crash of its decoder); --workers 0 shows where"
            ) from None


def _look_or_reason(path: Path, fps: float | None) -> Seen:
    try:
        return look(path, fps), None
    except BadClip as error:
        return None, error.reason
