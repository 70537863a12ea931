"""Names of weights: what a configuration's state dict holds, and how each layout on disk spells it."""

import re
from collections.abc import Iterable
from typing import Literal

import torch

from megawan.models.variants import WanConfig
from megawan.models.wan import WanModel

Layout = Literal["native", "diffusers", "comfyui", "model.", "pipe.dit."]

COMFYUI_PREFIX = "model.diffusion_model."
PREFIXES: dict[str, str] = {
    "native": "",
    "comfyui": COMFYUI_PREFIX,
    "model.": "model.",
    "pipe.dit.": "pipe.dit.",
}

# (native, diffusers) module names; within a block after "blocks.N." or "vace_blocks.N.".
_TOP = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("patch_embedding", "patch_embedding"),
    ("vace_patch_embedding", "vace_patch_embedding"),
)
_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("before_proj", "proj_in"),
    ("after_proj", "proj_out"),
)
_TO_DIFFUSERS = (dict(_TOP), dict(_BLOCK))
_TO_NATIVE = ({there: here for here, there in _TOP}, {there: here for here, there in _BLOCK})
_PLACE = re.compile(r"((?:vace_)?blocks\.(?:0|[1-9]\d*)\.)?(.+)", re.DOTALL)


def to_diffusers(key: str) -> str:
    """Return the diffusers name of a native key; raises KeyError for a key that no Wan has."""
    return _rename(key, _TO_DIFFUSERS)


def to_native(key: str) -> str:
    """Return the native name of a diffusers key; raises KeyError for a key that no Wan has."""
    return _rename(key, _TO_NATIVE)


def _rename(key: str, tables: tuple[dict[str, str], dict[str, str]]) -> str:
    place = _PLACE.fullmatch(key)
    if place is None:
        raise KeyError(key)
    block, rest = place.groups()
    table = tables[1 if block else 0]
    if rest in table:
        return (block or "") + table[rest]
    module, dot, last = rest.rpartition(".")
    if last not in ("weight", "bias"):
        raise KeyError(key)
    return (block or "") + table[module] + dot + last


def expected_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Return every native key of this configuration with its shape, in the model's order."""
    with torch.device("meta"):
        model = WanModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def parameter_count(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return how many numbers tensors of these shapes hold together."""
    return sum(torch.Size(shape).numel() for shape in shapes)
