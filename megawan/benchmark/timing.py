"""Interleaved timing: every round runs every arm once, and ratios are taken within a round.

What else the machine does then meets all arms alike, and a ratio of two arms is worth more than their
seconds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return those of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    warm_up: int,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
    at_least: float = 0.0,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each of `repetitions` rounds, after `warm_up` rounds that are not
    counted.

    Each round begins with another arm, so that none is always the first. `tick` is called after each round.
    at_least: seconds for which a round repeats each call, and takes the mean: on a GPU the rate of a single
    call of milliseconds depended on the call before it, as at a power limit.
    """
    names, seconds = list(calls), {name: list[float]() for name in calls}
    for number in range(warm_up + repetitions):
        for name in rotated(names, number):
            _wait(device)
            began, passed, times = time.perf_counter(), 0.0, 0
            while times == 0 or passed < at_least:
                calls[name]()
                _wait(device)
                passed, times = time.perf_counter() - began, times + 1
            if number >= warm_up:
                seconds[name].append(passed / times)
        tick()
    return seconds


def rotated(names: list[str], number: int) -> list[str]:
    """Return the names in the order of a round: each round begins with another one."""
    start = number % len(names)
    return names[start:] + names[:start]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the spread of ours / theirs over the rounds."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
