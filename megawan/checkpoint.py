"""Checkpoints on disk: what a step folder holds, which one a run continues from, and reading them.

megawan/saving.py writes them. A step folder holds one safetensors file a rank (no executable code) with that
rank's fragments of the fp32 masters, of Adam's moments and of the moving average if there is one, each with
its place in the whole parameter, and a manifest with every file's size and sha256. Any world size, ZeRO
stage or layout reads what any other wrote.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
import torch.distributed as torch_dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megawan import dist
from megawan.changes import UNSAFE
from megawan.files import sha256

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
Weights = Literal["master", "ema"]
FORMAT = "megawan-checkpoint"
VERSION = 1
_STEP_FOLDER = re.compile(r"step_(\d{7,})")
UNFINISHED = re.compile(_STEP_FOLDER.pattern + r"(\.replaced)?\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CheckpointOptions:
    """Saving and resuming."""

    save_every: int = 500
    """Save after every so many optimizer steps, and after the last one; 0 saves only after the last."""
    save_minutes: float = 0.0
    """Save also when so many minutes have passed since the last save; 0 does not look at the clock."""
    background: bool = True
    """Copy the states to host memory (12 bytes a parameter, over all ranks) and write them while training
    goes on; without it training waits for the disk."""
    keep_last: int = 2
    """How many checkpoints stay: the one just saved and those before it. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay for good; 0 keeps none beyond keep_last."""
    resume: str = "auto"
    """auto: continue from the newest sound checkpoint of --output, else start; must: fail if there is none;
    none: start, and refuse a folder that has checkpoints; or the path of a step folder, or of a run folder,
    whose newest sound checkpoint is taken."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that wrote the checkpoint, of: data, global_batch, seed, flow, ema."""


@dataclass(frozen=True)
class Fragment:
    """A flat fp32 piece of one parameter's `kind` ("master" or a moment): elements start .. start +
    len(values)."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


class DamagedCheckpoint(ValueError):
    """A step folder that is incomplete or whose bytes are not those that were written."""


def check(options: CheckpointOptions) -> None:
    """Raise ValueError for negative counts and times."""
    for name in ("save_every", "save_minutes", "keep_last", "keep_every"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--checkpoint.{name} {getattr(options, name)} must be 0 or more")
    for name in options.allow_changes:
        if name not in UNSAFE:
            raise ValueError(f"--checkpoint.allow_changes {name!r} is none of {', '.join(UNSAFE)}")


def step_folders(root: Path) -> list[Path]:
    """Return the committed step folders under `root`, newest first; temporary and foreign names are not
    counted."""
    found = [path for path in root.glob("step_*") if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def choose(root: Path, resume: str, contents: bool = True) -> Path | None:
    """Return the step folder to continue from, the same on all ranks, or None to start anew; `contents` as
    in `verify`.

    Raises ValueError when `resume` forbids what was found: "must" without a sound checkpoint, "none" with
    one, or a path that is damaged. "auto" skips damaged folders, saying so, but refuses to start anew where
    only damaged ones are left: that would silently lose the run.
    """
    folders = _shared_step_folders(root)
    if resume == "none":
        if folders:
            raise ValueError(
                f"--resume none, but {root} holds checkpoints; choose another --output or --resume auto"
            )
        return None
    if resume not in ("auto", "must"):
        chosen = _at(Path(resume), contents)
        if folders and chosen.resolve() in [folder.resolve() for folder in folders[1:]]:
            dist.say(f"resume: --resume auto would take the newer {folders[0]}; move it away to leave it")
        return chosen
    if folders:
        return _newest_sound(root, folders, contents)
    if resume == "must":
        raise ValueError(f"--resume must: no checkpoint under {root}")
    return None


def _at(path: Path, contents: bool) -> Path:
    """Return the step folder that a person names by itself or by its run folder, verified."""
    inside = _shared_step_folders(path / "checkpoints") or _shared_step_folders(path)
    if inside:
        return _newest_sound(path, inside, contents)
    problem = "" if path.is_dir() else "no such folder"
    if not problem and not _STEP_FOLDER.fullmatch(path.name) and not (path / "manifest.json").exists():
        problem = "no checkpoint of a run; weights to start from are for --model.init_from"
    if not (dist.all_succeeded(not problem) if torch_dist.is_initialized() else not problem):
        problem = problem or "another rank sees no checkpoint there"
        raise ValueError(
            f"--resume {path}: {problem}; legal: auto, must, none, a step folder or a run folder"
        )
    verify(path, contents)
    return path


def _newest_sound(root: Path, folders: Sequence[Path], contents: bool) -> Path:
    """Return the first of these folders that verifies; raises ValueError when none does."""
    for folder in folders:
        try:
            verify(folder, contents)
            return folder
        except DamagedCheckpoint as error:
            dist.say(f"resume: skipped {error}")
    raise ValueError(f"every checkpoint under {root} is damaged; move them away to start anew")


def verify(folder: Path, contents: bool = True) -> dict[str, Any]:
    """Return the manifest of a step folder after checking it, every file's size and sha256, the work split
    over ranks, and that the files together hold every parameter once. Without `contents` only headers are
    read, no sha256 is compared.

    Raises DamagedCheckpoint, on every rank alike, naming the first file that is missing or differs.
    """
    parallel = torch_dist.is_initialized()
    rank, world = (torch_dist.get_rank(), torch_dist.get_world_size()) if parallel else (0, 1)
    manifest: dict[str, Any] = {}
    problem = ""
    try:
        manifest = read_manifest(folder)
        for name, entry in sorted(manifest["files"].items())[rank::world]:
            _verify_file(folder / name, entry, contents)
        StepWeights(folder)
    except DamagedCheckpoint as error:
        problem = str(error)
    if parallel and not dist.all_succeeded(not problem):
        problem = problem or f"{folder}: a file that another rank checked is missing or changed"
    if problem:
        raise DamagedCheckpoint(problem)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the parsed manifest: its step, world size and files are what `save` writes, the rest is
    unchecked.

    Raises DamagedCheckpoint when it is absent, not JSON or says anything else.
    """
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{file}: {error}") from None
    except RecursionError:
        raise DamagedCheckpoint(f"{file}: nested too deeply") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") != VERSION
    ):
        raise DamagedCheckpoint(f"{file}: not a {FORMAT} of version {VERSION}")
    step, world, files = (manifest.get(name) for name in ("step", "world_size", "files"))
    if not _is_count(step) or not _is_count(world) or not isinstance(files, dict):
        raise DamagedCheckpoint(f"{file}: step, world_size and files are not two numbers and a table")
    # Names are compared, never followed: one that leaves the folder is not one that `save` writes.
    if not files or len(files) != world or any(rank_file(rank) not in files for rank in range(len(files))):
        raise DamagedCheckpoint(f"{file}: files are not those of {world} ranks")
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and _is_count(entry.get("bytes"))
            and isinstance(entry.get("sha256"), str)
            and _SHA256.fullmatch(entry["sha256"])
        ):
            raise DamagedCheckpoint(f"{file}: {name} has no legal bytes and sha256")
    return manifest


