"""Wan's own video autoencoders, through diffusers, in float32: 2.1 (16 channels) and 2.2 (48 channels).

Latents are the mean of the posterior, normalised once per channel: z = (mean - MEAN) / STD.

Memory: diffusers encodes 1 + 4 + 4 + ... frames and decodes latent frame by latent frame with the causal
convolutions' last inputs kept, which is the model itself and exact. Clips of a batch go one by one, so that a
clip's latents do not depend on its neighbours, unless it is told otherwise (in one call their last bits
differ). Tiles in space are not exact, because the middle of the model attends over the whole frame: they are
off unless asked for.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from torch import Tensor

from megawan.encoders.codec import check_latents, check_pixels
from megawan.encoders.fingerprint import fingerprint
from megawan.encoders.original import load_renamed, read_tensors, require_complete

# The published tables; a VAE whose config says otherwise gives other latents than every Wan was trained on.
MEAN = {
    "wan2.1": (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    "wan2.2": (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
}  # fmt: skip
STD = {
    "wan2.1": (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    "wan2.2": (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
}  # fmt: skip
STRIDE = {"wan2.1": (4, 8, 8), "wan2.2": (4, 16, 16)}
TILE_STEP = 64  # a tile's stride is 3/4 of it, and both must be whole latent positions


class WanVae:
    """A Wan VAE as a VideoCodec (see megawan/encoders/codec.py)."""

    def __init__(self, name: str, vae: Any, tile: int | None = None, together: bool = False) -> None:
        """`vae` is a diffusers AutoencoderKLWan; `tile` and `together` as for `open`.

        Raises ValueError unless its config is that of `name` and `tile` a multiple of 64.
        """
        if name not in STRIDE:
            raise ValueError(f"there is no VAE {name!r}; legal: {', '.join(STRIDE)}")
        if tile is not None and (tile < TILE_STEP or tile % TILE_STEP):
            raise ValueError(f"tiles of {tile} pixels cannot be encoded; legal: multiples of {TILE_STEP}")
        _check_config(name, vae.config)
        self.latent_channels = len(MEAN[name])
        self.stride = STRIDE[name]
        self._together = together
        self._vae = vae.float().eval().requires_grad_(False)
        self._mean = torch.tensor(MEAN[name], device=vae.device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(STD[name], device=vae.device).view(1, -1, 1, 1, 1)
        vae.enable_slicing()
        if tile is not None:
            vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        # Latents of tiles are other latents, so they get another name.
        self.fingerprint = fingerprint(name, vae.state_dict(), "" if tile is None else f"tile {tile}")

    @classmethod
    def open(
        cls,
        name: str,
        path: Path,
        device: torch.device | str = "cpu",
        tile: int | None = None,
        together: bool = False,
    ) -> "WanVae":
        """Return the VAE `name` from `path`: a diffusers folder or an original .pth or .safetensors.

        `tile` pixels on a side (for wan2.2 twice that when it encodes) cap the memory of large frames, at the
        price of latents that differ near the seams and, slightly, everywhere; None gives Wan's own.
        `together` encodes the clips of a batch in one call, for speed and at the price of the last bits.
        Nothing is fetched and no code in a .pth is run. Raises ValueError for anything else than that VAE.
        """
        if name not in STRIDE:
            raise ValueError(f"there is no VAE {name!r}; legal: {', '.join(STRIDE)}")
        if not path.exists():
            raise ValueError(f"{path} does not exist; {name} needs a diffusers folder or a VAE file")
        try:
            vae = _from_folder(path) if path.is_dir() else _from_file(name, path)
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"cannot open {path} as the VAE {name}: {' '.join(str(error).split())}"
            ) from error
        return cls(name, vae.to(device), tile, together)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return normalised latents float32 [B, C, 1 + (T-1)/4, H/h, W/w] of pixels."""
        check_pixels(pixels, self.stride)
        self._vae.use_slicing = not self._together
        mean = self._vae.encode(pixels.to(self._mean)).latent_dist.mode()
        self._vae.use_slicing = True
        latents: Tensor = (mean - self._mean) / self._std
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels float32 [B, 3, 1 + 4 (f-1), h H, w W] in [-1, 1] of normalised latents."""
        check_latents(latents, self.latent_channels)
        pixels: Tensor = self._vae.decode(latents.to(self._mean) * self._std + self._mean).sample
        return pixels.clamp(-1, 1)


def rename_key(name: str, key: str) -> str:
    """Return diffusers' name for the tensor `key` of an original file of the VAE `name`."""
    for pattern, replacement in (*_SHARED_NAMES, *_OWN_NAMES[name]):
        key = re.sub(pattern, replacement, key)
    if name == "wan2.1" and (found := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key)):
        # One flat list of four blocks a stage: three residual blocks and an upsampler.
        stage, block = divmod(int(found[1]), 4)
        part = "upsamplers.0" if block == 3 else f"resnets.{block}"
        key = f"decoder.up_blocks.{stage}.{part}.{found[2]}"
    return key


