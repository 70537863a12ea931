"""What a Wan variant is told besides text: masks, image latents, clean frames, control and VACE contexts.

Pure functions of tensors; encoding pixels to (normalised) latents is the caller's. Letters: B batch, F pixel
frames, H/W pixels, T = (F − 1)/4 + 1 latent frames, h/w latent height and width.

- t2v: nothing.
- i2v (2.1 and A14B), Fun-InP: `condition` = image_condition(latent of image_clip(first, F)), 4 + 16 channels.
- flf2v: the same with `last`.
- ti2v: latent frame 0 of x_t is kept clean, put_clean_frames.
- Fun-Control: `condition` = control_condition(control latent, image condition), 16 + 16 (or 20) channels.
- VACE: vace_context(...), 96 channels, into the model's VACE branch.

`condition` is concatenated after the 16 noisy channels.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

TEMPORAL_STRIDE = 4  # pixel frames per latent frame after the first, all Wan VAEs
SPATIAL_STRIDE = 8  # Wan2.1 VAE, the one of every variant with masks


def latent_frames(frames: int) -> int:
    """Return T = (F − 1)/4 + 1. Raises ValueError unless F = 4n + 1."""
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        raise ValueError(f"the number of frames must be 4n + 1 (1, 5, 9, …, 81), got {frames}")
    return (frames - 1) // TEMPORAL_STRIDE + 1


def image_clip(first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """Return the clip to encode for i2v: the image, then zeros (grey in [−1, 1]), then `last` if given.

    first, last [B, 3, H, W] in [−1, 1]; result [B, 3, F, H, W]. Encode it whole: zeros are encoded, latents
    never zeroed.
    Raises ValueError for a frame count that is not 4n + 1, F = 1 with `last`, or shapes that differ.
    """
    latent_frames(frames)
    if first.ndim != 4:
        raise ValueError(f"first must be [B, 3, H, W], got shape {list(first.shape)}")
    clip = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])
    clip[:, :, 0] = first
    if last is not None:
        _check_room_for_last(frames)
        if last.shape != first.shape:
            raise ValueError(
                f"first and last must have one shape, got {list(first.shape)} and {list(last.shape)}"
            )
        clip[:, :, -1] = last
    return clip


def image_mask(frames: int, height: int, width: int, *, last: bool = False) -> Tensor:
    """Return which pixel frames of each latent frame are given, float32 [4, T, h, w] of 0 and 1.

    Frame 0 counts four times (its latent frame holds it alone), so channel c of latent frame j > 0 is pixel
    frame 4j − 3 + c: all four channels are 1 at latent frame 0; with `last` channel 3 is 1 at the last one.
    `height`, `width` are the latent's. Raises ValueError for F != 4n + 1, or F = 1 with `last`.
    """
    latent_frames(frames)
    given = torch.zeros(frames, dtype=torch.float32)
    given[0] = 1
    if last:
        _check_room_for_last(frames)
        given[-1] = 1
    given = torch.cat([given[:1].repeat(TEMPORAL_STRIDE - 1), given])
    given = rearrange(given, "(t c) -> c t 1 1", c=TEMPORAL_STRIDE)
    return given.repeat(1, 1, height, width)


def image_condition(image_latent: Tensor, *, last: bool = False) -> Tensor:
    """Return [mask 4 | image latent C], [B, 4 + C, T, h, w] in the latent's dtype: what i2v and flf2v get.

    image_latent [B, C, T, h, w]: the encoded `image_clip`. Raises ValueError for another number of
    dimensions.
    """
    _check_latent("image_latent", image_latent)
    batch, _, time, height, width = image_latent.shape
    mask = image_mask(TEMPORAL_STRIDE * (time - 1) + 1, height, width, last=last).to(image_latent)
    return torch.cat([mask.expand(batch, -1, -1, -1, -1), image_latent], dim=1)


def put_clean_frames(x_t: Tensor, clean: Tensor, frames: int = 1) -> Tensor:
    """Return x_t with its first `frames` latent frames replaced by those of `clean` (ti2v), a new tensor.

    x_t [B, C, T, h, w]; clean [B or 1, C, at least `frames`, h, w].
    Raises ValueError for shapes that do not fit.
    """
    _check_latent("x_t", x_t)
    _check_latent("clean", clean)
    clean = clean[:, :, :frames].to(x_t)
    wanted = (*x_t.shape[:2], frames, *x_t.shape[3:])
    if frames > x_t.shape[2] or clean.shape[1:] != wanted[1:] or len(clean) not in (1, len(x_t)):
        raise ValueError(
            f"the clean frames must have shape {list(wanted)} (or batch 1), got {list(clean.shape)} "
            f"for x_t of shape {list(x_t.shape)}"
        )
    return torch.cat([clean.expand(wanted), x_t[:, :, frames:]], dim=2)


def control_condition(
    control_latent: Tensor, image: Tensor | None = None, *, image_channels: int = 16
) -> Tensor:
    """Return [control latent | image], [B, C + image_channels, T, h, w]: what Fun-Control gets.

    image_channels is 16 (the image latent alone: in_dim 48) or 20 (mask and image latent: in_dim 52). `image`
    is an `image_condition` or an image latent, of which the last `image_channels` channels are taken; None
    means zeros.
    Raises ValueError for shapes that do not fit.
    """
    _check_latent("control_latent", control_latent)
    if image_channels < 1:
        raise ValueError(f"image_channels must be at least 1 (16, or 20 with the mask), got {image_channels}")
    batch, _, *grid = control_latent.shape
    if image is None:
        image = control_latent.new_zeros(batch, image_channels, *grid)
    _check_latent("image", image)
    if image.shape[1] < image_channels or (len(image), *image.shape[2:]) != (batch, *grid):
        raise ValueError(
            f"image must have at least {image_channels} channels and the control latent's batch and grid "
            f"[{batch}, C, {', '.join(map(str, grid))}], got shape {list(image.shape)}"
        )
    return torch.cat([control_latent, image[:, -image_channels:].to(control_latent)], dim=1)


def vace_split(video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (inactive, reactive): the pixels to keep and the pixels to make, each grey (0) elsewhere.

    video [B, 3, F, H, W] in [−1, 1]; mask [B, 1, F, H, W] in [0, 1], above 0.5 = make. Both are then encoded.
    Raises ValueError for shapes that do not fit.
    """
    if video.ndim != 5 or mask.shape != (len(video), 1, *video.shape[2:]):
        raise ValueError(
            "video must be [B, 3, F, H, W] and mask [B, 1, F, H, W], "
            f"got {list(video.shape)} and {list(mask.shape)}"
        )
    made = (mask > 0.5).to(video.dtype)
    return video * (1 - made), video * made


