"""What the ranks of the grid compute: every case compared with one rank; figures for the test to judge."""

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from megawan import dist
from megawan.parity import Bench, Problem, compare, layouts


def bench(timeout_s: float = 120) -> Bench:
    """Return this rank's bench, in the gloo world that it joins."""
    place = dist.environment()
    device = torch.device("cpu")
    dist.initialize(place, device, timeout_s)
    return Bench(place.world_size, place.rank, device, timeout_s)


def plain_grid(problems: list[list[Any]], policies: list[str]) -> dict[str, Any]:
    """Return the differences of every layout of every problem (task, heads, grid), float64."""
    here, rows = bench(), list[dict[str, Any]]()
    began = time.monotonic()
    for task, heads, grid in problems:
        problem = Problem(task, heads, tuple(grid))
        wanted = here.reference(problem, torch.float64)
        alive = min(float(value.abs().max()) for value in wanted.gradients.values())
        for layout in layouts(here.world_size, heads, policies):
            found = here.plain(problem, layout, torch.float64)
            name = f"{problem.describe()} {layout.describe(here.world_size)}"
            difference = asdict(compare(found, wanted))
            rows.append({"case": name, "alive": alive, "norms": wanted.grad_norms, **difference})
    dist.shutdown()
    return {"rows": rows, "seconds": time.monotonic() - began}


def engine_grid(problems: list[list[Any]], policies: list[str], stages: list[int]) -> dict[str, Any]:
    """Return the differences of every layout of every problem at every ZeRO stage, float32.

    The recompute policies take turns, so that each meets every stage.
    """
    here, rows = bench(), list[dict[str, Any]]()
    began = time.monotonic()
    for task, heads, grid in problems:
        problem = Problem(task, heads, tuple(grid))
        wanted = here.reference(problem, torch.float32)
        for stage in stages:
            for index, split in enumerate(layouts(here.world_size, heads, policies[:1])):
                layout = replace(split, recompute=policies[(index + stage) % len(policies)])
                found = here.sharded(problem, layout, stage)
                name = f"zero {stage} {problem.describe()} {layout.describe(here.world_size)}"
                rows.append({"case": name, "stage": stage, **asdict(compare(found, wanted))})
    dist.shutdown()
    return {"rows": rows, "seconds": time.monotonic() - began}
