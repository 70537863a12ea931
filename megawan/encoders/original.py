"""Weight files of the original Wan repositories: named tensors, read without running what is in them."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PICKLES = (".pth", ".pt")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth or .pt by name, mapped from the file where it allows that.

    DiffSynth's wrapping (a `model_state` entry, a `model.` prefix) is taken off. Raises ValueError for any
    other file, for one that holds more than named tensors (nothing in it is run), and for a broken one.
    """
    if path.suffix == ".safetensors":
        found: Any = load_file(path)
    elif path.suffix in PICKLES:
        found = _unpickle(path)
    else:
        raise ValueError(f"a weight file ends in .safetensors, {' or '.join(PICKLES)}")
    if isinstance(found, dict) and isinstance(found.get("model_state"), dict):
        found = found["model_state"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("the file does not hold named tensors")
    return {str(key).removeprefix("model."): value for key, value in found.items()}


def require_complete(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ValueError when tensors are missing or left over, naming the first."""
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors, first {missing[0]}")
    if unexpected:
        raise ValueError(f"it holds {len(unexpected)} tensors too many, first {unexpected[0]}")


def load_renamed(model: Any, tensors: dict[str, Tensor]) -> None:
    """Fill `model`, built on the meta device, with exactly `tensors`.

    Raises ValueError naming the first tensor that is missing or left over, RuntimeError for one of another
    shape.
    """
    wanted = set(model.state_dict())
    require_complete(sorted(wanted - set(tensors)), sorted(set(tensors) - wanted))
    model.load_state_dict(tensors, assign=True)


def _unpickle(path: Path) -> Any:
    try:
        # Mapped: of CLIP's file the larger half is never looked at, and UMT5's 11 GB are not held twice.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever a broken file leads it to
        raise ValueError("it is no file of torch.save, or holds more than tensors") from error
