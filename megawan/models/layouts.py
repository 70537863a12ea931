"""Opening Wan weights in any known layout: what they are is found out and checked before one tensor is read.

A layout is a spelling of the keys (`keys.py`) and a way of lying in files: one file, shards with an index, or
one of the two experts of a Wan2.2-A14B folder.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megawan.models.detect import inferred_config, native_tensors, plain, some, variant_names
from megawan.models.initial import initial_tensor
from megawan.models.keys import expected_shapes, parameter_count
from megawan.models.tensor_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    Stored,
    TensorSource,
    find_shards,
    read_file,
    read_files,
    read_index,
)
from megawan.models.variants import Expert, WanConfig
from megawan.models.writing import write_weights, written_bytes

__all__ = [
    "Expert",
    "OpenedWeights",
    "TensorSource",
    "open_experts",
    "open_weights",
    "provenance",
    "write_weights",
    "written_bytes",
]

Shape = tuple[int, ...]
LONGEST_METADATA = 4096
EXPERT_FOLDERS: dict[Expert, tuple[str, str]] = {
    "high": ("high_noise_model", "transformer"),
    "low": ("low_noise_model", "transformer_2"),
}


class OpenedWeights:
    """The weights of one transformer, checked, lying in their files: a TensorSource with native names."""

    def __init__(
        self,
        path: Path,
        layout: str,
        config: WanConfig,
        variants: tuple[str, ...],
        tensors: Stored,
        metadata: dict[str, str],
        filled: "Filled | None" = None,
    ) -> None:
        self.path = path
        self.layout = layout
        self.config = config
        self.variants = variants
        self.metadata = metadata
        self.filled = filled
        self._tensors = tensors
        self._shapes = expected_shapes(config)

    def keys(self) -> list[str]:
        """Return the native names, in the model's order."""
        return list(self._shapes)

    def shape(self, key: str) -> Shape:
        """Return a tensor's shape."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype in the file; float32 for one that the file lacks."""
        return self._tensors[key].dtype if key in self._tensors else torch.float32

    def load(self, key: str) -> Tensor:
        """Return one tensor on the CPU; raises ValueError naming the file when it cannot be read."""
        if self.filled is not None and key in self.filled.new:
            return initial_tensor(key, self._shapes[key], self.config, self.filled.seed)
        tensor = self._tensors[key].load()
        if self.filled is not None and key in self.filled.widened:
            whole = torch.zeros(self._shapes[key], dtype=tensor.dtype)
            kept = self.filled.widened[key]
            whole[:, :kept] = tensor[:, :kept]
            return whole
        return tensor

    def load_part(self, key: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of the flattened tensor; of the file only what holds them
        is read."""
        if self.filled is not None and (key in self.filled.new or key in self.filled.widened):
            return self.load(key).flatten()[start : start + length]
        return self._tensors[key].load_part(start, length)

    def describe(self) -> str:
        """Return one line: where, which layout, which variant, how many numbers; and what is initialised
        newly."""
        dtypes = sorted({str(stored.dtype).removeprefix("torch.") for stored in self._tensors.values()})
        files = len({stored.file for stored in self._tensors.values()})
        what = " or ".join(self.variants) or f"an unnamed {self.config.model_type} of dim {self.config.dim}"
        count = parameter_count(self._shapes.values())
        text = (
            f"{self.path}: {what}, {self.layout} layout, {files} file{'s' * (files > 1)}, {'+'.join(dtypes)}"
        )
        text += f", {count:,} parameters"
        return text if self.filled is None else f"{text}; {self.filled.describe()}"


@dataclass(frozen=True)
class Filled:
    """What part of a model the weights lack, and what stands there instead."""

    new: tuple[str, ...]
    """Tensors that start from their initial values."""
    widened: dict[str, int]
    """Patch embeddings with other input channels -> how many leading ones (the noisy latent's) are kept; the
    rest is 0."""
    seed: int

    def describe(self) -> str:
        """Return which tensors start anew, blocks folded into one word each."""
        words = []
        folded: dict[str, int] = {}
        for key in self.new:
            name = re.sub(r"blocks\.\d+\.", "blocks.*.", key)
            folded[name] = folded.get(name, 0) + 1
        if folded:
            listed = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in folded.items())
            words.append(f"initialised anew with seed {self.seed}: {listed}")
        for key, kept in self.widened.items():
            words.append(f"{key}: the first {kept} input channels kept, the others start at 0")
        return "; ".join(words)


def open_weights(
    path: Path,
    config: WanConfig | None = None,
    *,
    expert: Expert | None = None,
    initialise_missing: bool = False,
    seed: int = 0,
) -> OpenedWeights:
    """Return the weights at `path`, a file or a folder in any known layout, after every key and shape was
    checked.

    config: what the weights must be; None takes what they are. expert: which one of a folder that holds both
    experts of an A14B. initialise_missing: let `config` have parts that the weights lack; they start from
    their initial values of `seed`, and `describe()` lists them. Weights that the model has no place for are
    never dropped.
    Raises ValueError or FileNotFoundError with one line: file, key, expected, found.
    """
    place = _find(path, expert)
    where = place.where
    if expert is not None and place.expert not in (None, expert):
        raise ValueError(f"{where}: is the {place.expert}-noise expert; the {expert}-noise one was asked for")
    tensors, metadata = place.read()
    layout, native = native_tensors(tensors, where)
    found = inferred_config(native, where, place.config_file, config)
    variants = variant_names(found, metadata.get("variant"), place.expert)
    asked = config is not None
    config = config or found
    filled = _plan_filling(native, found, config, where, seed) if initialise_missing else None
    if filled is None:
        try:
            _require_all(native, expected_shapes(config), where, found, config)
        except ValueError as error:
            if not asked:  # no model is to start from them: a flag of training would mislead
                raise
            raise ValueError(f"{error}{_filling_hint(native, found, config, where)}") from None
    return OpenedWeights(where, layout, config, variants, native, metadata, filled)


def open_experts(path: Path) -> dict[Expert | None, OpenedWeights]:
    """Return {"high": …, "low": …} for a folder that holds both experts of an A14B, else {None: the weights}.

    Raises as `open_weights`, and when the experts differ in architecture.
    """
    if not _expert_folders(path):
        return {None: open_weights(path)}
    high, low = open_weights(path, expert="high"), open_weights(path, expert="low")
    if high.config != low.config:
        raise ValueError(f"{path}: its two experts differ: {high.describe()}, but {low.describe()}")
    return {"high": high, "low": low}


def provenance(experts: Sequence[OpenedWeights], command: str) -> dict[str, str]:
    """Return the metadata of a conversion: what the first file says about itself, and what was done to it."""
    first = experts[0]
    kept = {key: value[:LONGEST_METADATA] for key, value in first.metadata.items() if key != "format"}
    if len(first.variants) == 1 and len(experts) == 1:
        kept["variant"] = first.variants[0]
    return kept | {"converted_by": command}


# --- finding the files ---


@dataclass(frozen=True)
class _Place:
    """Where one transformer lies."""

    path: Path
    kind: Literal["file", "index", "files"]
    files: tuple[Path, ...]
    config_file: Path | None
    expert: Expert | None = None

    @property
    def where(self) -> Path:
        """Return what messages name: the file where there is one, else the folder or index."""
        return self.files[0] if len(self.files) == 1 and self.kind == "file" else self.path

    def read(self) -> tuple[Stored, dict[str, str]]:
        if self.kind == "index":
            return read_index(self.files[0])
        return read_files(self.files) if self.kind == "files" else read_file(self.files[0])


def _expert_folders(path: Path) -> dict[Expert, Path]:
    """Return the folders of both experts below `path`, or nothing where there are not two."""
    for place in range(2):
        folders = {expert: path / names[place] for expert, names in EXPERT_FOLDERS.items()}
        if all(folder.is_dir() for folder in folders.values()):
            return folders
    return {}


def _find(path: Path, expert: Expert | None) -> _Place:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: neither a file nor a folder (a pipe or a device?)")
    if path.is_file():
        kind: Literal["file", "index"] = "index" if path.name.endswith(INDEX_SUFFIX) else "file"
        return _Place(path, kind, (path,), _config_beside(path.parent), _expert_of(path.parent))
    folders = _expert_folders(path)
    if folders and expert is None:
        names = " or ".join(str(folder) for folder in folders.values())
        raise ValueError(f"{path}: holds both experts of an A14B; give one of them: {names}")
    if folders and expert is not None:
        return _find_in(folders[expert])
    if (path / "transformer").is_dir():
        return _find_in(path / "transformer")
    return _find_in(path)


def _find_in(folder: Path) -> _Place:
    """Return the weights of a folder: its index, its one file, or its complete set of numbered shards."""
    config_file, expert = _config_beside(folder), _expert_of(folder)
    names = sorted(folder.iterdir())
    if {"manifest.json", "rank_00000.safetensors"} <= {file.name for file in names}:
        raise ValueError(_checkpoint_hint(folder))
    indices = [file for file in names if file.name.endswith(INDEX_SUFFIX)]
    if len(indices) == 1:
        return _Place(folder, "index", (indices[0],), config_file, expert)
    weights = [file for file in names if file.suffix == ".safetensors"]
    if len(weights) != 1 and not indices:
        shards = find_shards(weights)
        if shards:
            return _Place(folder, "files", tuple(shards), config_file, expert)
    if not weights:
        weights = [file for file in names if file.suffix in PICKLE_SUFFIXES]
    if len(weights) == 1 and not indices:
        return _Place(folder, "file", (weights[0],), config_file, expert)
    if indices or weights:
        listed = ", ".join(file.name for file in (indices or weights)[:6])
        raise ValueError(f"{folder}: holds several weights ({listed}); give one of these files")
    if (folder / "checkpoints").is_dir():
        raise ValueError(_checkpoint_hint(folder))
    raise FileNotFoundError(
        f"{folder}: no weights; expected a .safetensors or .pth file, shards with an index, or a folder with"
        " transformer/ (diffusers) or high_noise_model/ and low_noise_model/ (A14B)"
    )


def _checkpoint_hint(folder: Path) -> str:
    return (
        f"{folder}: a training checkpoint, not weights; tools/export_checkpoint.py --input {folder} makes"
        " weights of it, and a run goes on with --output and --checkpoint.resume"
    )


def _config_beside(folder: Path) -> Path | None:
    file = folder / "config.json"
    return file if file.is_file() else None


def _expert_of(folder: Path) -> Expert | None:
    """Return the expert that the folder's name tells; transformer/ is one only beside a transformer_2/."""
    names: dict[str, Expert] = {"high_noise_model": "high", "low_noise_model": "low", "transformer_2": "low"}
    if folder.name == "transformer" and (folder.parent / "transformer_2").is_dir():
        return "high"
    return names.get(folder.name)


# --- what they should be ---


def _require_all(
    native: Stored, wanted: dict[str, Shape], path: Path, found: WanConfig, config: WanConfig
) -> None:
    """Raise ValueError unless the tensors are exactly the wanted ones, of the same architecture."""
    differences = _differences(found, config)
    missing = [key for key in wanted if key not in native]
    extra = [key for key in native if key not in wanted]
    misshapen = [key for key in wanted if key in native and native[key].shape != wanted[key]]
    if not (differences or missing or extra or misshapen):
        return
    words = []
    if differences:
        names = variant_names(found, None, None)
        words.append(
            f"not the model asked for but {' or '.join(names) or 'another one'}: {some(differences)}"
        )
    if missing:
        words.append(f"missing keys: {some(missing)}")
    if extra:
        words.append(f"unexpected keys: {some(extra)}")
    if misshapen:
        key = misshapen[0]
        words.append(f"{key} expected {wanted[key]}, found {native[key].shape} in {native[key].file.name}")
        if len(misshapen) > 1:
            words[-1] += f", and {len(misshapen) - 1} more of another shape"
    raise ValueError(f"{path}: {'; '.join(words)}")


def _differences(found: WanConfig, config: WanConfig) -> list[str]:
    """Return "field expected a, found b" for what makes another network; the kind of task alone does not."""
    names = [
        field.name for field in dataclasses.fields(WanConfig) if field.name not in ("model_type", "text_len")
    ]
    if not (found.vace_layers or config.vace_layers):
        names.remove("vace_in_dim")
    return [
        f"{name} expected {plain(getattr(config, name))}, found {plain(getattr(found, name))}"
        for name in names
        if getattr(found, name) != getattr(config, name)
    ]


def _filling_hint(native: Stored, found: WanConfig, config: WanConfig, path: Path) -> str:
    """Return that these weights can be a part of the model, where they can; else nothing."""
    try:
        _plan_filling(native, found, config, path, 0)
    except ValueError:
        return ""
    return "; with --model.initialise_missing the model can start from them and what they lack anew"


def _plan_filling(
    native: Stored, found: WanConfig, config: WanConfig, path: Path, seed: int
) -> Filled | None:
    """Return what the model starts anew beside these weights, None for nothing; raises for anything else
    unlike."""
    wanted = expected_shapes(config)
    new = tuple(key for key in wanted if key not in native)
    widened = {}
    if "patch_embedding.weight" in native:
        have, want = native["patch_embedding.weight"].shape, wanted["patch_embedding.weight"]
        kept = (
            config.out_dim
        )  # the noisy latent comes first in every variant; what follows differs in meaning
        if have != want and (have[0], *have[2:]) == (want[0], *want[2:]) and have[1] >= kept:
            widened["patch_embedding.weight"] = kept
    rest = {key: shape for key, shape in wanted.items() if key in native and key not in widened}
    held = {key: stored for key, stored in native.items() if key not in widened}
    grown = {"in_dim", "image_dim", "pos_embed_seq_len", "vace_layers", "vace_in_dim"}
    same = dataclasses.replace(found, **{name: getattr(config, name) for name in grown})
    _require_all(held, rest, path, same, config)
    return Filled(new, widened, seed) if new or widened else None
