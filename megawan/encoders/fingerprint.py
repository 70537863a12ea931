"""A short name for the exact weights of an encoder, so that latents of two encoders are never mixed."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(kind: str, tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """Return `kind`-<16 hex digits>: equal for equal settings and tensors (name, dtype, shape, bytes).

    Independent of the order of `tensors` and of the device they are on. Reads every byte: for UMT5-XXL some
    seconds.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{kind}\n{settings}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{kind}-{digest.hexdigest()}"
