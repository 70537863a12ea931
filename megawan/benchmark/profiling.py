"""Where the time of a step goes: the profiler's self times, matrix products apart from everything else."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = re.compile(
    r"(^|::|_)(mm|addmm|bmm|baddbmm|matmul|linear|mkldnn_linear\w*|convolution\w*|\w*conv\w*)$|attention|gemm|cutlass|fmha|flash|cudnn",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SelfTimes:
    """Seconds of one step."""

    products: float
    """Matrix products, attention among them."""
    rest: float
    longest: tuple[tuple[str, float], ...]
    """The operations of the rest that took most, longest first."""


def self_times(step: Callable[[], object], device: torch.device, repetitions: int = 3) -> SelfTimes:
    """Return the self times of the fastest of `repetitions` steps: on GPUs of the kernels, on CPUs of the
    operators (a compiled region is one operator)."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    found = []
    for _ in range(repetitions):
        with profile(activities=activities) as record:
            step()
            if cuda:
                torch.cuda.synchronize(device)
        products, rest = 0.0, dict[str, float]()
        for event in record.key_averages():
            seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            if PRODUCTS.search(event.key):
                products += seconds
            elif seconds > 0:
                rest[event.key] = rest.get(event.key, 0.0) + seconds
        longest = sorted(rest.items(), key=lambda item: -item[1])[:8]
        found.append(SelfTimes(products, sum(rest.values()), tuple(longest)))
    return min(found, key=lambda times: times.products + times.rest)
