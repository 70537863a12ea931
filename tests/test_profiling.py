"""Looking inside steps: windows, and time that is sent and not hidden."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

from megawan.profiling import ProfileOptions, StepProfiler, check, split_events, uncovered, window
from megawan.step_times import StepTimes
from tests.dist_workers import world_of_one

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda one: (one[0], sum(one))), max_size=8
)


@given(SPANS, SPANS)
def test_uncovered_time_is_counted_tick_by_tick(
    spans: list[tuple[int, int]], cover: list[tuple[int, int]]
) -> None:
    def ticks(some: list[tuple[int, int]]) -> set[int]:
        return {tick for start, end in some for tick in range(start, end)}

    assert uncovered(spans, cover) == len(ticks(spans) - ticks(cover))


@dataclass
class Event:
    """An event of torch's raw record of a step."""

    called: str
    span: tuple[int, int]
    device: DeviceType = DeviceType.CUDA
    annotation: bool = False

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.span[0]

    def end_ns(self) -> int:
        return self.span[1]

    def device_type(self) -> DeviceType:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_a_gpu_computes_and_sends_in_kernels_alone() -> None:
    """A name over a whole optimizer step, gaps and waiting included, would hide all communication in it."""
    events = [
        Event("nvjet_tst_128x256", (0, 4)),
        Event("ncclDevKernel_AllGather_RING_LL", (2, 9)),
        Event("Optimizer.step#AdamW.step", (0, 20), annotation=True),
        Event("nccl:_all_gather_base", (1, 30), annotation=True),
        Event("aten::mm", (0, 50), DeviceType.CPU),
    ]
    assert split_events(events, on_gpu=True) == ([(0, 4)], [(2, 9)])


@pytest.mark.parametrize("text", ["3", "3:", ":5", "5:3", "3:3", "0:4", "-1:4", "a:b", "1:2:3", "1.5:3"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--profile.steps .* must be FIRST:STOP"):
        check(ProfileOptions(steps=text))


def test_a_cadence_below_0_is_refused() -> None:
    assert window("10:13") == (10, 13) and window("") == (0, 0)
    with pytest.raises(ValueError, match="communication_every -1"):
        check(ProfileOptions(communication_every=-1))


@pytest.mark.parametrize(
    ("first_step", "last_step", "recorded"), [(1, 9, [3, 4]), (4, 9, [4]), (1, 3, [3]), (6, 9, [])]
)
def test_the_window_is_written_whole_or_as_far_as_the_run_came(
    first_step: int, last_step: int, recorded: list[int], tmp_path: Path
) -> None:
    with world_of_one():
        profiler = StepProfiler(
            ProfileOptions(steps="3:5"),
            tmp_path,
            torch.device("cpu"),
            StepTimes(torch.device("cpu")),
            first_step,
        )
        for step in range(first_step, last_step + 1):
            with profiler.around(step), torch.profiler.record_function(f"step {step}"):
                torch.ones(8).sum()
        profiler.close()
    traces = list(tmp_path.glob("*.pt.trace.json.gz"))
    assert len(traces) == bool(recorded)
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert sorted({event["name"] for event in events if "step " in event.get("name", "")}) == [
            f"step {step}" for step in recorded
        ]
    assert profiler.take().keys() == ({"perf/exposed_communication"} if recorded else set())
    assert profiler.take() == {}
