"""A manifest's clips through the encoders into a latent store; what is finished is never done again."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megawan.data.ahead import ahead
from megawan.data.cutting import ClipSize, Window, cut
from megawan.data.latents import SHARD_BYTES, LatentStore, StoreWriter
from megawan.data.manifest import Manifest, Row
from megawan.data.video import BadClip, Frames, source_digest
from megawan.files import write_text

REJECTED = "rejected.jsonl"
REPEATED = "the same file with the same caption is listed before"
CAPTIONS_KEPT = 32  # features of a long caption are 8 MiB
WAITING_BYTES = 2 << 30  # of frames that wait for others of their shape

Item = TypeVar("Item")


class Codec(Protocol):
    """The video encoder, handed in: pixels float32 [B, 3, T, H, W] in [-1, 1] to latents [B, C, t, h, w]."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def stride(self) -> tuple[int, int, int]: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, pixels: Tensor) -> Tensor: ...


class Text(Protocol):
    """The text encoder, handed in: captions to rows [S_true, dim] at their true length."""

    @property
    def dim(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, texts: Sequence[str], max_length: int) -> list[Tensor]: ...


class Conditions(Protocol):
    """What an image-to-video model gets besides, handed in: pixels [B, 3, T, H, W] to "condition", "clip"."""

    @property
    def settings(self) -> dict[str, Any]: ...
    def encode(self, pixels: Tensor) -> dict[str, Tensor]: ...


@dataclass
class Report:
    """What an encode came to, and so far while it runs."""

    store: LatentStore | None = None
    """The finished store; None after one of several shares."""
    encoded: int = 0
    """Samples that this call made."""
    kept: int = 0
    """Samples that an earlier call had made."""
    rejected: list[tuple[Row, str]] = field(default_factory=list)
    """Clips that gave no sample, and why."""
    cut_short: list[tuple[Row, str, int]] = field(default_factory=list)
    """Clips that are damaged behind their samples, what is wrong there, and how many samples they gave."""
    samples: dict[int, list[str]] = field(default_factory=dict)
    """The keys of the samples of every row that gave some, by its number."""
    waited: float = 0.0
    """Seconds that the encoders waited for frames."""

    def as_json(self) -> dict[str, Any]:
        """Return what one share tells about its rows."""
        return {
            "encoded": self.encoded,
            "kept": self.kept,
            "rejected": {row.number: reason for row, reason in self.rejected},
            "cut_short": {row.number: [reason, samples] for row, reason, samples in self.cut_short},
            "samples": self.samples,
            "waited": self.waited,
        }


