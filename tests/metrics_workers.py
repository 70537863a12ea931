"""What each rank does in the tests of the meters; started by tests/distributed.py."""

from pathlib import Path
from typing import Any

import torch

from megawan import dist
from megawan.metrics import LossMeter, MetricsOptions, RunLog

MicroBatch = tuple[float, list[float], list[float]]
Reading = tuple[float, dict[int, float], dict[int, float], dict[int, float]]

# (loss, mse of each sample, sigma of each sample): exact in float32; both ends, and bins of one rank.
MICRO_BATCHES: tuple[tuple[MicroBatch, ...], ...] = (
    ((1.5, [1.0, 2.0], [0.0, 0.9375]), (0.25, [8.0, 4.0, 0.125], [1.0, 0.3125, 0.375])),
    ((3.0, [16.0, 32.0], [0.375, 0.5625]), (7.0, [64.0, 0.5], [0.984375, 0.015625])),
)


def scalars(step: int) -> dict[str, float]:
    """Return the curves' points of a step."""
    names = ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s")
    return {name: step + place / 8 for place, name in enumerate(names)}


def weights(sigma: list[float]) -> list[float]:
    """Return a weight for each sample."""
    return [2.0 + each for each in sigma]


def datasets(mse: list[float]) -> list[int]:
    """Return which of three datasets each sample is of; none is of the second."""
    return [0 if each < 5 else 2 for each in mse]


def readings(batches: tuple[MicroBatch, ...]) -> list[Reading]:
    """Return two readings of one meter: after all the batches, and after the first of them again."""
    meter, found = LossMeter(torch.device("cpu"), datasets=3), []
    for given in (batches, batches[:1]):
        for loss, per_sample, sigma in given:
            meter.add(
                torch.tensor(loss, requires_grad=True),
                torch.tensor(per_sample),
                torch.tensor(sigma),
                torch.tensor(weights(sigma)),
                torch.tensor(datasets(per_sample)),
            )
        found.append(tuple(meter.read()))
    return found


def cases(folder: str) -> dict[str, Any]:
    """Meter and log on this rank."""
    place = dist.environment()
    dist.initialize(place, torch.device("cpu"), 60)
    seen: dict[str, Any] = {"meter": readings(MICRO_BATCHES[place.rank])}
    log = RunLog(Path(folder) / f"log {place.rank}", MetricsOptions(), 0, 4)
    log.text("config", "text", 0)
    log.step(1, scalars(1), 0.5)
    log.close()
    dist.shutdown()
    return seen
