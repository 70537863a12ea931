"""What the ranks of the context-parallel tests compute; each function returns figures for the test to judge.

One group of processes runs many cases, because starting it costs more than they do.
"""

import contextlib
import datetime
import io
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megawan.models.attention import MathAttention, select_attention
from megawan.parallel import collectives
from megawan.parallel import kept as kept_module
from megawan.parallel import ring as ring_module
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology
from megawan.rng import generator_at
from tests.parallel.wire import Wire

BATCH, WIDTH = 2, 8
TIMEOUT_S = 60.0


@contextlib.contextmanager
def world() -> Iterator[int]:
    """Join the gloo world and give this rank's number."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    try:
        yield dist.get_rank()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def two_ranks(cases: list[dict[str, Any]], wires: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all that two ranks are asked."""
    with world() as rank:
        contexts = Contexts(rank)
        return {
            "parity": parity(contexts, cases),
            "wire": [sent_bytes(contexts, **case) for case in wires],
            "differences": finite_differences(contexts, 5),
            "mutations": mutations(contexts, length=7, heads=4),
            "deepspeed": against_deepspeed(contexts, length=6, heads=4),
            "refusals": refusals(contexts),
            "compiled": [compiled_error(contexts.get(2, 1)), compiled_error(contexts.get(1, 2))],
        }


