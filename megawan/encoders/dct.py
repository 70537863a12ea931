"""A weightless demo codec with the shape of Wan's VAE: the lowest orthonormal DCT coefficients of each block.

Frame 0 alone gives latent frame 0 (DCT over 8x8 pixels); each later latent frame covers 4 frames (DCT over
4x8x8). Of a block's 192 or 768 coefficients 16 are kept. A picture decodes to a soft version of itself:
enough for moving flat shapes, their colour and their direction; it is no codec for real films.

Channels 3k, 3k+1, 3k+2 are red, green, blue of coefficient k, with (t, y, x) the frequency along each axis:

    k  later frames          latent frame 0 (it has no time axis)
    0  (0, 0, 0)  mean       mean
    1  (0, 0, 1)  left-right left-right
    2  (0, 1, 0)  up-down    up-down
    3  (1, 0, 0)  in time    (0, 2) - (2, 0): a stripe across against a stripe down
    4  (0, 1, 1)  diagonal   diagonal
    Channel 15 is grey (red + green + blue): (0, 0, 2) + (0, 2, 0), a round spot in the middle of the block.

All 16 are orthonormal functions, so decoding and encoding again is the identity on latents.
"""

import hashlib
import math

import torch
from einops import rearrange
from torch import Tensor

from megawan.encoders.codec import check_latents, check_pixels

STRIDE = (4, 8, 8)
CHANNELS = 16
# Amplitudes (coefficient / sqrt(pixels of a block), so that a flat block has its own value, however long it
# is) are stored as (amplitude - MEAN) / SCALE. One entry per coefficient above and one for grey; near the
# mean and the standard deviation over the clips of megawan/data/toy.py, which makes latents of unit scale
# there.
MEAN = (-0.75, 0.0, 0.0, 0.0, 0.0, 0.0)
SCALE = (0.22, 0.06, 0.06, 0.07, 0.025, 0.04)


class DctCodec:
    """The demo codec of 16 channels and stride 4x8x8; a VideoCodec (see megawan/encoders/codec.py)."""

    latent_channels = CHANNELS
    stride = STRIDE

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.fingerprint = (
            "dct-" + hashlib.blake2b(repr((STRIDE, MEAN, SCALE, 1)).encode(), digest_size=8).hexdigest()
        )
        self._first = block_basis(1).to(device)
        self._later = block_basis(STRIDE[0]).to(device)
        self._mean = _per_channel(MEAN).to(device)
        self._scale = _per_channel(SCALE).to(device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents float32 [B, 16, 1 + (T-1)/4, H/8, W/8] of pixels [B, 3, T, H, W]."""
        check_pixels(pixels, STRIDE)
        pixels = pixels.to(self._mean)
        first = self._analyse(pixels[:, :, :1], self._first)
        later = self._analyse(pixels[:, :, 1:], self._later)
        return rearrange(
            (torch.cat([first, later], dim=1) - self._mean) / self._scale, "b t h w c -> b c t h w"
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels float32 [B, 3, 1 + 4 (f-1), 8h, 8w], in [-1, 1] of latents [B, 16, f, h, w]."""
        check_latents(latents, CHANNELS)
        amplitudes = rearrange(latents.to(self._mean), "b c t h w -> b t h w c") * self._scale + self._mean
        first = self._synthesise(amplitudes[:, :1], self._first)
        later = self._synthesise(amplitudes[:, 1:], self._later)
        return torch.cat([first, later], dim=2).clamp(-1, 1)

    def _analyse(self, pixels: Tensor, basis: Tensor) -> Tensor:
        t, h, w = basis.shape[2:]
        blocks = rearrange(pixels, "b c (f t) (y h) (x w) -> b f y x (c t h w)", t=t, h=h, w=w)
        return blocks @ basis.flatten(1).T / math.sqrt(t * h * w)

    def _synthesise(self, amplitudes: Tensor, basis: Tensor) -> Tensor:
        t, h, w = basis.shape[2:]
        blocks = amplitudes * math.sqrt(t * h * w) @ basis.flatten(1)
        return rearrange(blocks, "b f y x (c t h w) -> b c (f t) (y h) (x w)", t=t, h=h, w=w)


def block_basis(frames: int) -> Tensor:
    """Return the 16 kept functions of a block, float32 [16, 3, frames, 8, 8], orthonormal rows.

    `frames` is 1 for latent frame 0 and 4 for the others; the table is this module's docstring.
    """
    time, y, x = _dct(frames), _dct(STRIDE[1]), _dct(STRIDE[2])

    def wave(kt: int, ky: int, kx: int) -> Tensor:
        return torch.einsum("t,h,w->thw", time[kt], y[ky], x[kx])

    across, down = wave(0, 0, 2), wave(0, 2, 0)
    fourth = (across - down) / math.sqrt(2) if frames == 1 else wave(1, 0, 0)
    waves = torch.stack([wave(0, 0, 0), wave(0, 0, 1), wave(0, 1, 0), fourth, wave(0, 1, 1)])
    colours = torch.eye(3, dtype=torch.float64)
    per_colour = torch.einsum("kthw,gc->kgcthw", waves, colours).flatten(0, 1)
    grey = torch.ones(3, dtype=torch.float64) / math.sqrt(3)
    spot = torch.einsum("thw,c->cthw", (across + down) / math.sqrt(2), grey)
    return torch.cat([per_colour, spot[None]]).float()


def _dct(size: int) -> Tensor:
    """Return the orthonormal DCT-II, float64 [size frequencies, size places]."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (place + 0.5) * place[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _per_channel(rows: tuple[float, ...]) -> Tensor:
    """Return the table float32 [16]: every coefficient's value for its three colours, then grey's."""
    return torch.tensor([value for value in rows[:-1] for _ in range(3)] + [rows[-1]])
