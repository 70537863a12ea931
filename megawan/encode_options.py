"""How clips become samples: the flags that tools/encode_dataset.py and training (--encode.*) share, and the
encoders that they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megawan.conditions import ImageConditions, open_conditions
from megawan.data.cutting import CODEC_STRIDES, ClipSize, CutOptions, clip_size
from megawan.data.encoding import store_settings
from megawan.encoders.codec import VideoCodec
from megawan.models.variants import get_variant

if TYPE_CHECKING:  # imports transformers, seconds that --help does not need
    from megawan.encoders.text import TextEncoder

WAN_TEXT_LEN = 512


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(CutOptions):
    """Which encoders, and which size of clips."""

    root: Path | None = None
    """Folder that relative paths start at; default: the manifest's own."""
    allow_outside_root: bool = False
    """Let the manifest name files outside that folder."""
    codec: Literal["dct", "wan2.1", "wan2.2"] = "wan2.1"
    """Video encoder: Wan's VAEs (2.2 for ti2v-5B), or dct, the weightless demo codec."""
    vae: Path | None = None
    """Weights of the VAE: Wan2.1_VAE.pth, Wan2.2_VAE.pth or a diffusers folder; not for dct."""
    vae_tile: int | None = None
    """Encode in tiles of so many pixels (64n) where memory is short; the latents differ; default none."""
    image_encoder: str | None = None
    """For Wan2.1's i2v and flf2v: its CLIP file, an image_encoder folder, or debug for a seeded tiny one."""
    text_encoder: str = "debug"
    """Folder or file of the UMT5 encoder, or debug for the seeded tiny one of the debug variants."""
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the UMT5 encoder; bfloat16 is what Wan's authors use. The debug one is float32."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; default: in, beside or under google/umt5-xxl with the encoder."""
    text_len: int | None = None
    """Longest caption in tokens; default 512, and 32 for the debug encoder."""
    shard_mib: int = 1024
    """Size of the store's files in MiB; a kill loses at most the one that was being filled."""
    device: str | None = None
    """Where the encoders run: cpu, cuda, cuda:1. Default: the GPU where there is one; the CPU beside a
    training, which needs the GPUs for itself."""


@dataclass(frozen=True)
class Encoders:
    """What the flags name, opened."""

    codec: VideoCodec
    codec_name: str
    text: "TextEncoder"
    text_len: int
    conditions: "ImageConditions | None"
    device: torch.device

    def settings(self, size: ClipSize) -> dict[str, Any]:
        """Return the settings of a store that these make."""
        return store_settings(self.codec, self.codec_name, self.text, self.text_len, size, self.conditions)


def checked_size(options: EncodeOptions, variant: str | None) -> ClipSize:
    """Return the size that clips are cut to, for a model that may need more than one frame. Raises ValueError
    naming the flag, also for shard_mib."""
    # A model that is given the first and the last frame cannot learn from one.
    still_images = variant is None or get_variant(variant).task != "flf2v"
    size = clip_size(options, CODEC_STRIDES[options.codec], still_images=still_images)
    if options.shard_mib < 1:
        raise ValueError(f"--shard_mib {options.shard_mib} must be 1 or more")
    return size


def open_encoders(
    options: EncodeOptions, variant: str | None, default_device: str, together: bool = False
) -> Encoders:
    """Return the encoders, with the image conditions of `variant`; `together`: samples are encoded in
    batches. Raises ValueError naming flag and cause."""
    from megawan.encoders.opening import open_codec

    device = open_device(options.device or default_device)
    codec = open_codec(options.codec, options.vae, device, options.vae_tile, together)
    conditions = open_image(options, variant, codec, device)
    text, text_len = open_text(options, device)
    return Encoders(codec, options.codec, text, text_len, conditions, device)


def open_device(name: str) -> torch.device:
    """Return the device `name`. Raises ValueError unless it is the CPU or a GPU that is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs")
    return device


def open_image(
    options: EncodeOptions, variant_name: str | None, codec: VideoCodec, device: torch.device
) -> ImageConditions | None:
    """Return what makes the image conditions of a variant, None where it has none."""
    if variant_name is None:
        if options.image_encoder is not None:
            raise ValueError("--image_encoder is for image-to-video models: name one with --variant")
        return None
    return open_conditions(get_variant(variant_name), codec, options.image_encoder, device)


def open_text(options: EncodeOptions, device: torch.device) -> "tuple[TextEncoder, int]":
    """Return the text encoder and its longest caption in tokens."""
    from megawan.encoders.text import TextEncoder

    if options.text_encoder == "debug":
        wan = get_variant("debug").config
        text, default = TextEncoder.debug(dim=wan.text_dim), wan.text_len
    else:
        dtype = getattr(torch, options.text_dtype)
        text = TextEncoder.open(Path(options.text_encoder), options.tokenizer, device, dtype)
        default = WAN_TEXT_LEN
    length = options.text_len or default
    if length < 1:
        raise ValueError(f"--text_len {length} must be 1 or more")
    return text, length