class StepWeights:
    """The tensors of one step folder, whole or in part, read lazily; a TensorSource of the fp32 masters, or
    of their moving average."""

    def __init__(self, folder: Path, weights: Weights = "master") -> None:
        """Raises DamagedCheckpoint; ValueError when an average is wanted and none was kept."""
        self.folder = folder
        self._weights = weights
        self.manifest = read_manifest(folder)
        self.step = int(self.manifest["step"])
        skipped = self.manifest.get("skipped_steps", 0)
        self.skipped_steps: int = skipped if _is_count(skipped) and skipped <= self.step else 0
        self._places: dict[tuple[str, str], list[tuple[int, int, Path]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[Path, Any] = {}
        for name in sorted(self.manifest["files"]):
            self._index(folder / name)
        self._require_whole()
        if weights == EMA and not self.has_ema:
            raise ValueError(f"{folder} keeps no moving average; it was trained without --ema.decay")

    def require(self, shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
        """Raise ValueError naming the first parameter that is not as in `shapes`, those of `whose`."""
        for name in sorted(shapes.keys() | self._shapes.keys()):
            if shapes.get(name) != self._shapes.get(name):
                raise ValueError(
                    f"{self.folder}: {name} is {self._shapes.get(name)}, {whose} has {shapes.get(name)}"
                )

    def _opened(self, file: Path) -> Any:
        # Headers are parsed once a file, not once a tensor; the bytes are mapped, not read.
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt").__enter__()
        return self._handles[file]

    def _index(self, file: Path) -> None:
        """Add the fragments of one file, each only if the file holds exactly what its table says."""
        try:
            opened = self._opened(file)
            table = json.loads((opened.metadata() or {}).get("fragments", "null"))
            held = set(opened.keys())
        except (OSError, SafetensorError, ValueError) as error:
            raise DamagedCheckpoint(f"{file}: {error}") from None
        except RecursionError:
            raise DamagedCheckpoint(f"{file}: nested too deeply") from None
        if not isinstance(table, dict) or table.keys() != held:
            raise DamagedCheckpoint(f"{file}: its table of fragments does not list its tensors")
        for tensor_name, entry in table.items():
            kind, _, name = tensor_name.partition("/")
            if kind not in ("master", *MOMENTS, EMA) or not name or not _is_place(entry):
                raise DamagedCheckpoint(f"{file}: {tensor_name!r} has no legal place in a parameter")
            start, length, shape = entry[0], entry[1], tuple(entry[2])
            tensor = opened.get_slice(tensor_name)
            if tensor.get_dtype() != "F32" or tensor.get_shape() != [length]:
                raise DamagedCheckpoint(f"{file}: {tensor_name!r} is not {length} float32 numbers")
            if self._shapes.setdefault(name, shape) != shape:
                raise DamagedCheckpoint(f"{file}: {tensor_name!r} has another shape than in other files")
            self._places.setdefault((kind, name), []).append((start, length, file))

    def _require_whole(self) -> None:
        """Raise unless the fragments of every parameter's master and moments tile it without gap or
        overlap."""
        self.has_ema = any(kind == EMA for kind, _ in self._places)
        for name, shape in self._shapes.items():
            for kind in ("master", *MOMENTS, *([EMA] if self.has_ema else [])):
                end = 0
                for start, length, file in sorted(self._places.get((kind, name), [])):
                    if start != end and length:
                        what = "twice" if start < end else "nowhere"
                        raise DamagedCheckpoint(
                            f"{file}: element {min(start, end)} of {kind}/{name} is held {what}"
                        )
                    end += length
                if end != math.prod(shape):
                    raise DamagedCheckpoint(
                        f"{self.folder}: {kind}/{name} has {end} of {math.prod(shape)} elements"
                    )

    def keys(self) -> list[str]:
        """Return the parameter names (native Wan keys)."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a parameter's full shape."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return float32: masters are what is stored."""
        return torch.float32

    def load(self, key: str) -> Tensor:
        """Return one whole tensor, float32 on the CPU."""
        shape = self._shapes[key]
        return self.load_range(self._weights, key, 0, torch.Size(shape).numel()).view(shape)

    def load_part(self, key: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of one flattened tensor, float32 on the CPU."""
        return self.load_range(self._weights, key, start, length)

    def load_range(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of a flattened parameter's `kind`, float32 on the CPU.

        Raises ValueError when the parameter has no such elements.
        """
        if name not in self._shapes or not 0 <= start <= start + length <= math.prod(self._shapes[name]):
            raise ValueError(f"{self.folder}: no elements {start} .. {start + length} of {kind}/{name}")
        values = torch.empty(length)
        for piece_start, piece_length, file in self._places.get((kind, name), []):
            low, high = max(start, piece_start), min(start + length, piece_start + piece_length)
            if low < high:
                held = self._opened(file).get_slice(f"{kind}/{name}")
                values[low - start : high - start] = held[low - piece_start : high - piece_start]
        return values


def _shared_step_folders(root: Path) -> list[Path]:
    """Return rank 0's list on every rank: a rank whose file system shows another must not choose another."""
    if not torch_dist.is_initialized():
        return step_folders(root)
    names = dist.share_text("/".join(folder.name for folder in step_folders(root)))
    return [root / name for name in names.split("/") if name]


def _verify_file(file: Path, entry: Mapping[str, Any], contents: bool) -> None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DamagedCheckpoint(f"{file} has {size} bytes, its manifest says {entry['bytes']}")
        if contents and sha256(file) != entry["sha256"]:
            raise DamagedCheckpoint(f"{file} does not have the sha256 of its manifest")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error}") from None


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0  # JSON's true is an int too


def _is_place(entry: Any) -> bool:
    """Return whether this has the form of a fragment's [start, length, shape]."""
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[2], list)
        and all(_is_count(number) for number in (*entry[:2], *entry[2]))
    )


def rank_file(rank: int) -> str:
    """Return the name of a rank's file in a step folder."""
    return f"rank_{rank:05d}.safetensors"


def step_of(folder: Path) -> int:
    """Return the step that a step folder's name says."""
    match: Sequence[str] = _STEP_FOLDER.findall(folder.name)
    return int(match[0])
