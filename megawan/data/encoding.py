"""A manifest's clips through the encoders into a latent store; what is finished is never done again."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megawan.data.cutting import ClipSize, Window, cut
from megawan.data.latents import SHARD_BYTES, LatentStore, StoreWriter
from megawan.data.manifest import Manifest, Row
from megawan.data.video import BadClip, Frames, source_digest
from megawan.files import write_text

REJECTED = "rejected.jsonl"
CAPTIONS_KEPT = 32  # features of a long caption are 8 MiB


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
    shard_bytes: int = SHARD_BYTES,
    tick: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Encode every clip of `manifest` into the store `output` and return what was done.

    Each window of a clip (see `ClipSize`) is a sample, named by the file's bytes, the caption and its number.
    share (i, n) with n > 1 takes every n-th row from row i and writes no index: several tasks fill one store,
    and a last call without a share finds all finished, and writes the index without copying anything. `tick`
    is called after every clip.

    A clip that cannot be used is listed in OUTPUT/rejected.jsonl with the reason, whichever call found it
    out; so is one that is damaged behind its samples. Samples that a shard of an earlier, interrupted call
    holds are kept. Raises ValueError when no clip can be used, when the folder holds a store of other
    settings, or when the size does not fit the codec.
    """
    settings = store_settings(codec, codec_name, text, text_len, size, conditions)
    report = Report()
    order: dict[str, None] = {}  # keys of the samples, in the manifest's order
    features = Features(text, text_len)
    mine, shares = share
    rows = manifest.rows[mine::shares]
    part = f"{mine}of{shares}" if shares > 1 else ""
    with StoreWriter(output, settings, shard_bytes, part) as writer:
        stored = writer.rows
        for row in rows:
            try:
                digest = source_digest(row.path)
                if sample_key(digest, row.prompt) in order:
                    raise BadClip(row.path, "the same file with the same caption is listed before")
                done = finished_windows(stored, digest, row.prompt, size)
                if done:
                    report.kept += len(done)
                    order.update(dict.fromkeys(done))
                    cut_short, number = stored[done[-1]].get("cut_short"), len(done)
                else:
                    for window in cut(row.path, size):
                        key = sample_key(digest, row.prompt, window.number)
                        order[key] = None
                        cut_short, number = window.cut_short, window.number + 1
                        if key in stored:
                            report.kept += 1
                            continue
                        tensors = {
                            **visual_tensors(window.frames, codec, device, conditions),
                            "text": features[row.prompt],
                        }
                        writer.add(key, tensors, describe_sample(row, digest, window, size))
                        report.encoded += 1
                if cut_short:
                    report.cut_short.append((row, cut_short, number))
            except BadClip as error:  # and no OSError: a full disk is not the clip's fault
                report.rejected.append((row, str(error)))
            tick(report)
        if not order:
            why = report.rejected[0][1] if report.rejected else "this share has no rows"
            raise ValueError(f"0 usable clips of {len(rows)}; the first: {why}")
        writer.flush()
        if shares == 1:
            write_rejected(output / REJECTED, report)
            report.store = writer.finish(list(order), features[""])
    return report


def store_settings(
    codec: Codec, codec_name: str, text: Text, text_len: int, size: ClipSize, conditions: Conditions | None
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
    }


def visual_tensors(
    frames: Frames, codec: Codec, device: torch.device, conditions: Conditions | None = None
) -> dict[str, Tensor]:
    """Return what a sample stores of its frames, by name (`Sample` has the names)."""
    pixels = to_pixels(frames).to(device)
    extras = conditions.encode(pixels) if conditions else {}
    return {"latents": codec.encode(pixels)[0], **{name: value[0] for name, value in extras.items()}}


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
