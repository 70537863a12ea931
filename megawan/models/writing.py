"""Writing weights in the layouts that others open: one tensor in memory at a time, and nothing seen before it
is whole."""

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megawan.files import open_streaming, sync, write_json, write_text
from megawan.models.keys import COMFYUI_PREFIX, expected_shapes, to_diffusers
from megawan.models.tensor_files import DTYPE_NAMES, TensorSource, read_safetensors
from megawan.models.variants import VARIANTS, Variant, WanConfig, get_variant

OutputLayout = Literal["native", "diffusers", "comfyui"]
LAYOUTS: tuple[OutputLayout, ...] = ("native", "diffusers", "comfyui")
STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5 * 10**9
FREE_SPACE_MARGIN = 2**20


def write_weights(
    source: TensorSource,
    config: WanConfig,
    out_dir: Path,
    layout: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    *,
    low_noise: TensorSource | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tick: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write `source` (native names) as a new folder `out_dir` in `layout` and return the weight files.

    dtype: torch.bfloat16 or torch.float32, or None to keep each tensor's own. metadata: strings for the
    files' headers and the model card; "variant" also decides the folder of an A14B expert. low_noise: the
    second expert, beside `source` as the high-noise one. tick: called with the bytes written since the last
    call.

    Holds one tensor at a time. Everything is written under a temporary name beside `out_dir`, synced, checked
    and renamed, so that a kill leaves no readable part. Raises ValueError where the source does not fit
    `config`, `out_dir` is not empty, or space is short; OSError from the file system. In every such case
    nothing is left.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; legal: {', '.join(LAYOUTS)}")
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(
            f"dtype {dtype} is not written; legal: bfloat16, float32, or None for the source's own"
        )
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be at least 1")
    experts = {"": source} if low_noise is None else {"high": source, "low": low_noise}
    variant = _variant_of(config, metadata, both=low_noise is not None)
    plans = [
        _Plan(expert, held, config, _folder_and_stem(layout, expert, variant), layout, dtype)
        for expert, held in experts.items()
    ]
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: exists and is not an empty folder; give a new one")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    needed, free = (
        sum(plan.bytes for plan in plans) + FREE_SPACE_MARGIN,
        shutil.disk_usage(out_dir.parent).free,
    )
    if needed > free:
        raise ValueError(f"{out_dir}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    temporary = out_dir.parent / f".{out_dir.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        files = []
        for plan in plans:
            files += plan.write(temporary, dict(metadata), max_shard_bytes, tick)
        for file in files:
            os.replace(_partial(file), file)
        write_text(temporary / "README.md", _model_card(layout, config, dtype, metadata, files, temporary))
        if layout == "diffusers":
            write_json(temporary / "model_index.json", _model_index(config, variant, plans), sort_keys=True)
        sync(temporary)
        os.replace(temporary, out_dir)
        sync(out_dir.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [out_dir / file.relative_to(temporary) for file in files]


def written_bytes(source: TensorSource, dtype: torch.dtype | None) -> int:
    """Return how many bytes of tensors `write_weights` will write, for a progress bar."""
    return sum(
        torch.Size(source.shape(key)).numel() * (dtype or source.dtype(key)).itemsize for key in source.keys()
    )


class _Plan:
    """One transformer of an export: which tensor goes under which name into which file."""

    def __init__(
        self,
        expert: str,
        source: TensorSource,
        config: WanConfig,
        place: tuple[str, str],
        layout: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.expert = expert
        self.source = source
        self.config = config
        self.folder, self.stem = place
        self.layout = layout
        self.dtype = dtype
        self.shapes = expected_shapes(config)
        self._check()
        self.bytes = written_bytes(source, dtype)

    def _check(self) -> None:
        held = set(self.source.keys())
        for key in sorted(held ^ self.shapes.keys()):
            raise ValueError(
                f"{key} is {'missing from' if key not in held else 'unexpected in'} the weights to write"
            )
        for key, shape in self.shapes.items():
            if tuple(self.source.shape(key)) != shape:
                raise ValueError(
                    f"{key} to write: expected shape {shape}, found {tuple(self.source.shape(key))}"
                )
            if self.source.dtype(key) not in DTYPE_NAMES:
                raise ValueError(f"{key} to write is {self.source.dtype(key)}; expected a floating dtype")

    def spelled(self, key: str) -> str:
        if self.layout == "diffusers":
            return to_diffusers(key)
        return COMFYUI_PREFIX + key if self.layout == "comfyui" else key

    def size(self, key: str) -> int:
        return torch.Size(self.shapes[key]).numel() * (self.dtype or self.source.dtype(key)).itemsize

    def shards(self, max_shard_bytes: int) -> list[list[str]]:
        """Return the keys of each file; a shard holds at most max_shard_bytes, or one tensor that is
        larger."""
        if self.layout == "comfyui":  # it opens single files only
            return [list(self.shapes)]
        shards: list[list[str]] = [[]]
        filled = 0
        for key in self.shapes:
            if shards[-1] and filled + self.size(key) > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(key)
            filled += self.size(key)
        return shards

    def write(
        self, root: Path, metadata: dict[str, str], max_shard_bytes: int, tick: Callable[[int], None] | None
    ) -> list[Path]:
        folder = root / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        shards = self.shards(max_shard_bytes)
        count = len(shards)
        weight_map: dict[str, str] = {}
        files = []
        for number, keys in enumerate(shards, start=1):
            name = (
                f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
                if count > 1
                else f"{self.stem}.safetensors"
            )
            self._write_shard(folder / name, keys, metadata, tick)
            weight_map |= {self.spelled(key): name for key in keys}
            files.append(folder / name)
        if count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            write_json(folder / f"{self.stem}.safetensors.index.json", index, sort_keys=True)
        about = _diffusers_config(self.config) if self.layout == "diffusers" else _native_config(self.config)
        write_json(folder / "config.json", about, sort_keys=True)
        sync(folder)
        return files

    def _write_shard(
        self, file: Path, keys: list[str], metadata: dict[str, str], tick: Callable[[int], None] | None
    ) -> None:
        """Write one safetensors file tensor by tensor, then read its header back and compare."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        start = 0
        for key in keys:
            stop = start + self.size(key)
            header[self.spelled(key)] = {
                "dtype": DTYPE_NAMES[self.dtype or self.source.dtype(key)],
                "shape": list(self.shapes[key]),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        partial = _partial(file)
        with open_streaming(partial) as write:
            write(struct.pack("<Q", len(text)) + text)
            for key in keys:
                write(self._bytes_of(key).numpy().data)
                if tick is not None:
                    tick(self.size(key))
        written, _ = read_safetensors(partial)
        for key in keys:
            stored = written.get(self.spelled(key))
            if stored is None or stored.shape != self.shapes[key] or len(written) != len(keys):
                raise OSError(f"{file}: {key} did not read back as written")

    def _bytes_of(self, key: str) -> Tensor:
        tensor = self.source.load(key)
        if tuple(tensor.shape) != self.shapes[key]:
            raise ValueError(f"{key} to write: expected shape {self.shapes[key]}, read {tuple(tensor.shape)}")
        tensor = tensor.to("cpu", self.dtype or self.source.dtype(key)).contiguous()
        return tensor.flatten().view(torch.uint8)


def _partial(file: Path) -> Path:
    """Return the name of a file until all are whole: a kill leaves nothing that opens as weights."""
    return file.with_name(f"{file.name}.partial")


def _folder_and_stem(layout: str, expert: str, variant: Variant | None) -> tuple[str, str]:
    """Return the sub-folder and the file name stem of one transformer; expert is "" where it is alone."""
    own = expert or (variant.expert if variant else None)
    if layout == "diffusers":
        return ("transformer_2" if own == "low" else "transformer"), STEM
    if layout == "native":
        return (f"{expert}_noise_model" if expert else ""), STEM
    name = variant.name if variant else "model"
    if expert:  # two experts: the variant's name is that of one of them
        name = f"{name.removesuffix('-high').removesuffix('-low')}-{expert}"
    return "", f"wan-{name}"


def _native_config(config: WanConfig) -> dict[str, Any]:
    """Return the fields of Wan's own config.json, and beside them only what differs from Wan's defaults."""
    names = [
        "model_type",
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "num_heads",
        "num_layers",
        "out_dim",
    ]
    names += ["text_len", "vace_layers", "vace_in_dim"] if config.vace_layers else ["text_len"]
    default = WanConfig()
    names += [name for name in ("text_dim", "patch_size") if getattr(config, name) != getattr(default, name)]
    return {
        "_class_name": "VaceWanModel" if config.vace_layers else "WanModel",
        "_diffusers_version": "0.33.0",
    } | {name: getattr(config, name) for name in names}


def _diffusers_config(config: WanConfig) -> dict[str, Any]:
    about = {
        "_class_name": "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel",
        "_diffusers_version": "0.35.0",
        "added_kv_proj_dim": config.dim if config.has_clip else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": config.cross_attn_norm,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.pos_embed_seq_len,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
    if config.vace_layers:
        about |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.vace_in_dim}
    return about


def _model_index(config: WanConfig, variant: Variant | None, plans: list[_Plan]) -> dict[str, Any]:
    """Return the pipeline's description; the components that an export does not have come from the base
    repository."""
    kind = _diffusers_config(config)["_class_name"]
    pipeline = "WanPipeline"
    if config.vace_layers:
        pipeline = "WanVACEPipeline"
    elif config.in_dim > config.out_dim:
        pipeline = "WanImageToVideoPipeline"
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "boundary_ratio": variant.boundary if variant else None,
        "expand_timesteps": config.model_type == "ti2v",
    } | {plan.folder: ["diffusers", kind] for plan in plans}


def _variant_of(config: WanConfig, metadata: Mapping[str, str], both: bool) -> Variant | None:
    """Return the variant that is written: the one named, or for two experts the A14B of this architecture."""
    if metadata.get("variant") in VARIANTS:
        return get_variant(metadata["variant"])
    pairs = [variant for variant in VARIANTS.values() if variant.expert and variant.config == config]
    return pairs[0] if both and pairs else None


def _model_card(
    layout: str,
    config: WanConfig,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    files: list[Path],
    root: Path,
) -> str:
    """Return README.md: what this is, where it came from, how it is opened."""
    base = metadata.get("base", "")
    front = ["---", "pipeline_tag: text-to-video"]
    if base.count("/") == 1 and not base.startswith(("/", ".")):
        front.append(f"base_model: {json.dumps(base)}")
    listed = [f"`{file.relative_to(root)}`" for file in files]
    rows = {
        "architecture": f"{config.model_type}, dim {config.dim}, {config.num_layers} blocks,"
        f" {config.num_heads} heads",
        "layout": f"{layout}, {str(dtype).removeprefix('torch.') if dtype else 'dtypes of the source'}",
        "files": ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else ""),
    } | {key: f"`{value}`" for key, value in metadata.items()}
    table = ["| | |", "|---|---|"] + [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    kind, folder = _diffusers_config(config)["_class_name"], files[0].parent.name
    opening = {
        "native": "Opened by Wan's own code and DiffSynth-Studio, and by ComfyUI where it is one file.",
        "diffusers": f'`{kind}.from_pretrained(FOLDER, subfolder="{folder}")`; give it to the pipeline of the'
        " base repository, which has the text encoder, the VAE and the scheduler.",
        "comfyui": "The file belongs into `ComfyUI/models/diffusion_models/`.",
    }[layout]
    name = metadata.get("variant", config.model_type)
    return "\n".join([*front, "---", "", f"# Wan {name}", "", *table, "", opening, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
