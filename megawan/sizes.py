"""How big a run is, without torch: a variant's sizes for the cost formulas, a clip's latents and tokens, a
DeepSpeed section's memory layout.

The plan of a run and tools/plan.py both read these, so that they cannot disagree.
"""

import math
from collections.abc import Mapping
from typing import Any

from megawan import cost
from megawan.models.variants import CLIP_TOKENS, Variant, WanConfig

GIB = 2**30
RESERVE = 0.1  # of a GPU's memory: CUDA's context, NCCL's buffers, fragmentation, what the estimate misses
DEEPSPEED_BUCKET = 500_000_000  # elements, where the file names none
DEEPSPEED_SUB_GROUP = 1_000_000_000


def require_trainable(variant: Variant) -> None:
    """Raise ValueError for a variant that is read and written, but that the training step cannot feed."""
    if variant.config.vace_layers:
        raise ValueError(
            f"--model.variant {variant.name}: VACE is read and written, but its context is not in the"
            " training step yet; legal: every variant without vace in its name"
        )


def model_shape(wan: WanConfig) -> cost.ModelShape:
    """Return the sizes of `wan` that its cost depends on."""
    return cost.ModelShape(
        wan.dim,
        wan.ffn_dim,
        wan.num_heads,
        wan.num_layers,
        wan.in_dim,
        wan.out_dim,
        wan.text_len,
        wan.text_dim,
        wan.freq_dim,
        image_branch=wan.has_clip,
        image_tokens=wan.clip_tokens or CLIP_TOKENS,
        image_positions=wan.pos_embed_seq_len is not None,
        patch_volume=wan.patch_volume,
        vace_layers=len(wan.vace_layers),
        vace_in_dim=wan.vace_in_dim,
    )


def latent_shape(
    frames: int,
    height: int,
    width: int,
    channels: int,
    stride: tuple[int, int, int],
    patch: tuple[int, int, int],
) -> tuple[int, int, int, int]:
    """Return (C, T, H, W) of a clip's latents. Raises ValueError for sizes that the VAE or the patches do not
    divide, naming the nearest that they do."""
    if frames < 1 or (frames - 1) % stride[0]:
        raise ValueError(
            f"{frames} frames: must be {stride[0]}n+1; nearest: {_nearest(frames, stride[0], 1)}"
        )
    for name, size, step in (
        ("height", height, stride[1] * patch[1]),
        ("width", width, stride[2] * patch[2]),
    ):
        if size < step or size % step:
            raise ValueError(
                f"{name} {size} must be a multiple of {step}; nearest: {_nearest(size, step, step)}"
            )
    return channels, (frames - 1) // stride[0] + 1, height // stride[1], width // stride[2]


def _nearest(value: int, step: int, first: int) -> str:
    """Return the members of first, first + step, ... on both sides of `value`."""
    below = first + max(0, value - first) // step * step
    return f"{below}" if value < first else f"{below} or {below + step}"


def clip_tokens(variant: Variant, frames: int, height: int, width: int) -> int:
    """Return the tokens of a clip of so many pixels. Raises ValueError for a size that is not legal."""
    patch = variant.config.patch_size
    shape = latent_shape(frames, height, width, variant.latent_channels, variant.vae_stride, patch)
    return math.prod(size // side for size, side in zip(shape[1:], patch, strict=True))


def memory_layout(
    zero: Mapping[str, Any],
    precision: str,
    world_size: int,
    ulysses_degree: int,
    ring_degree: int,
    micro_batch: int,
    offload_activations: bool,
) -> cost.Layout:
    """Return what decides the memory of a rank; `zero` is DeepSpeed's section zero_optimization."""
    return cost.Layout(
        world_size,
        ulysses_degree,
        ring_degree,
        zero.get("stage", 0),
        precision,
        micro_batch,
        bucket=int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)),
        sub_group=int(zero.get("sub_group_size", DEEPSPEED_SUB_GROUP)),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        offload_activations=offload_activations,
    )


def describe_memory(memory: cost.RankMemory) -> str:
    """Return the total and its parts in GiB, at the moment that needs most."""
    total = f"{memory.total / GIB:,.3g} GiB a rank = model states {memory.states / GIB:,.3g}"
    if memory.updating > memory.backward:
        return (
            f"{total} + optimizer update {memory.updating / GIB:,.3g} + buckets {memory.buckets / GIB:,.3g}"
            f" (a backward pass needs {memory.backward / GIB:,.3g} instead of the update)"
        )
    return (
        f"{total} + kept activations {memory.kept / GIB:,.3g} + one block at work"
        f" {memory.working / GIB:,.3g} + gathered weights and buckets {memory.buffers / GIB:,.3g}"
    )
