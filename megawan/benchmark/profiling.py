"""Where the time of a step goes: the profiler's self times, matrix products apart from everything else."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megawan.benchmark.timing import rotated

# torch's operators; the kernels of cuBLAS (nvjet on Hopper and later), CUTLASS, cuDNN and flash-attention.
PRODUCTS = re.compile(
    r"(^|::|_)(mm|addmm|bmm|baddbmm|matmul|linear|mkldnn_linear\w*|convolution\w*|\w*conv\w*)$"
    r"|attention|gemm|cutlass|fmha|flash|cudnn|nvjet|xmma",
    re.IGNORECASE,
)
# What torch.compile made between them is named after all operators that it stands for.
FUSED = re.compile(r"^triton_(poi|red|per|for)_")


def is_product(name: str) -> bool:
    """Return whether an operator or a kernel is a matrix product or an attention."""
    return PRODUCTS.search(name) is not None and not FUSED.match(name)


@dataclass(frozen=True)
class SelfTimes:
    """Seconds of one step."""

    products: float
    """Matrix products, attention among them."""
    rest: float
    longest: tuple[tuple[str, float], ...]
    """The operations of the rest that took most, longest first."""


def self_times(step: Callable[[], object], device: torch.device) -> SelfTimes:
    """Return the self times of one step: on GPUs of the kernels, on CPUs of the operators (a compiled region
    is one operator)."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as record:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    return sorted_out(record.key_averages(), cuda)


def sorted_out(events: Iterable[Any], cuda: bool) -> SelfTimes:
    """Return the self times in the profiler's averages; cuda: of the kernels alone, since the operators that
    launched them show their times again."""
    products, rest = 0.0, dict[str, float]()
    for event in events:
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if is_product(event.key):
            products += seconds
        elif seconds > 0:
            rest[event.key] = rest.get(event.key, 0.0) + seconds
    longest = sorted(rest.items(), key=lambda item: -item[1])[:8]
    return SelfTimes(products, sum(rest.values()), tuple(longest))


def rounds_of_self_times(
    steps: Mapping[str, Callable[[], object]], device: torch.device, repetitions: int
) -> dict[str, list[SelfTimes]]:
    """Return of each step its self times in each of the rounds, which run every step once."""
    found: dict[str, list[SelfTimes]] = {name: [] for name in steps}
    for number in range(repetitions):
        for name in rotated(list(steps), number):
            found[name].append(self_times(steps[name], device))
    return found


def fastest_self_times(
    steps: Mapping[str, Callable[[], object]], device: torch.device, repetitions: int = 5
) -> dict[str, SelfTimes]:
    """Return of each step the self times with the least outside products: what a step pays for first touches
    of memory depends on those before it."""
    found = rounds_of_self_times(steps, device, repetitions)
    return {name: min(times, key=lambda one: one.rest) for name, times in found.items()}
