"""What each rank does in the test of the health check."""

from dataclasses import asdict
from typing import Any

import torch

from megawan import dist, health


def look() -> dict[str, Any]:
    """Return what is found on this world."""
    dist.initialize(dist.environment(), torch.device("cpu"), 60)
    found = health.examine(torch.device("cpu"))
    dist.shutdown()
    return asdict(found)