def vace_mask(mask: Tensor) -> Tensor:
    """Return the mask on the latent's grid, [B, 64, T, H/8, W/8]: its 8×8 pixels become channels (row first).

    mask [B, 1, F, H, W] in [0, 1], used as it is; time goes to T = (F − 1)/4 + 1 by the nearest frame to each
    centre.
    Raises ValueError for F != 4n + 1 or a size that 8 does not divide.
    """
    if mask.ndim != 5 or mask.shape[1] != 1:
        raise ValueError(f"mask must be [B, 1, F, H, W], got shape {list(mask.shape)}")
    frames, height, width = mask.shape[2:]
    if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise ValueError(
            f"the mask's height and width must be multiples of {SPATIAL_STRIDE}, got {height}×{width}"
        )
    blocks = rearrange(mask, "b 1 f (h p) (w q) -> b (p q) f h w", p=SPATIAL_STRIDE, q=SPATIAL_STRIDE)
    return functional.interpolate(
        blocks, size=(latent_frames(frames), *blocks.shape[3:]), mode="nearest-exact"
    )


def vace_context(
    inactive: Tensor, reactive: Tensor, mask: Tensor, references: Tensor | None = None
) -> Tensor:
    """Return VACE's context [inactive 16 | reactive 16 | mask 64], [B, 96, R + T, h, w].

    inactive, reactive [B, 16, T, h, w]: the encoded `vace_split`; mask [B, 64, T, h, w]: `vace_mask`;
    references [B, 16, R, h, w]: latents of R reference images, put before the video in their order, with zero
    reactive and mask channels. The noisy latent then has R more frames too, which are cut off a sample's end
    result.
    Raises ValueError for shapes that do not fit.
    """
    for name, part in (("inactive", inactive), ("reactive", reactive), ("mask", mask)):
        _check_latent(name, part)
    batch, channels, *grid = inactive.shape
    if reactive.shape != inactive.shape or mask.shape != (batch, SPATIAL_STRIDE**2, *grid):
        raise ValueError(
            f"reactive must have inactive's shape {list(inactive.shape)} "
            f"and mask {[batch, SPATIAL_STRIDE**2, *grid]}, got {list(reactive.shape)} and {list(mask.shape)}"
        )
    context = torch.cat([inactive, reactive, mask.to(inactive)], dim=1)
    if references is None:
        return context
    _check_latent("references", references)
    if references.shape[:2] != (batch, channels) or references.shape[3:] != inactive.shape[3:]:
        raise ValueError(
            f"references must be [{batch}, {channels}, R, {grid[1]}, {grid[2]}], got {list(references.shape)}"
        )
    rest = references.new_zeros(batch, context.shape[1] - channels, *references.shape[2:])
    return torch.cat([torch.cat([references, rest], dim=1).to(context), context], dim=2)


def _check_latent(name: str, latent: Tensor) -> None:
    if latent.ndim != 5:
        raise ValueError(f"{name} must be [B, C, T, h, w], got shape {list(latent.shape)}")


def _check_room_for_last(frames: int) -> None:
    if frames < 2:
        raise ValueError("a last image needs at least 5 frames, got 1: one frame cannot be first and last")
