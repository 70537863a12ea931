"""What weights are, told from their keys and shapes: the layout, the architecture, the variant's name."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megawan.models.keys import PREFIXES, to_native
from megawan.models.tensor_files import Stored, read_json
from megawan.models.variants import VARIANTS, Expert, Variant, WanConfig

Shape = tuple[int, ...]
PUBLISHED_HEAD_DIM = 128
IGNORED_BY_DIFFUSERS = ".attn2.norm_added_q.weight"  # in some published files, used by no code
# config.json of diffusers -> the field of WanConfig.
_DIFFUSERS_FIELDS = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    "vace_in_channels": "vace_in_dim",
    "image_dim": "image_dim",
    "pos_embed_seq_len": "pos_embed_seq_len",
    "vace_layers": "vace_layers",
    "patch_size": "patch_size",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
_OPTIONAL = ("image_dim", "pos_embed_seq_len")
# What shapes do not show: a configuration file or a known variant has to say it.
_UNSEEN = ("model_type", "num_heads", "text_len", "eps")
_KEYS_OF_OTHERS = {
    r"(^|\.)lora_|(^|\.)lokr_": "a LoRA; merge it into its base model first",
    r"^(encoder|decoder)\.(conv_?in|conv1|down)|^quant_conv": "a VAE",
    r"^token_embedding\.|^shared\.weight|^encoder\.block\.0": "a text encoder",
    r"^visual\.|^vision_model\.": "a CLIP image encoder",
    r"\.(scale_weight|scale_input|weight_scale)$|^scaled_fp8$": "an fp8 model; take the bf16 one",
    r"^(transformer|vace)\.": "a model saved with a prefix that is not known",
}


def native_tensors(tensors: Stored, path: Path) -> tuple[str, Stored]:
    """Return (layout, the same tensors under native names); raises ValueError for keys that no Wan has."""
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    for key, stored in tensors.items():
        if 0 in stored.shape:
            raise ValueError(
                f"{stored.file}: {key} has shape {stored.shape}, no elements: saved from a ZeRO-3 model"
                " without gathering its weights"
            )
    longest_first = sorted(PREFIXES.items(), key=lambda item: -len(item[1]))
    layout, prefix = next(item for item in longest_first if all(key.startswith(item[1]) for key in tensors))
    spelled = {key[len(prefix) :]: stored for key, stored in tensors.items()}
    native, unknown = spelled, []
    if any(key.startswith("condition_embedder.") for key in spelled):
        layout = f"diffusers ({prefix}*)" if prefix else "diffusers"
        native = {}
        for key, stored in spelled.items():
            try:
                native[to_native(key)] = stored
            except KeyError:
                if not key.endswith(IGNORED_BY_DIFFUSERS):
                    unknown.append(key)
    if "patch_embedding.weight" not in native:
        what = _hint(spelled) or f"; expected patch_embedding.weight, found {some(sorted(spelled))}"
        raise ValueError(f"{path}: not a Wan transformer{what}")
    if unknown:
        raise ValueError(f"{path}: unexpected keys in the {layout} layout: {some(unknown)}{_hint(unknown)}")
    return layout, native


def _hint(keys: Iterable[str]) -> str:
    """Return what keys like these usually belong to, and one of them; empty when they tell nothing."""
    for pattern, what in _KEYS_OF_OTHERS.items():
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            return f" (it looks like {what}: {found})"
    return ""


def inferred_config(
    native: Stored, path: Path, config_file: Path | None, expected: WanConfig | None = None
) -> WanConfig:
    """Return the configuration that keys and shapes show, completed by config.json or by a known variant.

    Where neither of them tells what shapes cannot show, `expected` is believed. Raises ValueError where
    config.json contradicts the shapes, or where nothing tells the number of heads.
    """
    seen = _seen_in_shapes(native, path)
    said = _said_by(config_file)
    for field, value in said.items():
        shown = seen.get(field, value)
        agrees = len(shown) == len(value) if field == "vace_layers" else shown == value
        if not agrees:
            raise ValueError(f"{config_file}: {field} is {plain(value)}, but the weights show {plain(shown)}")
    twins = [variant.config for variant in _of_shapes(seen | said)]
    unseen: dict[str, Any] = {}
    if twins:
        unseen = {field: getattr(twins[0], field) for field in (*_UNSEEN, "vace_layers")}
    elif expected is not None:
        unseen = {field: getattr(expected, field) for field in _UNSEEN}
    elif "num_heads" not in said:
        if seen["dim"] % PUBLISHED_HEAD_DIM:
            raise ValueError(
                f"{path}: dim {seen['dim']} is of no known variant and no config.json tells num_heads;"
                " put the config.json of these weights beside them"
            )
        unseen["num_heads"] = seen["dim"] // PUBLISHED_HEAD_DIM
    try:
        config = WanConfig(**(seen | unseen | said))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config_file or path}: {error}") from None
    if not (twins or expected) and "model_type" not in said:
        config = dataclasses.replace(config, model_type=_model_type(config))
    return config


def _seen_in_shapes(native: Stored, path: Path) -> dict[str, Any]:
    """Return the fields of WanConfig that the tensors themselves determine."""

    def shape(key: str, rank: int) -> Shape:
        if key not in native:
            raise ValueError(f"{path}: missing key {key}")
        if len(native[key].shape) != rank:
            raise ValueError(
                f"{native[key].file}: {key} expected {rank} axes, found shape {native[key].shape}"
            )
        return native[key].shape

    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    head = shape("head.head.weight", 2)[0]
    if head % math.prod(patch):
        raise ValueError(
            f"{path}: head.head.weight has {head} rows, not a multiple of the patch {tuple(patch)}"
        )
    seen: dict[str, Any] = {
        "dim": dim,
        "in_dim": in_dim,
        "patch_size": tuple(patch),
        "out_dim": head // math.prod(patch),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "num_layers": _count_blocks(native, "blocks", path),
        "image_dim": None,
        "pos_embed_seq_len": None,
    }
    if any(key.startswith("img_emb.") for key in native):
        seen["image_dim"] = shape("img_emb.proj.0.weight", 1)[0]
    if "img_emb.emb_pos" in native:
        seen["pos_embed_seq_len"] = shape("img_emb.emb_pos", 3)[1]
    vace = _count_blocks(native, "vace_blocks", path)
    seen["vace_layers"] = ()
    if vace:
        seen["vace_in_dim"] = shape("vace_patch_embedding.weight", 5)[1]
        # Every published VACE spreads its blocks evenly; another choice has to come with its config.json.
        step = max(seen["num_layers"] // vace, 1)
        seen["vace_layers"] = tuple(range(0, vace * step, step))
    return seen


def _count_blocks(native: Stored, name: str, path: Path) -> int:
    numbers = {int(part[1]) for part in (re.match(rf"{name}\.(\d{{1,6}})\.", key) for key in native) if part}
    for number in range(len(numbers)):
        if number not in numbers:
            raise ValueError(f"{path}: {name}.{number} is missing; found {name} up to {max(numbers)}")
    return len(numbers)


def _said_by(config_file: Path | None) -> dict[str, Any]:
    """Return the WanConfig fields that a native or diffusers config.json holds."""
    if config_file is None:
        return {}
    content = read_json(config_file)
    if "num_attention_heads" in content:
        said = {ours: content[theirs] for theirs, ours in _DIFFUSERS_FIELDS.items() if theirs in content}
        said = {name: value for name, value in said.items() if value is not None or name in _OPTIONAL}
        heads, width = content["num_attention_heads"], content.get("attention_head_dim", PUBLISHED_HEAD_DIM)
        if isinstance(heads, int) and isinstance(width, int):
            said["dim"] = heads * width
    else:
        names = {field.name for field in dataclasses.fields(WanConfig)}
        said = {name: value for name, value in content.items() if name in names}
    for field in dataclasses.fields(WanConfig):
        value = said.get(field.name)
        if isinstance(value, list):
            said[field.name] = value = tuple(value)
        if value is not None and not _is_of(value, field.name):
            raise ValueError(
                f"{config_file}: {field.name} is {repr(value)[:80]}; expected a value like {_example(field)}"
            )
    if not said.get("vace_layers"):
        said.pop("vace_layers", None)
        said.pop("vace_in_dim", None)
    return said


def _example(field: "dataclasses.Field[Any]") -> str:
    return repr(
        {"image_dim": 1280, "pos_embed_seq_len": 514, "vace_layers": [0, 5]}.get(field.name, field.default)
    )


def _is_of(value: Any, name: str) -> bool:
    if name in ("patch_size", "window_size", "vace_layers"):
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if name in ("qk_norm", "cross_attn_norm"):
        return isinstance(value, bool)
    if name == "model_type":
        return isinstance(value, str) and value.isprintable() and len(value) < 40
    return isinstance(value, float) if name == "eps" else type(value) is int


def _of_shapes(fields: dict[str, Any]) -> list[Variant]:
    """Return the known variants that agree with these fields; the kind of task in a config.json does not
    count."""
    given = {name: value for name, value in fields.items() if name != "model_type"}
    return [
        variant
        for variant in VARIANTS.values()
        if all(getattr(variant.config, name) == value for name, value in given.items())
    ]


def variant_names(config: WanConfig, said: str | None, expert: Expert | None) -> tuple[str, ...]:
    """Return the names of the known variants that these weights can be; one where the file itself says
    which."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(WanConfig)}
    names = [variant.name for variant in _of_shapes(fields) if expert is None or variant.expert == expert]
    return (said,) if said in names else tuple(names)


def _model_type(config: WanConfig) -> str:
    if config.vace_layers:
        return "vace"
    if config.pos_embed_seq_len:
        return "flf2v"
    return "i2v" if config.has_clip or config.in_dim > config.out_dim else "t2v"


def some(keys: Sequence[str], most: int = 4) -> str:
    """Return the first few keys and how many more there are, cut to a readable length."""
    listed = ", ".join(key if len(key) <= 80 else f"{key[:77]}..." for key in keys[:most])
    return listed if len(keys) <= most else f"{listed} and {len(keys) - most:,} more"


def plain(value: Any) -> str:
    """Return a configuration value as a person would write it, "no" for None and empty."""
    return "no" if value is None or value == () else str(value)
