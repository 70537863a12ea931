"""What the ranks of test_recompute.py run: blocks that are recomputed while their tokens are spread."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megawan import cost
from megawan.models.attention import Triple, select_attention
from megawan.models.recompute import POLICIES
from megawan.models.wan import WanModel
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology
from megawan.plan import model_shape
from tests.models.activations import kept_bytes
from tests.models.peers import random_inputs, random_model
from tests.models.rank_workers import BASE, replace, run
from tests.parallel.wire import Wire

LAYOUTS = ((4, 1), (1, 4), (2, 2))
UNEVEN = (3, 6, 10)  # 45 tokens
SHORT = (1, 2, 6)  # 3 tokens: one rank of four has none
EVEN = (4, 4, 8)  # 32 tokens
ROOMY = replace(BASE, dim=256, ffn_dim=1024, num_layers=1)
TIMEOUT_S = 60.0


class CountedKernel:
    """A kernel that counts its forward passes."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.kernel: Any = select_attention("auto", "cpu", dtype, head_dim=head_dim, need_lse=True)
        self.forwards = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.forwards += 1
        out: Tensor = self.kernel(q, k, v)
        return out

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        out, lse = self.kernel.forward_lse(q, k, v)
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        dq, dk, dv = self.kernel.backward(dout, q, k, v, out, lse)
        return dq, dk, dv


def everything() -> dict[str, Any]:
    """Return what each layout and policy changes, sends, computes and keeps on this rank."""
    with contexts() as made:
        alone = {policy: block_keeps(ContextParallel.single(), policy) for policy in POLICIES}
        return {
            "parity": [found for latent in (UNEVEN, SHORT) for found in parity(made, latent)],
            "wire": [
                wire(context, policy, dtype)
                for context in made
                for policy in POLICIES
                for dtype in (torch.float32, torch.bfloat16)
            ],
            "kept": [kept(context, policy, alone[policy]) for context in made for policy in POLICIES],
        }


@contextlib.contextmanager
def contexts() -> Iterator[list[ContextParallel]]:
    """Join the gloo world and make every layout's groups."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    yield [ContextParallel.create(Topology(size, *degrees), rank, TIMEOUT_S) for degrees in LAYOUTS]
    dist.destroy_process_group()


def parity(made: list[ContextParallel], latent: tuple[int, int, int]) -> list[dict[str, tuple[float, float]]]:
    """Return for each policy, per layout, the largest relative differences of output and gradients from one
    rank's."""
    whole, reference = run("t2v", latent, "none", ContextParallel.single())
    scale = max(float(value.abs().max()) for value in reference.values())
    differences = []
    for policy in POLICIES:
        found = {}
        for degrees, context in zip(LAYOUTS, made, strict=True):
            out, gradients = run("t2v", latent, policy, context)
            worst = max(float((gradients[name] - reference[name]).abs().max()) for name in reference)
            found[f"{policy} {latent} {degrees}"] = (float((out - whole).abs().max()), worst / scale)
        differences.append(found)
    return differences


def wire(context: ContextParallel, policy: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the bytes sent and kernels run in a step of a model of one block, with the formula's."""
    config = replace(BASE, num_layers=1)
    model = random_model(config, seed=1, recompute=policy).to(dtype)
    kernel = CountedKernel(dtype, config.head_dim)
    model.attention = kernel
    inputs = random_inputs(config, batch=1, latent=EVEN, seed=2)
    with Wire() as counted:
        out = model(inputs.latents, inputs.timestep, inputs.text, context=context)
        forward, forward_calls = counted.take()
        out.sum().backward()
        backward, backward_calls = counted.take()
    shape, size, degrees = model_shape(config), dtype.itemsize, (context.ulysses_size, context.ring_size)
    asked = {"bytes_per_element": size}
    sent = cost.ulysses_bytes(shape, 32, *degrees, **asked)
    return {
        "name": f"{policy} {degrees} {dtype}",
        "forward": forward,
        "backward": backward,
        "calls": (forward_calls, backward_calls),
        "kernels": kernel.forwards,
        "forward_formula": sent + cost.ring_bytes(shape, 32, *degrees, **asked),
        "backward_formula": sent
        + cost.ring_backward_bytes(shape, 32, *degrees, **asked)
        + cost.recompute_bytes(shape, 32, policy, *degrees, **asked),
    }


def block_keeps(context: ContextParallel, policy: str) -> int:
    """Return the bytes that a bfloat16 block keeps on this rank: two blocks' less one's."""
    inputs, sizes = random_inputs(ROOMY, batch=1, latent=(4, 16, 16), seed=2), []
    for layers in (1, 2):
        model = WanModel(replace(ROOMY, num_layers=layers), recompute=policy).bfloat16()
        call = (inputs.latents, inputs.timestep, inputs.text)
        sizes.append(kept_bytes(model, lambda: model(*call, context=context)))  # noqa: B023
    return sizes[1] - sizes[0]


def kept(context: ContextParallel, policy: str, alone: int) -> dict[str, Any]:
    """Return what a block keeps here, in the formula, and on a single rank."""
    formula = cost.activation_bytes(
        model_shape(ROOMY), 256, policy, cp_size=context.size, ulysses_degree=context.ulysses_size
    )
    name = f"{policy} {context.ulysses_size} x {context.ring_size}"
    return {
        "name": name,
        "policy": policy,
        "here": block_keeps(context, policy),
        "formula": formula,
        "single": alone,
    }


def sharded(cases: dict[str, list[str]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return per case the losses and gradient norms of two DeepSpeed steps with these flags."""
    from megawan.dist import environment, initialize, shutdown
    from megawan.metrics import LossMeter
    from megawan.trainer import Trainer
    from tests.training import LivelyWeights, plan_of

    place, device = environment(), torch.device("cpu")
    initialize(place, device, TIMEOUT_S)
    found = {}
    for name, argv in cases.items():
        plan = plan_of(place.world_size, *argv, "--steps", "2")
        trainer = Trainer(plan, device)
        trainer.start(LivelyWeights(plan.variant.config, plan.config.seed), lambda: None)
        batches, meter, losses, norms = trainer.batches(0), LossMeter(device), [], []
        for _ in range(2):
            trainer.step(next(batches), meter)
            losses.append(meter.read()[0])
            norms.append(trainer.grad_norm)
        found[name] = losses, norms
        trainer.engine.destroy()
    shutdown()
    return found
