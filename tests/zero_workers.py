"""What each rank does in the tests of ZeRO's bytes; started by tests/distributed.py."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megawan import dist, ds_config, optim
from megawan.models.initial import InitialWeights
from megawan.models.variants import get_variant
from megawan.models.wan import LEAF_MODULES, WanModel


def counting(name: str, call: Any, sent: Counter[str]) -> Any:
    """Return `call`, adding the bytes of its larger tensor that travel: all but this rank's own part, and
    twice that where the result is on every rank. Single numbers (norms, overflow) are left out."""
    ways = 2 if name == "all_reduce" else 1

    def counted(*given: Any, **named: Any) -> Any:
        world = torch.distributed.get_world_size()
        tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
        larger = max(tensors, key=torch.Tensor.numel)
        if larger.numel() > 8:
            sent[name] += ways * larger.numel() * larger.element_size() * (world - 1) // world
        return call(*given, **named)

    return counted


def states(engine: Any, model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the tensors that DeepSpeed holds between backward pass and step."""
    stage, inner = engine.zero_optimization_stage(), engine.optimizer
    parameters = list(model.parameters())
    if stage == 0:
        return {
            "weights": parameters,
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimizer": moments(inner),
        }
    if stage == 3:
        return {
            "weights": [parameter.ds_tensor for parameter in parameters],
            "gradients": list(inner._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()),
            "optimizer": [
                *inner.fp32_partitioned_groups_flat,
                *(flat.grad for flat in inner.fp32_partitioned_groups_flat if flat.grad is not None),
                *moments(inner.optimizer),
            ],
        }
    return {
        "weights": parameters,
        "gradients": [x for group in inner.averaged_gradients.values() for x in group or ()],
        "optimizer": [*inner.single_partition_of_fp32_groups, *moments(inner.optimizer)],
    }


def peak(allocations: profile) -> int:
    """Return the most that was allocated at once."""
    assert allocations.profiler is not None and allocations.profiler.kineto_results is not None
    events = sorted(allocations.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(sizes), default=0)


def moments(optimizer: Any) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.ndim]


def steps(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take three steps in every case; return the bytes that the last sent, by collective, the states held
    before its update and the most that the update took beside them."""
    sent: Counter[str] = Counter()
    for name in (
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_reduce",
    ):  # before DeepSpeed takes hold of them
        setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name), sent))
    from megawan import engine as engines

    place, device = dist.environment(), torch.device("cpu")
    dist.initialize(place, device, 120)
    wan = get_variant("debug").config
    generator = torch.Generator().manual_seed(place.rank)
    results = []
    for case in cases:
        resolved = ds_config.resolve(
            {"zero_optimization": {"stage": 3, **case["zero"]}, **case.get("file", {})},
            where="test",
            micro_batch=1,
            accumulation=case.get("accumulation", 1),
            world_size=place.world_size,
            grad_clip=1.0,
            precision=case.get("precision", "bf16"),
            on_gpu=False,
        )
        model = engines.build_model(
            lambda case=case: WanModel(wan, recompute=case["recompute"]), resolved, device
        )
        engine = engines.initialize(model, LEAF_MODULES, resolved, optim.OptimOptions(), 10)
        engines.load_weights(engine, InitialWeights(wan, 0), lambda: None)
        for _ in range(3):
            sent.clear()
            for _ in range(case.get("accumulation", 1)):
                latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
                text = torch.randn(1, wan.text_len, wan.text_dim, generator=generator)
                pred = engine(latents, torch.tensor([500.0]), text)
                engine.backward(pred.float().square().mean())
                held = states(engine, model)
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
                    engines.optimizer_step(engine, 1.0)
        results.append(
            {
                "sent": dict(sent),
                "update": peak(allocations),
                "held": {
                    name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in held.items()
                },
            }
        )
        engine.destroy()
    dist.shutdown()
    return results
