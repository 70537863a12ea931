"""Which samples a folder of clips will give, and their shapes, before any of them is encoded.

Every file is decoded as far as its encoding will decode it and judged by `plan_windows`, as in
tools/check_dataset.py; one that seems to give nothing is cut as the encoder would, which decides and gives
the reason. What a file gave is remembered by its size and time of change, so a second survey only asks the
file system.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megawan.data.buckets import Bucket
from megawan.data.cutting import ClipSize, cut, plan_windows
from megawan.data.encoding import sample_key
from megawan.data.manifest import Manifest, Row
from megawan.data.video import BadClip, pictures, source_digest

REPEATED = "the same file with the same caption is listed before"


@dataclass(frozen=True)
class PlannedClip:
    """A row of the manifest that gives samples."""

    row: Row
    sha256: str
    bucket: Bucket
    starts: tuple[int, ...]
    """Where its windows start, in frames after resampling: as many samples."""

    @property
    def keys(self) -> list[str]:
        """Return the names of its samples."""
        return [sample_key(self.sha256, self.row.prompt, number) for number in range(len(self.starts))]


@dataclass
class Survey:
    """What the whole manifest gives, in its order."""

    clips: list[PlannedClip] = field(default_factory=list)
    rejected: list[tuple[Row, str]] = field(default_factory=list)


class Memory:
    """What files gave, in a file of one JSON object a line; without a file it forgets."""

    def __init__(self, file: Path | None, size: ClipSize, *, writes: bool = True) -> None:
        """`size` is part of what was asked: answers of another one are passed over."""
        self._file = file if writes else None
        self._asked = hashlib.blake2b(json.dumps(size.settings()).encode(), digest_size=8).hexdigest()
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        lines = file.read_text("utf-8").split("\n") if file is not None and file.exists() else []
        for line in lines[:-1]:  # a kill may have torn the last one
            entry = json.loads(line)
            if entry["asked"] == self._asked:
                self._known[(entry["file"], entry["bytes"], entry["changed"])] = entry["found"]
        if file is not None and writes and lines and lines[-1]:
            file.write_text("".join(f"{line}\n" for line in lines[:-1]), "utf-8")

    def recall(self, path: Path) -> dict[str, Any] | None:
        """Return what the file gave when it was as it is now."""
        return self._known.get(self._now(path))

    def keep(self, path: Path, found: dict[str, Any]) -> None:
        """Remember what the file gives."""
        name, length, changed = now = self._now(path)
        self._known[now] = found
        if self._file is not None:
            entry = {"file": name, "bytes": length, "changed": changed, "asked": self._asked, "found": found}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _now(self, path: Path) -> tuple[str, int, int]:
        try:
            state = path.stat()
        except (OSError, ValueError):
            return str(path), -1, -1
        return str(path), state.st_size, state.st_mtime_ns


def survey(
    manifest: Manifest,
    size: ClipSize,
    memory: Memory,
    *,
    workers: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Return what every row of the manifest gives, with the decisions and the reasons of `encode`.

    `workers` processes read files at the same time, 0 reads them here; `tick` gets how many of how many files
    were read. Raises ValueError when no clip can be used or a reading process dies.
    """
    paths = dict.fromkeys(row.path for row in manifest.rows)
    unknown = [path for path in paths if memory.recall(path) is None]
    tick(0, len(unknown))
    for done, (path, found) in enumerate(zip(unknown, _looks(unknown, size, workers), strict=True), 1):
        memory.keep(path, found)
        tick(done, len(unknown))
    result, listed = Survey(), set[str]()
    for row in manifest.rows:
        found = memory.recall(row.path) or look(row.path, size)  # changed a moment ago
        if found["sha256"] is not None and sample_key(found["sha256"], row.prompt) in listed:
            result.rejected.append((row, str(BadClip(row.path, REPEATED))))
        elif found["refused"] is not None:
            result.rejected.append((row, str(BadClip(row.path, found["refused"]))))
        else:
            clip = PlannedClip(row, found["sha256"], Bucket(*found["bucket"]), tuple(found["starts"]))
            result.clips.append(clip)
            listed.add(clip.keys[0])
    if not result.clips:
        raise ValueError(f"0 usable clips of {len(manifest.rows)}; the first: {result.rejected[0][1]}")
    return result


def refused(sha256: str | None, error: BadClip) -> dict[str, Any]:
    """Return what a file gives that gives nothing."""
    return {"sha256": sha256, "bucket": None, "starts": [], "refused": error.reason}


def look(path: Path, size: ClipSize) -> dict[str, Any]:
    """Return what a file gives, ready for JSON: "sha256", "bucket", "starts", or "refused", the reason."""
    digest = None
    try:
        digest = source_digest(path)
        try:
            bucket, starts = _plan(path, size)
        except ValueError:
            windows = [(window.start, window.frames.shape[:3]) for window in cut(path, size)]
            bucket, starts = Bucket(*windows[0][1]), [start for start, _ in windows]
    except BadClip as error:
        return refused(digest, error)
    shape = [bucket.frames, bucket.height, bucket.width]
    return {"sha256": digest, "bucket": shape, "starts": starts, "refused": None}


def _plan(path: Path, size: ClipSize) -> tuple[Bucket, list[int]]:
    """Return bucket and starts as `plan_windows` says. Raises ValueError for a file that gives nothing."""
    frames, height, width, still, damaged = 0, 0, 0, False, False
    try:
        for picture in pictures(path, size.fps):
            if not frames:
                height, width = picture.pixels.shape[:2]
            frames, still = frames + 1, picture.still
            if frames == size.most_frames:
                break
    except BadClip:
        damaged = True
    return plan_windows(frames, height, width, size, still=still, damaged=damaged)


def _looks(paths: Sequence[Path], size: ClipSize, workers: int) -> Iterator[dict[str, Any]]:
    if workers < 1:
        yield from map(partial(look, size=size), paths)
        return
    # Started fresh: a forked copy of a process that holds threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(look, size=size), paths)
        except BrokenProcessPool:
            raise ValueError(
                "a reading process died (memory, or a crash of its decoder); --data.readers 0 shows where"
            ) from None
