"""A look inside steps with torch.profiler: a trace for Perfetto or TensorBoard, and how much of the
communication nothing hides."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from megawan import dist
from megawan.step_times import StepTimes

COMMUNICATION = ("nccl", "gloo:")
"""How the names of the kernels (NCCL) and host operations (gloo) of collectives begin."""

Interval = tuple[int, int]


@dataclass(frozen=True)
class ProfileOptions:
    """torch.profiler on rank 0."""

    steps: str = ""
    """Steps first:stop to record, such as 10:13 for steps 10, 11 and 12; their trace goes to OUTPUT/profile
    (open it in Perfetto or TensorBoard)."""
    memory: bool = False
    """Record allocations too (larger traces)."""
    communication_every: int = 200
    """Optimizer steps between two steps that are recorded only to see how much communication nothing hides
    (perf/exposed_communication); 0: never."""


def window(text: str) -> tuple[int, int]:
    """Return (first, stop) of --profile.steps, (0, 0) for none. Raises ValueError for what is no window."""
    if not text:
        return 0, 0
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
        raise ValueError(
            f"--profile.steps {text} must be FIRST:STOP with 1 <= FIRST < STOP, such as 10:13 for three steps"
        )
    return int(first), int(stop)


def check(options: ProfileOptions) -> None:
    """Raise ValueError for a window or a cadence that is none."""
    window(options.steps)
    if options.communication_every < 0:
        raise ValueError(
            f"--profile.communication_every {options.communication_every} must be 0 (never) or more"
        )


class StepProfiler:
    """Records the steps that were asked for, on rank 0; does nothing on other ranks."""

    def __init__(
        self,
        options: ProfileOptions,
        folder: Path,
        device: torch.device,
        times: StepTimes,
        first_step: int,
    ) -> None:
        """`first_step`: the first one of this process; a window that has begun before it is begun there.
        `times`: where the seconds of starting and of writing a trace are counted, as "profile"."""
        first, self._stop = window(options.steps)
        self._first = max(first, first_step) if first else 0
        self._every = options.communication_every if torch.distributed.get_world_size() > 1 else 0
        self._memory = options.memory
        self._folder = folder
        self._times = times
        self._on_gpu = device.type == "cuda"
        self._running: Any = None
        self._began = 0.0
        self._curves: dict[str, float] = {}

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record the step inside, if it is one of those."""
        if not dist.is_main():
            yield
            return
        wanted = self._first <= step < self._stop
        alone = not wanted and self._running is None and self._every > 0 and step % self._every == 0
        if (wanted or alone) and self._running is None:
            with self._times.host("profile"):
                self._begin(trace=wanted)
        yield
        if self._running is not None and (alone or step + 1 >= self._stop):
            with self._times.host("profile"):
                self._end(trace=not alone)

    def take(self) -> dict[str, float]:
        """Return the points of the steps recorded since the last call, if any."""
        curves, self._curves = self._curves, {}
        return curves

    def close(self) -> None:
        """Write the trace of a window that the run's end cut short."""
        if self._running is not None:
            self._end(trace=True)

    def _begin(self, trace: bool) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        self._running = profile(
            activities=activities, record_shapes=trace, profile_memory=trace and self._memory
        )
        self._running.start()
        self._began = time.perf_counter()

    def _end(self, trace: bool) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._began
        running, self._running = self._running, None
        running.stop()
        # The raw events: building torch's tree of them takes seconds.
        hidden_by, sent = split_events(running.profiler.kineto_results.events(), self._on_gpu)
        self._curves = {"perf/exposed_communication": uncovered(sent, hidden_by) / 1e9 / elapsed}
        if trace:
            try:
                tensorboard_trace_handler(str(self._folder), "rank_00000", use_gzip=True)(running)
            except (OSError, RuntimeError) as error:
                dist.say(f"warning: no profile: {error}")
            else:
                dist.say(f"profile: {self._folder}; open it in https://ui.perfetto.dev or TensorBoard")


def split_events(events: Iterable[Any], on_gpu: bool) -> tuple[list[Interval], list[Interval]]:
    """Return when (nanoseconds) something was computed, and when something was sent.

    On a GPU these are kernels, not what torch and others named there (an optimizer's whole step); on a CPU
    aten operations, beside which gloo's threads send.
    """
    computed, sent = list[Interval](), list[Interval]()
    for event in events:
        span, name = (event.start_ns(), event.end_ns()), event.name()
        if (event.device_type() == torch.autograd.DeviceType.CUDA) != on_gpu:
            continue
        if on_gpu and event.is_user_annotation():
            continue
        if name.startswith(COMMUNICATION):
            sent.append(span)
        elif on_gpu or name.startswith("aten::"):
            computed.append(span)
    return computed, sent


def merged(spans: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as disjoint ones in order."""
    union: list[Interval] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def uncovered(spans: Iterable[Interval], cover: Iterable[Interval]) -> int:
    """Return how long `spans` last in all where no interval of `cover` does."""
    total = sum(end - start for start, end in merged(spans))
    shared, covers = 0, merged(cover)
    at = 0
    for start, end in merged(spans):
        while at < len(covers) and covers[at][1] <= start:
            at += 1
        place = at
        while place < len(covers) and covers[place][0] < end:
            shared += min(end, covers[place][1]) - max(start, covers[place][0])
            place += 1
    return total - shared
