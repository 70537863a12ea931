"""What each rank does in the tests of dist, started by tests/distributed.py; and a world of one rank."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from megawan import dist

TEXTS = ("", "plain", "/data/影片/ü ✓", "a" * 4095 + "é" * 9000, "ends in zeros\0\0", "/bad\udcff/name")


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """Give a gloo group of this process alone, and leave neither group nor variables behind."""
    with mock.patch.dict(os.environ):
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        dist.initialize(dist.environment(), torch.device("cpu"), 30)
        try:
            yield
        finally:
            dist.shutdown()


def agreement(what: str, text: str) -> str:
    """Return what the error says, or nothing."""
    try:
        dist.require_agreement(what, text)
    except RuntimeError as error:
        return str(error)
    return ""


def cases() -> dict[str, Any]:
    """Run every case in one group; return what this rank saw."""
    place = dist.environment()
    rank = place.rank
    dist.initialize(place, torch.device("cpu"), 60)
    seen: dict[str, Any] = {"place": [place.rank, place.local_rank, place.world_size, place.local_world_size]}
    seen["main"] = dist.is_main()
    seen["shared"] = [dist.share_text(text if rank == 0 else "another") == text for text in TEXTS]

    seen["agree"] = agreement("weather", "sunny ü \udcff")
    seen["disagree"] = agreement("weather", f"autumn\nsunny on {rank}\nwindy")
    seen["succeeded"] = [dist.all_succeeded(ok) for ok in (True, rank == 0, rank == 1, False)]

    value = torch.tensor([[1.0, float(rank)], [4.0, 10.0 * rank]], dtype=torch.float64)
    kept = value.clone()
    mean = dist.mean_over_ranks(value)
    seen["mean"] = [mean.tolist(), str(mean.dtype), torch.equal(value, kept)]

    dist.shutdown()
    seen["left"] = torch.distributed.is_initialized()
    return seen
