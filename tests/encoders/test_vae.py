"""Wan's VAEs at tiny widths and random weights: shapes, normalisation, every way of opening, and refusals."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from megawan.encoders.opening import open_codec
from megawan.encoders.vae import MEAN, STD, STRIDE, WanVae
from megawan.rng import generator_at

NAMES = ("wan2.1", "wan2.2")


def tiny(name: str) -> Any:
    config: dict[str, Any] = {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": len(MEAN[name]),
        "latents_mean": list(MEAN[name]),
        "latents_std": list(STD[name]),
        "scale_factor_spatial": STRIDE[name][1],
    }
    if name == "wan2.2":
        config |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    vae = AutoencoderKLWan(**config)
    with torch.no_grad():
        for key, parameter in vae.named_parameters():
            parameter.normal_(std=0.1, generator=generator_at(0, name, key))
    return vae.eval()


def native_key(name: str, key: str) -> str:
    """The original file's name of a diffusers key, the other way round than the package's table."""
    for part, number in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
        key = re.sub(rf"(resnets\.\d|down_blocks\.\d+)\.{part}\.", rf"\1.residual.{number}.", key)
    key = key.replace("conv_shortcut", "shortcut").replace("mid_block.attentions.0", "middle.1")
    key = key.replace("mid_block.resnets.0", "middle.0").replace("mid_block.resnets.1", "middle.2")
    key = key.replace("norm_out", "head.0").replace("conv_out", "head.2").replace("conv_in", "conv1")
    key = key.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    if name == "wan2.1":
        key = key.replace("down_blocks", "downsamples")
        up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", key)
        if up:
            block = 4 * int(up[1]) + (3 if up[2] == "upsamplers" else int(up[3]))
            key = f"decoder.upsamples.{block}.{up[4]}"
        return key
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"downsamples.\1.downsamples.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", r"upsamples.\1.upsamples.\2", key)
    return re.sub(r"up_blocks\.(\d)\.upsampler\.", r"upsamples.\1.upsamples.3.", key)


def native(name: str) -> dict[str, Tensor]:
    return {native_key(name, key): tensor.clone() for key, tensor in tiny(name).state_dict().items()}


def clip(name: str) -> Tensor:
    _, h, w = STRIDE[name]
    return torch.rand(2, 3, 5, 2 * h, 3 * w, generator=generator_at(0, "clip")) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_the_posterior_mean_normalised_once(name: str) -> None:
    vae = tiny(name)
    codec = WanVae(name, vae)
    channels = len(MEAN[name])
    assert (codec.latent_channels, codec.stride) == (channels, STRIDE[name])
    latents = codec.encode(clip(name))
    assert latents.shape == (2, channels, 2, 2, 3)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        mean = vae.encode(clip(name)).latent_dist.mean
    for channel in (0, 7, channels - 1):
        expected = (mean[:, channel] - MEAN[name][channel]) / STD[name][channel]
        torch.testing.assert_close(latents[:, channel], expected, atol=1e-6, rtol=1e-5)
    pixels = codec.decode(latents)
    assert pixels.shape == clip(name).shape
    assert pixels.abs().max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(pixels, vae.decode(mean).sample.clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_frame_alone_gives_the_first_latent_frame(name: str) -> None:
    codec = WanVae(name, tiny(name))
    whole = codec.encode(clip(name))
    torch.testing.assert_close(codec.encode(clip(name)[:, :, :1]), whole[:, :, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_clips_latents_do_not_depend_on_its_neighbours_in_the_batch(name: str) -> None:
    codec, both = WanVae(name, tiny(name)), clip(name)
    latents = codec.encode(both)
    pixels = codec.decode(latents)
    for place in range(2):
        assert torch.equal(latents[place], codec.encode(both[place : place + 1])[0])
        assert torch.equal(pixels[place], codec.decode(latents[place : place + 1])[0])


@pytest.mark.parametrize("name", NAMES)
def test_clips_encoded_together_differ_in_their_last_bits_and_not_by_their_neighbours(name: str) -> None:
    both = torch.cat([clip(name), clip(name).flip(-1)])
    together = WanVae(name, tiny(name), together=True)
    latents = together.encode(both)
    assert (latents - WanVae(name, tiny(name)).encode(both)).abs().max() < 1e-5
    assert torch.equal(together.encode(torch.cat([both[:1], torch.zeros_like(both[1:])]))[0], latents[0])


@pytest.mark.parametrize("name", NAMES)
def test_encoding_in_time_chunks_is_causal_and_exact(name: str) -> None:
    _, h, w = STRIDE[name]
    codec = WanVae(name, tiny(name))
    pixels = torch.rand(1, 3, 13, 2 * h, 2 * w, generator=generator_at(0, "long")) * 2 - 1
    whole = codec.encode(pixels)
    for frames in (1, 5, 9):
        short = codec.encode(pixels[:, :, :frames])
        torch.testing.assert_close(short, whole[:, :, : short.shape[2]], atol=1e-6, rtol=0)
    later = pixels.clone()
    later[:, :, 9:] = 0
    changed = codec.encode(later)
    assert torch.equal(changed[:, :, :3], whole[:, :, :3])
    assert not torch.equal(changed[:, :, 3], whole[:, :, 3])


@pytest.mark.parametrize(("name", "side"), [("wan2.1", 96), ("wan2.2", 192)])
def test_tiles_are_off_by_default_and_change_latents_within_a_bound(name: str, side: int) -> None:
    pixels = torch.rand(1, 3, 5, side, side, generator=generator_at(0, "large")) * 2 - 1
    exact = WanVae(name, tiny(name))
    tiled = WanVae(name, tiny(name), tile=64)
    roomy = WanVae(name, tiny(name), tile=192)
    expected = exact.encode(pixels)
    assert torch.equal(roomy.encode(pixels), expected)  # one tile is the whole
    difference = tiled.encode(pixels) - expected
    assert tiled.encode(pixels).shape == expected.shape
    assert 1e-3 < float(difference.pow(2).mean().sqrt() / expected.std()) < 0.2
    assert len({exact.fingerprint, tiled.fingerprint, roomy.fingerprint}) == 3
    assert exact.fingerprint == WanVae(name, tiny(name)).fingerprint
    for tile in (0, 32, 100):
        with pytest.raises(ValueError, match=f"tiles of {tile} pixels.*multiples of 64"):
            WanVae(name, tiny(name), tile=tile)


def test_the_tables_are_the_published_ones() -> None:
    # diffusers' own defaults are those of 2.1.
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert MEAN["wan2.1"] == tuple(defaults["latents_mean"].default)
    assert STD["wan2.1"] == tuple(defaults["latents_std"].default)
    # Of 2.2's tables the sum and the sum weighted by place, from the published lists.
    for table, plain, weighted in ((MEAN["wan2.2"], -0.5589, -7.0659), (STD["wan2.2"], 32.536, 758.3531)):
        assert len(table) == 48
        assert sum(table) == pytest.approx(plain, abs=1e-6)
        assert sum(place * value for place, value in enumerate(table)) == pytest.approx(weighted, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_folders_and_original_files_open_to_the_same_vae(tmp_path: Path, name: str) -> None:
    vae = tiny(name)
    expected = WanVae(name, vae)
    vae.save_pretrained(tmp_path / "vae")
    tensors = native(name)
    assert not set(tensors) & set(vae.state_dict())  # every tensor is renamed
    save_file(tensors, tmp_path / "vae.safetensors")
    torch.save(tensors, tmp_path / "vae.pth")
    torch.save({"model_state": {f"model.{key}": t for key, t in tensors.items()}}, tmp_path / "wrapped.pth")
    for path in ("vae", "vae.safetensors", "vae.pth", "wrapped.pth"):
        codec = open_codec(name, tmp_path / path, "cpu")
        assert codec.fingerprint == expected.fingerprint, path
        assert torch.equal(codec.encode(clip(name)), expected.encode(clip(name))), path


def test_the_published_key_lists_are_renamed_to_those_of_diffusers() -> None:
    # Facts of the released files: 194 and 196 tensors, and these names.
    assert len(native("wan2.1")) == 194
    assert len(native("wan2.2")) == 196
    assert {"decoder.upsamples.4.shortcut.weight", "encoder.downsamples.5.time_conv.weight"} <= set(
        native("wan2.1")
    )
    assert "decoder.upsamples.2.upsamples.3.resample.1.weight" in native("wan2.2")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    tiny("wan2.1").save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"not the weights of wan2\.2.*but of wan2\.1"):
        WanVae.open("wan2.2", tmp_path / "vae")
    save_file(native("wan2.2"), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="48 channels; wan2.1 has 16"):
        WanVae.open("wan2.1", tmp_path / "vae.safetensors")
    tensors = native("wan2.1")
    del tensors["encoder.middle.1.proj.bias"]
    save_file(tensors, tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first encoder\.mid_block\.attentions\.0\.proj"):
        WanVae.open("wan2.1", tmp_path / "partial.safetensors")
    odd = tiny("wan2.1")
    odd.register_to_config(latents_mean=[0.0] * 16)
    with pytest.raises(ValueError, match="latents_mean"):
        WanVae("wan2.1", odd)


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    vae = tiny("wan2.1")
    vae.save_pretrained(tmp_path / "vae")
    tensors = vae.state_dict()
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias"):
        WanVae.open("wan2.1", tmp_path / "vae")


@pytest.mark.parametrize("file", ["vae.pth", "vae.safetensors", "vae.bin"])
def test_files_that_are_no_weights_get_one_line(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"these are no weights")
    with pytest.raises(ValueError, match="cannot open") as caught:
        open_codec("wan2.1", tmp_path / file, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not exist"):
        open_codec("wan2.1", tmp_path / "nowhere", "cpu")
    with pytest.raises(ValueError, match="no config.json"):
        open_codec("wan2.1", tmp_path, "cpu")
