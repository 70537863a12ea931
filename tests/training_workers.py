"""What each rank does in the training tests; started by tests/distributed.py."""

from pathlib import Path
from typing import Any

import torch

from megawan import dist
from megawan.checkpoint import CheckpointOptions, StepWeights
from megawan.metrics import LossMeter
from megawan.parallel.context import ContextParallel
from tests.training import lively, plan_of


def train_cases(cases: dict[str, dict[str, Any]], output: str) -> dict[str, Any]:
    """Train every case (name → flags) in this one group; return losses and gradient norms, and save its
    state."""
    from megawan import saving
    from megawan.looks import hold_out
    from megawan.trainer import Trainer

    place = dist.environment()
    device = torch.device("cpu")
    dist.initialize(place, device, 120)
    results: dict[str, Any] = {}
    contexts: dict[Any, ContextParallel] = {}
    for name, case in cases.items():
        plan = plan_of(place.world_size, *case["argv"])
        trainer = Trainer(plan, device, contexts.get(plan.topology))
        contexts[plan.topology] = trainer.context
        start = 0
        if case.get("resume"):
            saved = StepWeights(Path(case["resume"]))
            trainer.resume(saved, _nothing)
            start = saved.step
        else:
            trainer.start(lively(plan), _nothing)
        batches = trainer.batches(start)
        meter = LossMeter(device)
        losses, norms = [], []
        validation = hold_out(trainer)
        for _ in range(start, case.get("stop", plan.steps)):
            if validation is not None and case.get("look"):
                validation.run(trainer.measure, device)
            trainer.step(next(batches), meter)
            losses.append(meter.read()[0])
            norms.append(trainer.grad_norm)
        folder = saving.save(
            Path(output) / name,
            case.get("stop", plan.steps),
            trainer.fragments(),
            trainer.state(),
            CheckpointOptions(keep_last=0),
        )
        results[name] = {
            "losses": losses,
            "grad_norms": norms,
            "folder": str(folder),
            "start": start,
            "held_out": None if validation is None else validation.run(trainer.measure, device),
        }
        trainer.engine.destroy()
    dist.shutdown()
    return results


def _nothing() -> None:
    pass