def four_ranks(cases: list[dict[str, Any]], wires: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all that four ranks are asked."""
    with world() as rank:
        contexts = Contexts(rank)
        return {
            "parity": parity(contexts, cases),
            "wire": [sent_bytes(contexts, **case) for case in wires],
            "deepspeed": against_deepspeed(contexts, length=12, heads=8),
            "places": [
                [context.rank, context.size, context.ulysses_size, context.ring_size]
                for context in (contexts.get(2, 1), contexts.get(1, 2), contexts.get(2, 2))
            ],
        }


class Contexts:
    """One context for each layout: process groups are made once."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.made: dict[tuple[int, int], ContextParallel] = {}

    def get(self, ulysses: int, ring: int) -> ContextParallel:
        if (ulysses, ring) not in self.made:
            topology = Topology(dist.get_world_size(), ulysses, ring)
            self.made[ulysses, ring] = ContextParallel.create(topology, self.rank, TIMEOUT_S)
        return self.made[ulysses, ring]


def parity(contexts: Contexts, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return per case the relative errors of output and gradients against one process."""
    return [
        attention_errors(
            contexts.get(case["ulysses"], case["ring"]),
            length=case["length"],
            heads=case["heads"],
            kernel_name=case["kernel"],
            kept=case["kept"],
            dtype=getattr(torch, case["dtype"]),
        )
        for case in cases
    ]


def attention_errors(
    context: ContextParallel,
    *,
    length: int,
    heads: int,
    kernel_name: str = "auto",
    kept: str = "",
    dtype: torch.dtype = torch.float64,
) -> dict[str, float]:
    """Return the relative errors (largest difference over largest value) of attend, forward and backward.

    kept: "result" or "exchanged": what is differentiated is a second pass that finds the first one's result.
    Each rank's loss is its own tokens' output times a fixed weight; the ranks' gradients sum to the whole.
    """
    shape = (BATCH, length, heads, WIDTH)
    q, k, v, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator_at(7, index)).to(dtype)
        for index in range(4)
    )
    reference = [x.double().clone().requires_grad_() for x in (q, k, v)]
    kernel = select_attention("math", "cpu", torch.float64, head_dim=WIDTH)
    expected = kernel(*reference)
    expected_grads = torch.autograd.grad((expected * weight.double()).sum(), reference)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    need_lse = context.ring_size > 1 or bool(kept)
    kernel = select_attention(kernel_name, "cpu", dtype, head_dim=WIDTH, need_lse=need_lse)
    local_q, local_k, local_v = (context.shard(x) for x in inputs)
    if kept:
        box = Box(kept == "exchanged")
        with torch.no_grad():
            context.attend(local_q, local_k, local_v, kernel, length, box)
        local = context.attend(local_q, local_k, local_v, NoForward(kernel), length, box)
    else:
        local = context.attend(local_q, local_k, local_v, kernel, length)
    grads = torch.autograd.grad((local * context.shard(weight)).sum(), inputs)
    errors = {"out": relative_error(context.gather(local.detach(), length), expected)}
    for name, grad, wanted in zip("qkv", grads, expected_grads, strict=True):
        errors[f"d{name}"] = relative_error(summed(grad, context), wanted)
    here = context.local_length(length)
    start, stop = context.local_range(length)
    errors["padding"] = float(local.detach()[:, stop - start :].abs().max()) if stop - start < here else 0.0
    return errors


@dataclass
class Box:
    """Where an attention's first pass leaves its result."""

    exchanged: bool
    held: tuple[Tensor, ...] | None = None

    def read(self) -> tuple[Tensor, ...] | None:
        return self.held

    def write(self, *tensors: Tensor) -> None:
        assert self.held is None and not any(x.requires_grad for x in tensors)
        self.held = tensors


class NoForward:
    """A kernel that must not compute again."""

    def __init__(self, kernel: Any) -> None:
        self.backward = kernel.backward

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("the kernel ran again")

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the kernel ran again")


def summed(x: Tensor, context: ContextParallel) -> Tensor:
    """Return the sum of x over the context's ranks."""
    if context._cp_group is None:
        return x
    total = x.contiguous().clone()
    dist.all_reduce(total, group=context._cp_group)
    return total


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; where all values vanish, over a small one."""
    expected = expected.detach()
    return float((found.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


def finite_differences(contexts: Contexts, seed: int) -> dict[str, float]:
    """Return for each collective the error of its gradient against central differences.

    The loss is the sum over the ranks of a nonlinear function of what each receives; the gradient reaches the
    collective permuted, as real ones do. Every element of every rank's input is moved in turn.
    """
    group, size = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    context = contexts.get(size, 1)
    cases: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "all_to_all": ((size, 2, 3), lambda x: collectives.all_to_all(x, group)),
        "all_gather": ((2, 3), lambda x: collectives.all_gather(x, group)),
        "gather": ((1, 2, 3), lambda x: context.gather(x, 2 * size - 1)),
        "shard": ((1, 2 * size - 1, 3), context.shard),
    }
    # What the exchanges are for: q, k and v stacked, the last rank's end padded.
    kernel, length = select_attention("auto", "cpu", torch.float64, head_dim=2, need_lse=True), 2 * size - 1
    for name, place in (("ulysses", context), ("ring", contexts.get(1, size))):

        def attend(x: Tensor, place: ContextParallel = place) -> Tensor:
            return place.attend(*x, kernel, length)

        def attend_again(x: Tensor, place: ContextParallel = place) -> Tensor:
            box = Box(False)
            with torch.no_grad():
                place.attend(*x, kernel, length, box)
            return place.attend(*x, kernel, length, box)

        shape = (3, 1, 2, size, 2)
        cases |= {name: (shape, attend), f"{name}, recomputed": (shape, attend_again)}
    return {name: difference_error(shape, call, seed) for name, (shape, call) in cases.items()}


def difference_error(shape: tuple[int, ...], call: Callable[[Tensor], Tensor], seed: int) -> float:
    rank, size, step = dist.get_rank(), dist.get_world_size(), 1e-5
    x = torch.randn(shape, dtype=torch.float64, generator=generator_at(seed, rank))
    y_shape = tuple(call(x).shape)
    order = tuple(reversed(range(len(y_shape))))
    weight = torch.randn(y_shape, dtype=torch.float64, generator=generator_at(seed, rank, 1)).permute(order)

    def loss(x: Tensor) -> Tensor:
        return (call(x).permute(order).sin() * weight).sum()

    moved = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(moved), moved)
    worst = 0.0
    for owner in range(size):
        for index in range(x.numel()):
            total = torch.zeros(2, dtype=torch.float64)
            for side, sign in enumerate((1.0, -1.0)):
                nudged = x.clone()
                if owner == rank:
                    nudged.view(-1)[index] += sign * step
                total[side] = loss(nudged)
            dist.all_reduce(total)
            if owner == rank:
                worst = max(
                    worst, abs(float(total[0] - total[1]) / (2 * step) - float(grad.flatten()[index]))
                )
    return worst


def mutations(contexts: Contexts, length: int, heads: int) -> dict[str, dict[str, float]]:
    """Return the errors that each deliberate fault causes, and those of the healthy layouts."""
    ulysses, ring = contexts.get(2, 1), contexts.get(1, 2)
    found = {
        "healthy ulysses": attention_errors(ulysses, length=length, heads=heads),
        "healthy ring": attention_errors(ring, length=length, heads=heads),
        "healthy kept": attention_errors(ulysses, length=length, heads=heads, kept="result"),
        "padding attended": attention_errors(PaddingAttended(ulysses), length=length, heads=heads),
    }
    with mock.patch.object(collectives, "exchange_rows", strided_exchange):
        found["strided output"] = attention_errors(ulysses, length=length, heads=heads)
    with mock.patch.object(ring_module, "merge", unscaled_merge):
        found["no rescale"] = attention_errors(ring, length=length, heads=heads)
    with mock.patch.object(kept_module, "row_stand_in", unscaled_stand_in):
        found["no row sums"] = attention_errors(ulysses, length=length, heads=heads, kept="result")
    return found


def strided_exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The fault: `empty_like` keeps permuted strides, and the collective fills raw memory in order."""
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x.contiguous(), group=group)
    return y


def unscaled_merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The fault: the blocks' outputs are averaged, not weighted by their log-sum-exps."""
    return (out + block) / 2, torch.logaddexp(lse, block_lse)


def unscaled_stand_in(dout: Tensor, row: Tensor) -> Tensor:
    """The fault: the gradient itself stands in for the output of which only a row sum is known."""
    return dout


class PaddingAttended(ContextParallel):
    """The fault: the padded tokens take part as keys, as if the sequence had no end."""

    def __init__(self, healthy: ContextParallel) -> None:
        super().__init__(healthy._cp_group, healthy._ulysses_group, healthy._ring_group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Any, length: int, kept: Any = None) -> Tensor:
        return super().attend(q, k, v, kernel, self.local_length(length) * self.size, kept)


def sent_bytes(
    contexts: Contexts, ulysses: int, ring: int, length: int, heads: int, dtype: str
) -> dict[str, float]:
    """Return the bytes that this rank sends to attend once, forward and backward, and in how many calls."""
    context = contexts.get(ulysses, ring)
    kind = getattr(torch, dtype)
    kernel = select_attention("auto", "cpu", kind, head_dim=WIDTH, need_lse=context.ring_size > 1)
    shape = (1, context.local_length(length), heads, WIDTH)
    q, k, v = (torch.ones(shape, dtype=kind, requires_grad=True) for _ in range(3))
    with Wire() as wire:
        out = context.attend(q, k, v, kernel, length)
        forward, forward_calls = wire.take()
        torch.autograd.grad(out.sum(), (q, k, v))
        backward, backward_calls = wire.take()
    return {
        "forward": forward,
        "backward": backward,
        "forward_calls": forward_calls,
        "backward_calls": backward_calls,
    }


def against_deepspeed(contexts: Contexts, length: int, heads: int) -> float:
    """Return the largest difference between our Ulysses output and DeepSpeed's DistributedAttention."""
    from deepspeed import comm
    from deepspeed.sequence.layer import DistributedAttention

    from megawan.engine import load_host_extension

    load_host_extension()  # DeepSpeed's own way waits for ever for the lock of a build that was killed

    comm.init_distributed("gloo")
    size = dist.get_world_size()
    context = contexts.get(size, 1)
    kernel = select_attention("auto", "cpu", torch.float64, head_dim=WIDTH)
    shape = (BATCH, length, heads, WIDTH)
    q, k, v = (
        context.shard(torch.randn(shape, dtype=torch.float64, generator=generator_at(3, index)))
        for index in range(3)
    )
    theirs = DistributedAttention(kernel, dist.new_group(list(range(size))), scatter_idx=2, gather_idx=1)
    return float((context.attend(q, k, v, kernel, length) - theirs(q, k, v, 0)).abs().max())


def compiled_error(context: ContextParallel) -> float:
    """Return the relative error of a parameter's gradient through torch.compile against the eager one."""
    kernel = select_attention("auto", "cpu", torch.float64, head_dim=WIDTH, need_lse=True)
    weight = torch.randn(
        2 * WIDTH, 2 * WIDTH, dtype=torch.float64, generator=generator_at(9)
    ).requires_grad_()
    x = torch.randn(1, 4, 2 * WIDTH, dtype=torch.float64, generator=generator_at(9, context.rank))

    def loss() -> Tensor:
        y = (x @ weight).view(1, 4, 2, WIDTH).sin()
        return context.attend(y, 2 * y, y + 1, kernel, 7).cos().sum()

    (expected,) = torch.autograd.grad(loss(), weight)
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(), weight)
    return relative_error(found, expected)


