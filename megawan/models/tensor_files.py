"""Tensors in files, one at a time: what is in a file is known from its header, and nothing in it is ever
executed."""

import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
JSON_LIMIT = 64 * 2**20
LONGEST_NAME = 400
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class TensorSource(Protocol):
    """Named tensors that are read one at a time; names are Wan's native ones."""

    def keys(self) -> list[str]:
        """Return the native names."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype, without reading it."""

    def load(self, key: str) -> Tensor:
        """Return the tensor on the CPU, a copy that the caller owns."""

    def load_part(self, key: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of the flattened tensor, as `load`."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[slice], Tensor]
    """Gives rows of the first axis, a copy."""

    def load(self) -> Tensor:
        """Return the whole tensor."""
        return self.read(slice(None))

    def load_part(self, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of the flattened tensor; only the rows that hold them are
        read."""
        row = math.prod(self.shape[1:])
        first = start // row
        rows = self.read(slice(first, -(-(start + length) // row)))
        return rows.flatten()[start - first * row :][:length]


Stored = dict[str, StoredTensor]


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ValueError naming the file when it holds anything else."""
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise ValueError(f"{file}: larger than {JSON_LIMIT >> 20} MiB, which no index or config is")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_file(file: Path) -> tuple[Stored, dict[str, str]]:
    """Return the tensors of one file by their names there, and its metadata.

    Raises ValueError naming the file when it is damaged, is not what its name says, or holds anything but
    tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.name.endswith(".safetensors"):
        return read_safetensors(file)
    if file.suffix in PICKLE_SUFFIXES:
        return _read_pickle(file), {}
    raise ValueError(
        f"{file}: not a name of weights; expected .safetensors, {', '.join(PICKLE_SUFFIXES)}"
        f" or an index {INDEX_SUFFIX}"
    )


def read_files(files: Sequence[Path]) -> tuple[Stored, dict[str, str]]:
    """Return the tensors of several files together; raises ValueError for a name that two of them hold."""
    tensors: Stored = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, about = read_file(file)
        for key in more.keys() & tensors.keys():
            raise ValueError(f"{file}: {key} is in {tensors[key].file.name} too")
        tensors |= more
        metadata |= about
    return tensors, metadata


def read_index(index: Path) -> tuple[Stored, dict[str, str]]:
    """Return the tensors of the shards that an index lists; raises ValueError for a shard or a tensor it
    lacks."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: expected a weight_map from tensor to shard")
    for key, name in places.items():
        _require_readable(key, index)
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or not name.isprintable()
        ):
            raise ValueError(
                f"{index}: {key} is in {repr(name)[:LONGEST_NAME]}; expected a .safetensors file of the same"
                " folder"
            )
    files = [index.parent / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            held = sum(name == file.name for name in places.values())
            raise FileNotFoundError(
                f"{index}: shard {file.name} with {held} of {len(places)} tensors is missing"
            )
    tensors, metadata = read_files(files)
    for key, name in places.items():
        if key not in tensors or tensors[key].file.name != name:
            raise ValueError(f"{index.parent / name}: expected {key}, as {index.name} says; it is not there")
    for key in tensors.keys() - places.keys():
        raise ValueError(f"{tensors[key].file}: found {key}, which {index.name} does not list")
    return tensors, metadata


def find_shards(files: Sequence[Path]) -> list[Path] | None:
    """Return the files as one complete set NAME-00001-of-0000N.safetensors, or None where they are no such
    set.

    Raises FileNotFoundError naming the first shard that is missing.
    """
    parts = [_SHARD.fullmatch(file.name) for file in files]
    if not files or not all(parts) or len({(part[1], part[3]) for part in parts if part}) != 1:
        return None
    stem, count = next((part[1], int(part[3])) for part in parts if part)
    wanted = [
        files[0].parent / f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    for file in wanted:
        if file not in files:
            raise FileNotFoundError(f"{file}: this shard of {count} is missing")
    return wanted


def read_safetensors(file: Path) -> tuple[Stored, dict[str, str]]:
    """Return the tensors and metadata of a safetensors file of any name; ValueError where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors: Stored = {}
            for key in opened.keys():
                _require_readable(key, file)
                view = opened.get_slice(key)
                if view.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {key} is {view.get_dtype()}; expected one of {', '.join(DTYPES)}"
                    )
                tensors[key] = StoredTensor(
                    file, tuple(view.get_shape()), DTYPES[view.get_dtype()], _SafetensorsRead(file, key)
                )
            return tensors, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {_foreign(file) or f'damaged safetensors file ({error})'}") from None


@dataclass(frozen=True)
class _SafetensorsRead:
    """Reads rows of one tensor; the file is mapped only meanwhile, so that pages already read do not count as
    ours."""

    file: Path
    key: str

    def __call__(self, rows: slice) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as opened:
                tensor: Tensor = opened.get_slice(self.key)[rows].clone()
                return tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: {self.key} cannot be read ({error})") from None


def _read_pickle(file: Path) -> Stored:
    foreign = _foreign(file)
    if foreign:
        raise ValueError(f"{file}: {foreign}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; a refusal says what matters
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or hostile pickle can make the restricted reader raise anything
        raise ValueError(f"{file}: {_why_refused(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors: Stored = {}
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"{file}: expected a dictionary of dense tensors; {key!r} is a {type(tensor).__name__}"
            )
        _require_readable(key, file)
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{file}: {key} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
        tensors[key] = StoredTensor(file, tuple(tensor.shape), tensor.dtype, _TensorRead(tensor.detach()))
    return tensors


@dataclass(frozen=True)
class _TensorRead:
    """Copies rows of a tensor that is mapped from its file."""

    tensor: Tensor

    def __call__(self, rows: slice) -> Tensor:
        return self.tensor[rows].clone()


def _require_readable(key: str, file: Path) -> None:
    """Raise ValueError for a name that could not be shown: messages, logs and terminals get names as they
    are."""
    if len(key) > LONGEST_NAME or not key.isprintable():
        raise ValueError(
            f"{file}: a tensor is named {ascii(key[:60])}...; no Wan has a name with control characters or"
            f" longer than {LONGEST_NAME}"
        )


def _why_refused(error: Exception) -> str:
    """Return one line that names what a pickle asked for, without the reader's advice to run it anyway."""
    asked = re.search(r"(?i)unsupported global:? (?:GLOBAL )?([\w.]+)", str(error))
    what = f"asks for {asked[1]}" if asked else "is damaged or holds more than tensors"
    return f"refused: this pickle {what}; only a dictionary of tensors is read, and nothing was run"


def _foreign(file: Path) -> str | None:
    """Return what a file really is when its first bytes contradict its name."""
    with file.open("rb") as opened:
        start = opened.read(16)
    is_pickle = start.startswith((b"PK\x03\x04", b"\x80"))
    if file.suffix == ".safetensors":
        if is_pickle:
            return (
                "named .safetensors, but it is a PyTorch pickle; under the name .pth its tensors can be read"
            )
        if start == b"version https://":
            return "a Git LFS pointer, not the weights; fetch them with git lfs pull"
        return "an empty file" if not start else None
    if len(start) > 9 and start[8:9] == b"{" and not is_pickle:
        return f"named {file.suffix}, but it is a safetensors file; give it the name .safetensors"
    return None
