"""The plan's memory against a GPU's: a few real steps on one device, both numbers side by side."""

import time
from collections.abc import Iterator

import torch

from megawan import config, dist, planning
from megawan.hardware import GPUS
from megawan.metrics import LossMeter
from megawan.plan import make_plan, open_start
from megawan.sizes import GIB

STEPS = 3
PROG = "tools/plan.py"


def check(variant: str, frames: int, height: int, width: int, recompute: str | None = None) -> Iterator[str]:
    """Yield lines: what the plan of this clip on one GPU says, and what training it for three steps took.

    Random weights, synthetic latents; nothing is written. Raises ValueError where there is no CUDA device, in
    a world of more ranks, for a size that is not legal, and where nothing fits.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--check trains on a CUDA device and this machine shows none; run it on a GPU machine, or leave"
            " --check out for the plan alone"
        )
    place = dist.environment()
    if place.world_size != 1:
        raise ValueError(f"--check is for one rank, and this world has {place.world_size}")
    device = dist.pick_device(place.local_rank)
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    # Which GPU it is decides about time only, which is not compared here.
    question = planning.ask(variant, frames, height, width, 1, GPUS["h100"], gpu_memory_gib=total)
    found = [row for row in planning.rows(question) if recompute in (None, row.recompute)]
    row = planning.pick(found)
    if row is None:
        least = min(found, key=lambda each: each.memory.total, default=None)
        raise ValueError(
            f"--recompute {recompute} is not planned; legal: none, selective, attention, full"
            if least is None
            else f"nothing fits {total:.3g} GiB: the least is {least.memory.total / GIB:.3g} GiB"
        )
    words = [*planning.flags(question, row), "--steps", str(STEPS)]
    plan = make_plan(config.parse(words, prog=PROG, description=""), place)
    yield f"{torch.cuda.get_device_name(device)}: {' '.join(words)}"
    dist.initialize(place, device, plan.config.dist_timeout)

    from megawan.trainer import Trainer  # imports DeepSpeed

    trainer = Trainer(plan, device)
    trainer.start(open_start(plan.config, plan.variant), lambda: None)
    meter, batches = LossMeter(device), trainer.batches(0)
    for step in range(STEPS):
        torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        trainer.step([batch.to(device) for batch in next(batches)], meter)
        torch.cuda.synchronize(device)
        yield f"step {step + 1}: {time.perf_counter() - began:.2f} s"
    measured = {
        "peak allocated": (row.memory.total, torch.cuda.max_memory_allocated(device)),
        "states between steps": (
            row.memory.states + row.memory.buckets,
            torch.cuda.memory_allocated(device),
        ),
    }
    for name, (planned, counted) in measured.items():
        yield (
            f"{name}: planned {planned / GIB:.3f} GiB, counted {counted / GIB:.3f} GiB"
            f" ({planned / counted - 1:+.1%})"
        )
    yield f"peak reserved: {torch.cuda.max_memory_reserved(device) / GIB:.3f} GiB of {total:.3f}"
    yield f"model time predicted on an H100: {row.fast.total:.3g} to {row.slow.total:.3g} s a step"
    dist.shutdown()
