"""What each rank does in the tests of encoding while training; started by tests/distributed.py."""

from typing import Any

import torch

from megawan import config, dist
from megawan.metrics import LossMeter
from megawan.models.initial import InitialWeights
from megawan.plan import make_plan


def train(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Train every case (name → flags) in this one group; return its losses, gradient norms and samples."""
    from megawan.trainer import Trainer

    place = dist.environment()
    device = torch.device("cpu")
    plans = {
        name: make_plan(config.parse(argv, prog="train.py", description=""), place)
        for name, argv in cases.items()
    }
    dist.initialize(place, device, 120)
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        trainer = Trainer(plan, device)
        trainer.start(InitialWeights(plan.variant.config, 3), lambda: None)
        meter = LossMeter(device)
        results[name] = {"losses": [], "grad_norms": [], "samples": [], "data": plan.data.fingerprint}
        batches = trainer.batches(0)
        for _ in range(plan.steps):
            micro_batches = next(batches)
            trainer.step(micro_batches, meter)
            results[name]["losses"].append(meter.read()[0])
            results[name]["grad_norms"].append(trainer.grad_norm)
            results[name]["samples"] += [batch.sample_ids.tolist() for batch in micro_batches]
        del batches  # ends its reading processes, and waits for the index of a store that is full
        trainer.engine.destroy()
    dist.shutdown()
    return results