def refusals(contexts: Contexts) -> list[str]:
    """Return the messages of what cannot work, raised on every rank before anything is sent."""
    ring, ulysses = contexts.get(1, 2), contexts.get(2, 1)
    kernel = MathAttention("math")
    even, odd = torch.zeros(1, 3, 4, WIDTH), torch.zeros(1, 3, 5, WIDTH)
    group = dist.group.WORLD
    assert group is not None
    calls: list[Callable[[], object]] = [
        lambda: ring.attend(even, even, even, lambda q, k, v: q, 6),
        lambda: ulysses.attend(odd, odd, odd, kernel, 6),
        lambda: ulysses.attend(even, even, even, kernel, 7),
        lambda: ulysses.gather(even, 9),
        lambda: ulysses.attend(even, even, even, lambda q, k, v: q, 6, Box(False)),
        lambda: collectives.all_to_all(torch.zeros(3, 2), group),
        lambda: ring_module.ring_attention(even, even, even, kernel, group, [4, 2]),
        lambda: ContextParallel.create(Topology(4, 2, 1), contexts.rank, TIMEOUT_S),
    ]
    return [message(call) for call in calls]


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def run_file(file: str) -> str:
    """Return what the program prints, run as torchrun would."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(file, run_name="__main__")
    return printed.getvalue()
