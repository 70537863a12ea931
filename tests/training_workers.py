"""What each rank does in the training tests; started by tests/distributed.py."""

from pathlib import Path
from typing import Any

import torch

from megawan import checkpoint, dist
from megawan.metrics import LossMeter
from megawan.models.attention import select_attention
from megawan.models.wan import LEAF_MODULES, WanModel
from megawan.parallel.context import ContextParallel
from megawan.train import make_batches, train_step
from tests.training import lively, plan_of


def train_cases(cases: dict[str, dict[str, Any]], output: str) -> dict[str, Any]:
    """Train every case (name → flags) in this one group; return losses and gradient norms, and save its
    state."""
    from megawan import engine as engines

    place = dist.environment()
    device = torch.device("cpu")
    dist.initialize(place, device, 120)
    results: dict[str, Any] = {}
    contexts: dict[Any, ContextParallel] = {}
    for name, case in cases.items():
        plan = plan_of(place.world_size, *case["argv"])
        if plan.topology not in contexts:
            contexts[plan.topology] = ContextParallel.create(plan.topology, place.rank, 120)
        context = contexts[plan.topology]
        kernel = select_attention("auto", "cpu", torch.float32, head_dim=24, need_lse=plan.need_lse)
        model = engines.build_model(
            lambda plan=plan, kernel=kernel: WanModel(
                plan.variant.config, attention=kernel, recompute=plan.recompute, offload=plan.offload
            ),
            plan.deepspeed,
            device,
        )
        engine = engines.initialize(model, LEAF_MODULES, plan.deepspeed, plan.config.optim, plan.steps)
        start = 0
        if case.get("resume"):
            saved = checkpoint.StepWeights(Path(case["resume"]))
            engines.load_weights(engine, saved, _nothing)
            engines.load_optimizer(engine, saved, _nothing)
            start = saved.step
        else:
            engines.load_weights(engine, lively(plan), _nothing)
        batches = make_batches(plan, start)
        meter = LossMeter(device)
        losses, norms = [], []
        for _ in range(start, case.get("stop", plan.steps)):
            train_step(engine, engines, plan, context, next(batches), meter)
            losses.append(meter.read()[0])
            norms.append(engines.grad_norm(engine))
        folder = checkpoint.save(
            Path(output) / name,
            case.get("stop", plan.steps),
            engines.fragments(engine),
            {"variant": "debug"},
            0,
        )
        results[name] = {"losses": losses, "grad_norms": norms, "folder": str(folder), "start": start}
        engine.destroy()
    dist.shutdown()
    return results


def _nothing() -> None:
    pass
