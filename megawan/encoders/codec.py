"""What every video codec here can do, and how one is opened by name."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

CODECS = ("dct", "wan2.1", "wan2.2")


class VideoCodec(Protocol):
    """Turns pixels into latents and back, causally in time: 1 + 4n frames give 1 + n latent frames."""

    @property
    def latent_channels(self) -> int:
        """Number C of latent channels."""
        ...

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that one latent position covers, (t, h, w)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that is equal for two codecs exactly when their latents may be mixed."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents float32 [B, C, 1 + (T-1)/t, H/h, W/w] of pixels float32 [B, 3, T, H, W] in [-1, 1].

        Raises ValueError when T is not 1 + a multiple of t or H, W are not multiples of h, w.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels float32 [B, 3, T, H, W], clamped to [-1, 1], of latents [B, C, f, H/h, W/w]."""
        ...


def open_codec(name: str, path: Path | None, device: torch.device | str) -> VideoCodec:
    """Return the codec `name` ("dct", "wan2.1" or "wan2.2") on `device`.

    `path` is the VAE's weights (a diffusers folder or an original file); the weightless "dct" takes None.
    Raises ValueError for an unknown name, a missing or needless path, or weights of another VAE.
    """
    if name == "dct":
        from megawan.encoders.dct import DctCodec

        if path is not None:
            raise ValueError(f"the codec dct has no weights, so it takes no path; given: {path}")
        return DctCodec(device)
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}; legal: {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"the codec {name} needs the path of its weights: a diffusers folder or a VAE file")
    from megawan.encoders.vae import WanVae  # diffusers takes seconds to import, and dct does without

    return WanVae.open(name, path, device)


def check_pixels(pixels: Tensor, stride: tuple[int, int, int]) -> None:
    """Raise ValueError unless `pixels` is [B, 3, T, H, W] and a codec of this stride can encode it."""
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be [B, 3, T, H, W]; given: {list(pixels.shape)}")
    frames, height, width = pixels.shape[2:]
    t, h, w = stride
    if frames < 1 or (frames - 1) % t:
        raise ValueError(f"{frames} frames cannot be encoded; legal: 1 + a multiple of {t}")
    if not height or not width or height % h or width % w:
        raise ValueError(f"{width}x{height} pixels cannot be encoded; legal: multiples of {w}x{h}")


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise ValueError unless `latents` is [B, channels, f, h, w] with at least one frame."""
    if latents.ndim != 5 or latents.shape[1] != channels or not latents.shape[2]:
        raise ValueError(f"latents must be [B, {channels}, f, h, w]; given: {list(latents.shape)}")
