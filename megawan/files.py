"""Files that are whole or absent: every writer here syncs what it wrote before anyone can see its name."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**24
_SYNC_EVERY = 2**26
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write JSON; readers see the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small text file; readers see the old file or the whole new one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        _rename(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file of CPU tensors and return its SHA-256 in hexadecimal; readers see the old file
    or the whole new one.

    Not the library's save_file: that copies every tensor once more before it writes, and its file would have
    to be read again for the digest. Here the bytes go from the tensors to the disk, and are hashed meanwhile.
    """
    # Larger elements first: every tensor lies at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    with open_streaming(aside) as write, ThreadPoolExecutor(max_workers=1) as hashing:
        done = hashing.submit(digest.update, len(text).to_bytes(8, "little") + text)
        write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].contiguous().flatten().view(torch.uint8).numpy().data
            for place in range(0, len(content), _BLOCK):
                # hashlib and write both let other threads run.
                block = content[place : place + _BLOCK]
                done.result()
                done = hashing.submit(digest.update, block)
                write(block)
        done.result()
    _rename(aside, path)
    return digest.hexdigest()


@contextmanager
def open_streaming(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Give a function that appends to a new file; after the block the disk holds it.

    The disk is asked for every 64 MiB while the next are made ready, not for all of them at the end.
    """
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as syncing:
        synced, waiting = syncing.submit(lambda: None), 0

        def write(block: bytes | memoryview) -> None:
            nonlocal synced, waiting
            file.write(block)
            waiting += len(block)
            if waiting >= _SYNC_EVERY and synced.done():
                synced.result()
                synced, waiting = syncing.submit(os.fdatasync, file.fileno()), 0

        yield write
        synced.result()
        file.flush()
        os.fsync(file.fileno())


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
    """Give a file that the disk holds its name."""
    aside.replace(path)
    sync(path.parent)
