"""What every video codec here can do, and what it is given."""

from typing import Protocol

from torch import Tensor


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
