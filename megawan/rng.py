"""Randomness as a function of position: the same (seed, place) always gives the same draw.

No generator state is kept anywhere, so nothing of it goes into a checkpoint, and a run that is resumed or
laid out on other ranks draws what the uninterrupted run would have drawn.
"""

import hashlib

import torch


def position_key(seed: int, *position: int | str) -> int:
    """Return a 63-bit integer that depends on `seed` and every element of `position`, and on their order.

    Elements are ints of any size or strings; 1 and "1" differ. Stable across processes, platforms and
    versions (BLAKE2b of a length-prefixed text form), unlike Python's `hash`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for element in (seed, *position):
        text = f"{type(element).__name__}:{element}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator_at(seed: int, *position: int | str) -> torch.Generator:
    """Return a fresh CPU generator for this place; draws on CPU are the same on every kind of device."""
    return torch.Generator().manual_seed(position_key(seed, *position))
