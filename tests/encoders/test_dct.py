"""The demo codec: orthonormal, the identity on latents, causal, and steady for a still picture."""

from pathlib import Path

import pytest
import torch

from megawan.encoders.dct import DctCodec, block_basis
from megawan.encoders.opening import open_codec
from megawan.rng import generator_at


@pytest.mark.parametrize("frames", [1, 4])
def test_the_kept_functions_are_orthonormal(frames: int) -> None:
    basis = block_basis(frames).double().flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decoding_and_encoding_again_is_the_identity(frames: int) -> None:
    # Small latents stay away from the clamp at -1.
    latents = 0.1 * torch.randn(2, 16, frames, 3, 5, generator=generator_at(0, "latents"))
    codec = DctCodec()
    pixels = codec.decode(latents)
    assert pixels.shape == (2, 3, 1 + 4 * (frames - 1), 24, 40)
    assert pixels.min() > -1
    torch.testing.assert_close(codec.encode(pixels), latents, atol=1e-5, rtol=0)


def test_decoded_pixels_are_clamped() -> None:
    pixels = DctCodec().decode(20 * torch.randn(1, 16, 2, 1, 1, generator=generator_at(0, "loud")))
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_latents_depend_on_no_later_frame() -> None:
    codec = DctCodec()
    pixels = torch.rand(1, 3, 13, 16, 16, generator=generator_at(0, "pixels")) * 2 - 1
    whole = codec.encode(pixels)
    for frames, latent_frames in ((1, 1), (5, 2), (9, 3)):
        torch.testing.assert_close(codec.encode(pixels[:, :, :frames]), whole[:, :, :latent_frames])
    changed = pixels.clone()
    changed[:, :, 5] *= -1
    assert torch.equal(codec.encode(changed)[:, :, :2], whole[:, :, :2])
    assert not torch.equal(codec.encode(changed)[:, :, 2], whole[:, :, 2])


def test_a_still_picture_has_the_same_mean_and_no_motion_in_every_latent_frame() -> None:
    picture = torch.rand(1, 3, 1, 16, 24, generator=generator_at(0, "picture")) * 2 - 1
    latents = DctCodec().encode(picture.expand(-1, -1, 9, -1, -1))
    still = [channel for channel in range(16) if channel not in (9, 10, 11)]
    for frame in (1, 2):
        torch.testing.assert_close(latents[:, still, frame], latents[:, still, 0], atol=1e-5, rtol=0)
        assert latents[:, 9:12, frame].abs().max() < 1e-5


def test_a_flat_block_comes_back_exactly() -> None:
    codec = DctCodec()
    flat = torch.tensor([0.9, -0.9, 0.1]).view(1, 3, 1, 1, 1).expand(1, 3, 5, 8, 16)
    torch.testing.assert_close(codec.decode(codec.encode(flat)), flat, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 4, 8, 8), "4 frames"),
        ((1, 3, 0, 8, 8), "0 frames"),
        ((1, 3, 1, 12, 8), "8x12"),
        ((1, 3, 1, 8, 0), "0x8"),
        ((1, 4, 1, 8, 8), r"\[1, 4, 1, 8, 8\]"),
        ((3, 1, 8, 8), r"\[3, 1, 8, 8\]"),
    ],
)
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DctCodec().encode(torch.zeros(shape))


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="16"):
        DctCodec().decode(torch.zeros(1, 48, 1, 1, 1))


def test_codecs_are_opened_by_name() -> None:
    codec = open_codec("dct", None, "cpu")
    assert (codec.latent_channels, codec.stride) == (16, (4, 8, 8))
    assert codec.fingerprint == DctCodec().fingerprint
    with pytest.raises(ValueError, match=r"wan2\.7.*legal: dct, wan2\.1, wan2\.2"):
        open_codec("wan2.7", None, "cpu")
    with pytest.raises(ValueError, match="no path"):
        open_codec("dct", Path("vae"), "cpu")
    with pytest.raises(ValueError, match="no tiles; given: 64"):
        open_codec("dct", None, "cpu", 64)
    with pytest.raises(ValueError, match=r"wan2\.1 needs the path"):
        open_codec("wan2.1", None, "cpu")
