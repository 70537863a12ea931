"""What an image-to-video Wan is told of a clip besides its caption, made by the encoders once per clip.

The formulas are megawan/flow/conditioning.py's; this module feeds them with encoded pixels:

    i2v (2.1, A14B)       condition: the first frame, then grey
    flf2v, Fun-InP        condition: the first frame, grey, the last frame
    2.1 and Fun-InP       clip: CLIP's rows of the first frame; of first and last for flf2v
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megawan.encoders.codec import VideoCodec
from megawan.flow.conditioning import image_clip, image_condition
from megawan.models.variants import CLIP_DIM, CLIP_TOKENS, VARIANTS, Variant

if TYPE_CHECKING:  # imports transformers, seconds that --help does not need
    from megawan.encoders.image import ImageEncoder

DEBUG = "debug"
UNCONDITIONED = ("t2v", "ti2v")  # ti2v keeps the clip's own first latent frame: nothing to store
IMAGE_TASKS = ("i2v", "flf2v")


@dataclass(frozen=True)
class ImageConditions:
    """The conditions of one kind of image-to-video model; `images` is None where it has no CLIP branch."""

    codec: VideoCodec
    last: bool
    """Whether the last frame is given too."""
    images: "ImageEncoder | None" = None
    clip_of_last: bool = False
    """Whether CLIP's rows of the last frame follow those of the first."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a latent store says of its conditions: stores that differ in it are not mixed."""
        rows = 0 if self.images is None else self.images.tokens * (2 if self.clip_of_last else 1)
        return {
            "condition": "flf2v" if self.last else "i2v",
            "clip_tokens": rows,
            "image_encoder_fingerprint": self.images.fingerprint if self.images else None,
        }

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return "condition" [B, 4 + C, t, h, w] and, with an image encoder, "clip" [B, 257 or 514, 1280].

        pixels float32 [B, 3, T, H, W] in [-1, 1]: the whole clips, of which only first and last frame are
        looked at. Raises ValueError when `last` is wanted of one frame or the codec cannot encode them.
        """
        first, last = pixels[:, :, 0], pixels[:, :, -1] if self.last else None
        image_latent = self.codec.encode(image_clip(first, pixels.shape[2], last))
        found = {"condition": image_condition(image_latent, last=self.last)}
        if self.images is not None:
            shown = [first, pixels[:, :, -1]] if self.clip_of_last else [first]
            found["clip"] = torch.cat([self.images.encode(image) for image in shown], dim=1)
        return found


def open_conditions(
    variant: Variant, codec: VideoCodec, image_encoder: str | None, device: torch.device | str
) -> ImageConditions | None:
    """Return what `variant` needs besides latents and text; None for a text-to-video model and for ti2v.

    image_encoder is a path, or "debug" for a seeded one of random weights. Raises ValueError when the codec
    is not the variant's, when an image encoder is missing, needless or not Wan's, and for control and VACE.
    """
    if (codec.latent_channels, tuple(codec.stride)) != (variant.latent_channels, variant.vae_stride):
        raise ValueError(
            f"{variant.name} takes latents of {variant.latent_channels} channels and stride"
            f" {variant.vae_stride}, the codec gives {codec.latent_channels} and {tuple(codec.stride)};"
            f" give --codec wan{variant.vae}"
        )
    if variant.task not in (*UNCONDITIONED, *IMAGE_TASKS):
        legal = [name for name, other in VARIANTS.items() if other.task in (*UNCONDITIONED, *IMAGE_TASKS)]
        raise ValueError(
            f"the {variant.task} conditions of {variant.name} cannot be encoded here;"
            f" legal: {', '.join(legal)}"
        )
    if not variant.config.has_clip and image_encoder is not None:
        raise ValueError(f"{variant.name} has no CLIP branch, so it takes no image encoder")
    if variant.task in UNCONDITIONED:
        return None
    if not variant.config.has_clip:
        return ImageConditions(codec, variant.task == "flf2v")
    images = open_clip(variant, image_encoder, device)
    both = variant.config.clip_tokens == 2 * CLIP_TOKENS
    return ImageConditions(codec, variant.task == "flf2v", images, both)


def open_clip(variant: Variant, image_encoder: str | None, device: torch.device | str) -> "ImageEncoder":
    """Return the CLIP tower that a variant reads. Raises ValueError when none is given, or another's."""
    if image_encoder is None:
        raise ValueError(
            f"{variant.name} reads CLIP features: give --image_encoder"
            " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or an image_encoder folder"
        )
    from megawan.encoders.image import ImageEncoder

    images = (
        ImageEncoder.debug() if image_encoder == DEBUG else ImageEncoder.open(Path(image_encoder), device)
    )
    if (images.tokens, images.dim) != (CLIP_TOKENS, CLIP_DIM):
        raise ValueError(
            f"{image_encoder} gives {images.tokens} rows of {images.dim}, Wan reads {CLIP_TOKENS} of"
            f" {CLIP_DIM}: it is another CLIP"
        )
    return images
