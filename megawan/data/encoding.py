"""A manifest's clips through the encoders into a latent store; what is finished is never done again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megawan.data.latents import SHARD_BYTES, LatentStore, StoreWriter
from megawan.data.manifest import Manifest, Row
from megawan.data.video import BadClip, read_clip
from megawan.files import sha256

REJECTED = "rejected.jsonl"


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


@dataclass(frozen=True)
class ClipSize:
    """What every clip is cut and scaled to."""

    num_frames: int
    height: int
    width: int
    fps: float | None
    """Frames a second after resampling; None keeps the file's frames."""


@dataclass(frozen=True)
class Report:
    """What an encode came to."""

    store: LatentStore | None
    """The finished store; None after one of several shares."""
    encoded: int
    kept: int
    rejected: list[tuple[Row, str]]


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
    share: tuple[int, int] = (0, 1),
    shard_bytes: int = SHARD_BYTES,
    tick: Callable[[], None] = lambda: None,
) -> Report:
    """Encode every clip of `manifest` into the store `output` and return what was done; `tick` counts clips.

    share (i, n) with n > 1 takes every n-th row from row i and writes no index: several tasks fill one store,
    and a last call without a share finds all finished, and writes the index without copying anything.

    A clip that cannot be used is listed in OUTPUT/rejected.jsonl with the reason. Clips that a shard of an
    earlier, interrupted call holds are kept. Raises ValueError when no clip can be used, when the folder
    holds a store of other settings, or when the size does not fit the codec.
    """
    settings = {
        "codec": codec_name,
        "codec_fingerprint": codec.fingerprint,
        "latent_channels": codec.latent_channels,
        "stride": list(codec.stride),
        "text_fingerprint": text.fingerprint,
        "text_dim": text.dim,
        "text_len": text_len,
        "num_frames": size.num_frames,
        "height": size.height,
        "width": size.width,
        "fps": size.fps,
    }
    rejected: list[tuple[Row, str]] = []
    order: dict[str, None] = {}  # keys of the usable clips, in the manifest's order
    encoded = 0
    features: dict[str, Tensor] = {}
    mine, shares = share
    rows = manifest.rows[mine::shares]
    part = f"{mine}of{shares}" if shares > 1 else ""
    with StoreWriter(output, settings, shard_bytes, part) as writer:
        kept = writer.finished
        for row in rows:
            try:
                digest = sha256(row.path)
                key = sample_key(digest, row.prompt)
                if key in order:
                    raise BadClip(row.path, "the same file with the same caption is listed before")
                if key not in kept:
                    frames = read_clip(row.path, size.num_frames, size.height, size.width, size.fps)
                    latents = codec.encode(to_pixels(frames).to(device))[0]
                    if row.prompt not in features:
                        (features[row.prompt],) = text.encode([row.prompt], text_len)
                    source = {"prompt": row.prompt, "source": row.path.name, "source_sha256": digest}
                    writer.add(key, {"latents": latents, "text": features[row.prompt]}, source)
                    encoded += 1
                order[key] = None
            except (BadClip, OSError) as error:
                rejected.append((row, str(error)))
            tick()
        if not order:
            why = rejected[0][1] if rejected else "this share has no rows"
            raise ValueError(f"0 usable clips of {len(rows)}; the first: {why}")
        store = None
        if shares > 1:
            writer.flush()
        else:
            (empty,) = text.encode([""], text_len)
            store = writer.finish(list(order), empty)
            _write_rejected(output / REJECTED, rejected)
    return Report(store, encoded, len(order) - encoded, rejected)


def sample_key(source_sha256: str, prompt: str) -> str:
    """Return the name of a sample in its store: a digest of the file's bytes and the caption."""
    return hashlib.blake2b(f"{source_sha256}\n{prompt}".encode(), digest_size=12).hexdigest()


def to_pixels(frames: Any) -> Tensor:
    """Return pixels float32 [1, 3, T, H, W] in [-1, 1] of frames uint8 [T, H, W, 3]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


def _write_rejected(file: Path, rejected: Sequence[tuple[Row, str]]) -> None:
    file.unlink(missing_ok=True)
    if rejected:
        lines = [
            json.dumps({"row": row.number, "file": str(row.path), "reason": reason})
            for row, reason in rejected
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
