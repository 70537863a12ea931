"""What each rank does in the tests of videos sampled on the way; started by tests/distributed.py."""

from pathlib import Path
from typing import Any

import torch

from megawan import dist, saving
from megawan.checkpoint import CheckpointOptions, StepWeights
from megawan.metrics import LossMeter
from megawan.parallel.context import ContextParallel
from tests.training import lively, plan_of


def cases(cases: dict[str, list[str]], output: str) -> dict[str, Any]:
    """Train each case twice for three steps, looking at weights and average after the second step or not."""
    from megawan.looks import choose_previews, hold_out
    from megawan.trainer import Trainer

    place, device = dist.environment(), torch.device("cpu")
    dist.initialize(place, device, 120)
    results: dict[str, Any] = {}
    contexts: dict[Any, ContextParallel] = {}
    for name, argv in cases.items():
        seen: dict[str, Any] = {}
        for look in (True, False):
            plan = plan_of(place.world_size, *argv)
            trainer = Trainer(plan, device, contexts.get(plan.topology))
            contexts[plan.topology] = trainer.context
            trainer.start(lively(plan), _nothing)
            validation, previews = hold_out(trainer), choose_previews(trainer)
            assert validation is not None and previews is not None
            batches, meter = trainer.batches(0), LossMeter(device)
            for step in range(1, 4):
                trainer.step(next(batches), meter)
                if look and step == 2:
                    seen["samples"] = [one.tolist() for one in previews.sample(trainer.velocity, device)]
                    with trainer.averaged():
                        seen["averaged"] = validation.run(trainer.measure, device)
                    seen["weights"] = validation.run(trainer.measure, device)
                    folder = _save(Path(output) / name / "two", 2, trainer)
            seen["looked" if look else "not looked"] = _save(Path(output) / name / f"{look}", 3, trainer)
            trainer.engine.destroy()
        trainer = Trainer(plan, device, contexts[plan.topology])
        trainer.start(StepWeights(Path(folder), "ema"), _nothing)
        validation = hold_out(trainer)
        assert validation is not None
        seen["as exported"] = validation.run(trainer.measure, device)
        trainer.engine.destroy()
        results[name] = seen
    dist.shutdown()
    return results


def _save(folder: Path, step: int, trainer: Any) -> str:
    return str(
        saving.save(folder, step, trainer.fragments(), trainer.state(), CheckpointOptions(keep_last=0))
    )


def _nothing() -> None:
    pass
