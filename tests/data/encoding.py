"""Helpers of the encoding tests: real media files, a text encoder of a few lines, and one call that
encodes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megawan.data.cutting import ClipSize
from megawan.data.encoding import Codec, Report, encode
from megawan.data.manifest import Manifest, Row
from megawan.data.video import Frames
from megawan.encoders.dct import DctCodec

DIM = 64


class Words:
    """A text encoder: one row for every word, drawn from its letters."""

    dim = DIM
    fingerprint = "words"

    def encode(self, texts: Sequence[str], max_length: int) -> list[Tensor]:
        """Return the rows of each text."""
        return [torch.stack([self._row(word) for word in ["", *text.split()][:max_length]]) for text in texts]

    def _row(self, word: str) -> Tensor:
        digest = np.frombuffer(hashlib.blake2b(word.encode(), digest_size=DIM).digest(), np.uint8)
        return torch.from_numpy(digest / 255.0).float()


def ramp(frames: int, height: int = 48, width: int = 64) -> Frames:
    """Flat grey frames whose brightness tells their number: 10, 14, 18, …"""
    level = 10 + 4 * np.arange(frames)
    return np.broadcast_to(level[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(frames: Frames) -> list[int]:
    """Return the number that each frame of a ramp tells."""
    return [round((float(frame.mean()) - 10) / 4) for frame in frames]


def write(path: Path, frames: Frames, rate: int = 16, codec: str = "ffv1", pix_fmt: str = "yuv444p") -> Path:
    """Write frames as a video; ffv1 in mkv is lossless and cuts well."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_image(path: Path, frames: Frames, duration: int = 60) -> Path:
    """Write a picture, or an animation of several."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    if others:
        first.save(path, save_all=True, append_images=others, duration=duration, loop=0, lossless=True)
    else:
        first.save(path)
    return path


def listed(folder: Path, *names: str) -> Manifest:
    """Return a manifest of files in `folder`, each with a caption of its own."""
    rows = [Row(folder / name, f"caption of {name}", number) for number, name in enumerate(names, 1)]
    return Manifest(folder, tuple(rows), "test")


def run(
    manifest: Manifest,
    output: Path,
    size: ClipSize,
    *,
    share: tuple[int, int] = (0, 1),
    shard_bytes: int = 60_000,
    batch: int = 1,
    workers: int = 0,
    codec: Codec | None = None,
) -> Report:
    """Encode on the CPU, with the demo codec unless another is given."""
    return encode(
        manifest,
        output,
        codec or DctCodec("cpu"),
        "dct",
        Words(),
        size,
        32,
        device=torch.device("cpu"),
        share=share,
        shard_bytes=shard_bytes,
        batch=batch,
        workers=workers,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def noise(frames: int) -> Frames:
    """Frames of which no two are alike."""
    return np.random.default_rng(0).integers(0, 256, (frames, 48, 64, 3), dtype=np.uint8)


def make_media(folder: Path) -> Path:
    """Write files of every length, shape and kind, and damaged ones."""
    write(folder / "long.mkv", ramp(23))
    write(folder / "exact.mkv", ramp(13, 64, 48))
    write(folder / "short.mkv", ramp(6))
    write(folder / "shorter.mkv", ramp(4))
    write(folder / "fast.mkv", ramp(40), rate=32)
    write(folder / "small.mkv", ramp(20, 32, 36))
    write(folder / "tiny.mkv", ramp(20, 8, 36))
    write_image(folder / "still.png", ramp(1, 40, 60))
    write_image(folder / "still.jpg", ramp(1, 90, 60))
    write_image(folder / "still.webp", ramp(1, 40, 60))
    write_image(folder / "still.gif", ramp(1, 40, 60))
    write_image(folder / "moving.webp", ramp(6, 40, 60), duration=125)
    write_image(folder / "moving.png", ramp(6, 40, 60), duration=125)
    write_image(folder / "moving.gif", ramp(6, 40, 60), duration=120)
    whole = write(folder / "whole.mkv", np.repeat(ramp(23), 2, axis=2)).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.75)])
    avi = write(folder / "whole.avi", noise(24), codec="mpeg4", pix_fmt="yuv420p").read_bytes()
    for name, share in (("zeroed.avi", 0.8), ("early.avi", 0.65)):  # damaged at frame 15 and 8
        middle = int(len(avi) * share)
        (folder / name).write_bytes(avi[:middle] + bytes(400) + avi[middle + 400 :])
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    return folder
