"""What each rank does in the tests of encoding while training; started by tests/distributed.py."""

from typing import Any

import torch

from megawan import config, dist
from megawan.metrics import LossMeter
from megawan.models.attention import select_attention
from megawan.models.initial import InitialWeights
from megawan.models.wan import LEAF_MODULES, WanModel
from megawan.parallel.context import ContextParallel
from megawan.plan import make_plan
from megawan.train import make_batches, train_step


def train(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Train every case (name → flags) in this one group; return its losses, gradient norms and samples."""
    from megawan import engine as engines

    place = dist.environment()
    device = torch.device("cpu")
    plans = {
        name: make_plan(config.parse(argv, prog="train.py", description=""), place)
        for name, argv in cases.items()
    }
    dist.initialize(place, device, 120)
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        context = ContextParallel.create(plan.topology, place.rank, 120)
        kernel = select_attention("auto", "cpu", torch.float32, head_dim=24, need_lse=False)
        model = engines.build_model(
            lambda plan=plan, kernel=kernel: WanModel(plan.variant.config, attention=kernel),
            plan.deepspeed,
            device,
        )
        engine = engines.initialize(model, LEAF_MODULES, plan.deepspeed, plan.config.optim, plan.steps)
        engines.load_weights(engine, InitialWeights(plan.variant.config, 3), lambda: None)
        meter = LossMeter(device)
        results[name] = {"losses": [], "grad_norms": [], "samples": [], "data": plan.data.fingerprint}
        batches = make_batches(plan, 0)
        for _ in range(plan.steps):
            micro_batches = next(batches)
            train_step(engine, engines, plan, context, micro_batches, meter)
            results[name]["losses"].append(meter.read()[0])
            results[name]["grad_norms"].append(engines.grad_norm(engine))
            results[name]["samples"] += [batch.sample_ids.tolist() for batch in micro_batches]
        del batches  # ends its reading processes, and waits for the index of a store that is full
        engine.destroy()
    dist.shutdown()
    return results
