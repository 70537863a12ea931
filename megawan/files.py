"""Files that are whole or absent: every writer here syncs what it wrote before anyone can see its name."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write JSON; readers see the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small text file; readers see the old file or the whole new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    _rename(aside, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; readers see the old file or the whole new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.touch()
    mode = aside.stat().st_mode  # the umask's; safetensors would leave a file that only its owner can read
    save_file(dict(tensors), aside, metadata=dict(metadata))
    aside.chmod(mode)
    _rename(aside, path)


def sync(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:  # hashlib.file_digest needs Python 3.11
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _rename(aside: Path, path: Path) -> None:
    sync(aside)
    aside.replace(path)
    sync(path.parent)