_SHARED_NAMES = (
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
)
_OWN_NAMES = {
    "wan2.1": ((r"^encoder\.downsamples\.", "encoder.down_blocks."),),
    "wan2.2": (
        (
            r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.",
            r"encoder.down_blocks.\1.downsampler.\2.",
        ),
        (
            r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.",
            r"decoder.up_blocks.\1.upsampler.\2.",
        ),
        (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    ),
}


def _from_folder(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ValueError("the folder has no config.json (give the vae/ folder of a diffusers model)")
    vae, report = AutoencoderKLWan.from_pretrained(
        path, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
    )
    require_complete(report["missing_keys"], report["unexpected_keys"])
    return vae


def _from_file(name: str, path: Path) -> Any:
    """Return the VAE of an original file, whose sizes are read off its tensors: it has no config."""
    tensors = {rename_key(name, key): value for key, value in read_tensors(path).items()}
    sizes = ("post_quant_conv.weight", "encoder.conv_in.weight", "decoder.norm_out.gamma")
    require_complete([key for key in sizes if key not in tensors], [])
    channels = len(tensors["post_quant_conv.weight"])
    if channels != len(MEAN[name]):
        raise ValueError(f"it holds a VAE of {channels} channels; {name} has {len(MEAN[name])}")
    config: dict[str, Any] = {
        "z_dim": channels,
        "base_dim": len(tensors["encoder.conv_in.weight"]),
        "decoder_base_dim": len(tensors["decoder.norm_out.gamma"]),
        "latents_mean": list(MEAN[name]),
        "latents_std": list(STD[name]),
        "scale_factor_temporal": STRIDE[name][0],
        "scale_factor_spatial": STRIDE[name][1],
    }
    if name == "wan2.2":
        config |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    with torch.device("meta"):
        vae = AutoencoderKLWan(**config)
    load_renamed(vae, tensors)
    return vae


def _check_config(name: str, config: Any) -> None:
    found = (config.z_dim, (config.scale_factor_temporal, *(2 * [config.scale_factor_spatial])))
    if found != (len(MEAN[name]), STRIDE[name]):
        other = [known for known in STRIDE if found == (len(MEAN[known]), STRIDE[known])]
        raise ValueError(
            f"these are not the weights of {name} ({len(MEAN[name])} channels, stride {STRIDE[name]}) but of "
            + (other[0] if other else f"a VAE of {found[0]} channels and stride {found[1]}")
        )
    for key, table in (("latents_mean", MEAN[name]), ("latents_std", STD[name])):
        if not torch.allclose(torch.tensor(config[key]), torch.tensor(table), rtol=0, atol=1e-4):
            raise ValueError(f"the VAE's {key} is not that of {name}: its latents would fit no Wan")
