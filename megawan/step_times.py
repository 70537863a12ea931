"""Where the time of a step goes: seconds of each part, without making the device wait while it works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BESIDE = ("validation", "samples", "profile")
"""Parts that look at the training: no part of its speed."""


class StepTimes:
    """Seconds since the last reading, by part. On a GPU a part is timed by events in the stream: the time its
    kernels took, not the time it took to ask for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last = time.perf_counter()

    @contextmanager
    def host(self, part: str) -> Iterator[None]:
        """Count what happens inside as seconds of this process: reading, waiting for files or for ranks."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    @contextmanager
    def device(self, part: str) -> Iterator[None]:
        """Count what happens inside as seconds of the device."""
        if not self._on_gpu:
            with self.host(part):
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((part, start, end))

    def read(self) -> tuple[float, dict[str, float]]:
        """Return (seconds since the last reading, seconds of each part that had any) and start anew.

        Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for part, start, end in self._events:
            self._seconds[part] = self._seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
        now = time.perf_counter()
        elapsed, parts = now - self._last, self._seconds
        self._last, self._seconds, self._events = now, {}, []
        return elapsed, parts