def encode(
    manifest: Manifest,
    output: Path,
    codec: Codec,
    codec_name: str,
    text: Text,
    size: ClipSize,
    text_len: int,
    *,
    device: torch.device,
    conditions: Conditions | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[dict[str, Any]], Sequence[Mapping[str, Any]] | None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    batch: int = 1,
    workers: int = 0,
    tick: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Encode every clip of `manifest` into the store `output` and return what was done.

    Each window of a clip (see `ClipSize`) is a sample, named by the file's bytes, the caption and its number.
    share (i, n) with n > 1 takes every n-th row from row i and writes no index: several tasks fill one store,
    and a last call without a share finds all finished, and writes the index without copying anything. Or all
    shares run at once and `gather` is given: it gets what this share did (`Report.as_json`) and returns what
    all n did to the one that shall write the index, None to the others. `tick` is called after every clip.

    `workers` threads read ahead, which changes no byte. `batch` samples of one shape are encoded together;
    where that changes their last bits depends on the codec and the machine, so a store says its batch.

    A clip that cannot be used is listed in OUTPUT/rejected.jsonl with the reason, whichever call found it
    out; so is one that is damaged behind its samples. Samples that a shard of an earlier, interrupted call
    holds are kept. Raises ValueError when no clip can be used, when the folder holds a store of other
    settings, or when the size does not fit the codec.
    """
    settings = store_settings(codec, codec_name, text, text_len, size, conditions, batch)
    report = Report()
    order: dict[str, None] = {}  # keys of the samples, in the manifest's order
    features = Features(text, text_len)
    mine, shares = share
    rows = manifest.rows[mine::shares]
    part = f"{mine}of{shares}" if shares > 1 else ""
    with StoreWriter(output, settings, shard_bytes, part) as writer:
        stored = writer.rows
        groups = _Groups(batch)

        def write(group: Sequence[_Sample]) -> None:
            made = group_tensors([sample.window.frames for sample in group], codec, device, conditions)
            for place, sample in enumerate(group):
                tensors = {name: value[place] for name, value in made.items()}
                tensors["text"] = features[sample.row.prompt]
                described = describe_sample(sample.row, sample.digest, sample.window, size)
                writer.add(sample.key, tensors, described, more=place + 1 < len(group))
            report.encoded += len(group)

        with contextlib.closing(ahead((partial(_read, row, stored, size) for row in rows), workers)) as clips:
            for row, reading in zip(rows, clips, strict=True):
                frames = _timed(reading, report)
                try:
                    digest, _ = next(frames)
                    if sample_key(digest, row.prompt) in order:
                        raise BadClip(row.path, REPEATED)
                    keys = finished_windows(stored, digest, row.prompt, size)
                    if keys:
                        report.kept += len(keys)
                        cut_short = stored[keys[-1]].get("cut_short")
                    else:
                        cut_short = None
                        for _, window in frames:
                            if window is None:
                                continue
                            cut_short = window.cut_short
                            keys.append(sample_key(digest, row.prompt, window.number))
                            if keys[-1] in stored:
                                report.kept += 1
                                continue
                            for group in groups.add(_Sample(keys[-1], row, digest, window)):
                                write(group)
                    order.update(dict.fromkeys(keys))
                    report.samples[row.number] = keys
                    if cut_short:
                        report.cut_short.append((row, cut_short, len(keys)))
                except BadClip as error:  # and no OSError: a full disk is not the clip's fault
                    report.rejected.append((row, str(error)))
                tick(report)
        for group in groups.rest():
            write(group)
        if not order and gather is None:
            raise ValueError(_nothing(rows, report))
        writer.flush()
        if shares == 1:
            write_rejected(output / REJECTED, report)
            report.store = writer.finish(list(order), features[""])
    told = gather(report.as_json()) if gather is not None else None
    if told is not None:
        report = _merged(manifest, told)
        if not report.samples:
            raise ValueError(_nothing(manifest.rows, report))
        with StoreWriter(output, settings, shard_bytes) as writer:
            write_rejected(output / REJECTED, report)
            keys = [key for row in manifest.rows for key in report.samples.get(row.number, [])]
            report.store = writer.finish(keys, features[""])
    return report


def store_settings(
    codec: Codec,
    codec_name: str,
    text: Text,
    text_len: int,
    size: ClipSize,
    conditions: Conditions | None,
    batch: int = 1,
) -> dict[str, Any]:
    """Return what a store says of all its samples: samples that differ in it are not mixed."""
    return {
        "codec": codec_name,
        "codec_fingerprint": codec.fingerprint,
        "latent_channels": codec.latent_channels,
        "stride": list(codec.stride),
        "text_fingerprint": text.fingerprint,
        "text_dim": text.dim,
        "text_len": text_len,
        **size.settings(),
        **(conditions.settings if conditions else {}),
        **({"batch": batch} if batch > 1 else {}),
    }


def visual_tensors(
    frames: Frames, codec: Codec, device: torch.device, conditions: Conditions | None = None
) -> dict[str, Tensor]:
    """Return what a sample stores of its frames, by name (`Sample` has the names)."""
    return {name: value[0] for name, value in group_tensors([frames], codec, device, conditions).items()}


def group_tensors(
    clips: Sequence[Frames], codec: Codec, device: torch.device, conditions: Conditions | None = None
) -> dict[str, Tensor]:
    """Return what samples of one shape store of their frames, by name, encoded together."""
    pixels = torch.cat([to_pixels(frames) for frames in clips]).to(device)
    extras = conditions.encode(pixels) if conditions else {}
    return {"latents": codec.encode(pixels), **extras}


def sample_key(source_sha256: str, prompt: str, window: int = 0) -> str:
    """Return the name of a sample in its store: a digest of the file's bytes, the caption and the window."""
    text = f"{source_sha256}\n{prompt}" + (f"\n{window}" if window else "")
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def finished_windows(
    stored: Mapping[str, Mapping[str, Any]], source_sha256: str, prompt: str, size: ClipSize
) -> list[str]:
    """Return the keys of all samples of a clip when all are in `stored`, key to row; else an empty list."""
    keys: list[str] = []
    while True:
        key = sample_key(source_sha256, prompt, len(keys))
        if key not in stored:
            return []
        keys.append(key)
        if len(keys) == size.windows or stored[key].get("windows") == len(keys):
            return keys


def to_pixels(frames: Frames) -> Tensor:
    """Return pixels float32 [1, 3, T, H, W] in [-1, 1] of frames uint8 [T, H, W, 3]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


@dataclass(frozen=True)
class _Sample:
    """A sample that is not encoded yet."""

    key: str
    row: Row
    digest: str
    window: Window


class _Groups:
    """Samples that wait for others of their shape, to be encoded together.

    Which samples make a group depends only on those that no shard holds, in their order, and a shard ends
    behind a whole group: so an interrupted encode goes on with the same groups.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[tuple[int, ...], list[_Sample]] = {}
        self._bytes = 0

    def add(self, sample: _Sample) -> Iterator[list[_Sample]]:
        """Add a sample and yield the groups that are to be encoded now."""
        shape = sample.window.frames.shape
        self._waiting.setdefault(shape, []).append(sample)
        self._bytes += sample.window.frames.nbytes
        if len(self._waiting[shape]) == self._size:
            yield self._take(shape)
        while self._bytes > WAITING_BYTES:
            yield self._take(next(iter(self._waiting)))

    def rest(self) -> Iterator[list[_Sample]]:
        """Yield the groups that never became whole."""
        for shape in list(self._waiting):
            yield self._take(shape)

    def _take(self, shape: tuple[int, ...]) -> list[_Sample]:
        group = self._waiting.pop(shape)
        self._bytes -= sum(sample.window.frames.nbytes for sample in group)
        return group


def _read(
    row: Row, stored: Mapping[str, Mapping[str, Any]], size: ClipSize
) -> Iterator[tuple[str, Window | None]]:
    """Yield the digest of a clip's bytes, then its windows with it unless all are stored."""
    digest = source_digest(row.path)
    yield digest, None
    if not finished_windows(stored, digest, row.prompt, size):
        for window in cut(row.path, size):
            yield digest, window


def _timed(items: Iterator[Item], report: Report) -> Iterator[Item]:
    """Yield the items; the time that they take to come is added to the report."""
    while True:
        begun = time.monotonic()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            report.waited += time.monotonic() - begun
        yield item


def _merged(manifest: Manifest, told: Sequence[Mapping[str, Any]]) -> Report:
    """Return the report of all rows out of those of the shares, as one call would have made it."""
    merged = Report(
        encoded=sum(one["encoded"] for one in told),
        kept=sum(one["kept"] for one in told),
        waited=sum(one["waited"] for one in told) / len(told),
    )
    seen: set[str] = set()
    for place, row in enumerate(manifest.rows):
        one, number = told[place % len(told)], str(row.number)
        keys = one["samples"].get(number, [])
        if keys and keys[0] in seen:  # by another share
            merged.rejected.append((row, str(BadClip(row.path, REPEATED))))
        elif keys:
            merged.samples[row.number] = keys
            seen.update(keys)
            if number in one["cut_short"]:
                merged.cut_short.append((row, *one["cut_short"][number]))
        else:
            merged.rejected.append((row, one["rejected"][number]))
    return merged


def _nothing(rows: Sequence[Row], report: Report) -> str:
    why = report.rejected[0][1] if report.rejected else "this share has no rows"
    return f"0 usable clips of {len(rows)}; the first: {why}"


class Features:
    """Captions' features, the last few kept: windows of one clip share a caption, and some datasets do."""

    def __init__(self, text: Text, text_len: int) -> None:
        self._text = text
        self._text_len = text_len
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, prompt: str) -> Tensor:
        if prompt not in self._kept:
            if len(self._kept) == CAPTIONS_KEPT:
                del self._kept[next(iter(self._kept))]
            (self._kept[prompt],) = self._text.encode([prompt], self._text_len)
        return self._kept[prompt]


def describe_sample(row: Row, digest: str, window: Window, size: ClipSize) -> dict[str, Any]:
    """Return the index's row of a sample: where it comes from."""
    described: dict[str, Any] = {"prompt": row.prompt, "source": row.path.name, "source_sha256": digest}
    if size.windows != 1:
        described["start"] = window.start
        if window.last:
            described["windows"] = window.number + 1
        if window.cut_short:
            described["cut_short"] = window.cut_short
    return described


def write_rejected(file: Path, report: Report) -> None:
    """Write the clips that gave no sample, or fewer than they have, one JSON object a line; no file if
    none."""
    entries = [(row, reason, 0) for row, reason in report.rejected] + report.cut_short
    entries.sort(key=lambda entry: entry[0].number)
    if not entries:
        file.unlink(missing_ok=True)
        return
    lines = [
        json.dumps({"row": row.number, "file": str(row.path), "reason": reason, "samples": samples})
        for row, reason, samples in entries
    ]
    write_text(file, "\n".join(lines) + "\n")
