"""What the backward pass recomputes instead of keeping: a policy for each block, chosen by name.

A block passes each product that a policy may keep through a `Keep`. The first forward pass leaves there what
the policy keeps; the recomputation finds it and runs only what lies between. Nothing in a block draws random
numbers, so there is no generator state to keep.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megawan.models.gates import GATE_CODE, GateCode, gated_add, gated_linear
from megawan.models.precision import token_sums
from megawan.parallel.context import ContextParallel
from megawan.parallel.kept import kept_attention

POLICIES = ("none", "selective", "attention", "full")
"""From the one that keeps most to the one that recomputes most."""
LEGAL = (
    "none, selective, attention, full, each also as full:K for the first K blocks, joined by commas"
    " (attention:24,selective: the first 24 blocks attention, the others selective); for a run also"
    " auto"
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Keep:
    """Policies none and full: no product of the block is singled out. Entered for each forward pass."""

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload
        self.slots: list[Slot] = []
        self.used = 0
        self.entered = False
        self.again = False

    def __enter__(self) -> None:
        """Begin a forward pass: the first fills the slots in order, each later one, which recomputes, reads
        them so."""
        self.used = 0
        self.again = self.entered
        self.entered = True

    def __exit__(self, *error: object) -> None:
        """End it."""

    def linear(self, module: nn.Module, x: Tensor, sent: bool = False) -> Tensor:
        """Return module(x), [..., out_features]; sent: only other ranks read its values."""
        if torch.compiler.is_compiling():
            return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return,no-untyped-call]
        return module(x)  # type: ignore[no-any-return]

    def gated_linear(
        self,
        module: nn.Linear,
        h: Tensor,
        x: Tensor,
        gate: Tensor,
        clean: int,
        *,
        by_weight: bool,
        last: bool = False,
        code: GateCode = GATE_CODE,
    ) -> Tensor:
        """Return x + gate·module(h), [B, l, D].

        by_weight: see `cost.GATE_BY_WEIGHT_TOKENS`. last: nothing in the block reads the result, so that no
        recomputation needs it; not inside a compiled graph, whose kept tensors would change with it.
        """
        if not by_weight:
            return gated_add(x, self.linear(module, h), gate, clean)
        product, needed = (None, not self.again) if last else (self.product(module, h), True)
        inputs = x, h, module.weight, module.bias, gate, clean
        return gated_linear(*inputs, product=product, needed=needed, code=code)

    def product(self, module: nn.Linear, h: Tensor) -> Tensor | None:
        """Return module(h), without a gradient, if the policy keeps it."""
        return None

    def self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kernel: Attention, context: ContextParallel, length: int
    ) -> Tensor:
        """Return context.attend(...), [B, l, N, K]."""
        return context.attend(q, k, v, kernel, length)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, kernel: Attention) -> Tensor:
        """Return kernel(q, k, v), [B, l, N, K]."""
        return kernel(q, k, v)


class KeepAttention(Keep):
    """Policy attention: the result of self-attention is kept."""

    exchanged = False

    def slot(self) -> Slot:
        """Return the slot of the next product."""
        if self.used == len(self.slots):
            self.slots.append(Slot(self.exchanged, self.offload))
        self.used += 1
        return self.slots[self.used - 1]

    def self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, kernel: Attention, context: ContextParallel, length: int
    ) -> Tensor:
        """Return context.attend(...), its kernel and communication run once."""
        return context.attend(q, k, v, kernel, length, self.slot())


class KeepProducts(KeepAttention):
    """Policy selective: the results of linear layers and attentions are kept, and what self-attention was
    sent."""

    exchanged = True

    def linear(self, module: nn.Module, x: Tensor, sent: bool = False) -> Tensor:
        """Return module(x), multiplied once; in a recomputation what was sent is a placeholder."""
        return _KeptLinear.apply(x, module.weight, module.bias, self.slot(), sent)  # type: ignore[no-any-return,no-untyped-call]

    def product(self, module: nn.Linear, h: Tensor) -> Tensor:
        """Return module(h), multiplied once, without a gradient."""
        with torch.no_grad():
            return self.linear(module, h)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, kernel: Attention) -> Tensor:
        """Return kernel(q, k, v), computed once."""
        return kept_attention(q, k, v, kernel, self.slot())


@functools.cache
def _keep_products_outside_graphs() -> type[KeepProducts]:
    """Return KeepProducts for compiled blocks.

    A compiled graph that multiplies saves other tensors than one that finds the product, and a recomputation
    must save what the first pass saved. So the compiler gets what lies between products. It takes two seconds
    to import, which a command that compiles nothing does not wait for.
    """
    outside: Any = torch.compiler.disable

    class KeepProductsOutsideGraphs(KeepProducts):
        linear = outside(KeepProducts.linear)
        product = outside(KeepProducts.product)
        cross_attention = outside(KeepProducts.cross_attention)

    return KeepProductsOutsideGraphs


class Slot:
    """One product of a block between its forward pass and its recomputation (a `parallel.kernel.Kept`)."""

    def __init__(self, exchanged: bool, offload: bool) -> None:
        self.exchanged = exchanged
        self.offload = offload
        self.held: tuple[Any, ...] | None = None

    def read(self) -> tuple[Tensor, ...] | None:
        """Return what was written, None before that."""
        if self.held is None or not self.offload:
            return self.held
        return tuple(fetch(x) for x in self.held)

    def write(self, *tensors: Tensor) -> None:
        """Keep the tensors, in CPU memory if the activations are offloaded."""
        self.held = tuple(park(x) for x in tensors) if self.offload else tensors


class _Linear(torch.autograd.Function):
    """`F.linear`, for its bias gradient: see `token_sums`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        return _linear_backward(ctx, dy)


class _KeptLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slot: Slot, sent: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        found = slot.read()
        if found is None:
            y = F.linear(x, weight, bias)
            slot.write(*(() if sent else (y.detach(),)))
            return y
        return found[0].detach() if found else x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        return (*_linear_backward(ctx, dy), None, None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; ctx has x and weight."""
    x, weight = ctx.saved_tensors
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    return dx, rows.t() @ x.reshape(-1, x.shape[-1]), token_sums(rows)


def park(x: Tensor) -> tuple[Tensor, torch.device]:
    """Return a copy of x in CPU memory and the device that `fetch` takes it back to.

    On a GPU the copy is queued behind the kernel that computes x, into pinned memory; nothing waits.
    """
    held = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return held.copy_(x, non_blocking=True), x.device


def fetch(parked: tuple[Tensor, torch.device]) -> Tensor:
    """Return what was parked, on its device."""
    held, device = parked
    return held.to(device, non_blocking=True)


KEEPS = {"selective": KeepProducts, "attention": KeepAttention, "full": Keep}


@dataclass(frozen=True)
class Recompute:
    """A policy for each block, whether what recomputed blocks keep waits in CPU memory, and whether the
    blocks are compiled."""

    policies: tuple[str, ...]
    offload: bool = False
    compiled: bool = False

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """The policies in order, each with its first block and the one after its last."""
        ends = list(itertools.accumulate(count for _, count in self.split))
        return [(policy, end - count, end) for (policy, count), end in zip(self.split, ends, strict=True)]

    @property
    def split(self) -> list[tuple[str, int]]:
        """The policies in order, each with the blocks that follow it."""
        return [(policy, len(list(same))) for policy, same in itertools.groupby(self.policies)]

    @property
    def needs_lse(self) -> bool:
        """Whether the attention kernel must give its log-sum-exp."""
        return any(policy in ("selective", "attention") for policy in self.policies)

    def run(self, index: int, block: nn.Module, x: Tensor, *inputs: object) -> Any:
        """Return block(x, *inputs, keep), keeping for the backward pass what the policy keeps of block
        `index`."""
        policy = self.policies[index]
        if policy == "none" or not torch.is_grad_enabled():
            return block(x, *inputs, Keep())
        chosen = _keep_products_outside_graphs() if self.compiled and policy == "selective" else KEEPS[policy]
        keep = chosen(self.offload)
        outside = _parked(x) if self.offload else contextlib.nullcontext()
        with outside:
            # The block is called as a module so that ZeRO-3's hooks gather its weights in the recomputation
            # too.
            return checkpoint(
                block,
                x,
                *inputs,
                keep,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (keep, keep),
            )


def _parked(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """While it is entered, autograd keeps x in CPU memory and everything else where it is."""

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        is_x = saved.data_ptr() == x.data_ptr() and saved.shape == x.shape
        return park(saved) if is_x else saved

    def unpack(packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        return packed if isinstance(packed, Tensor) else fetch(packed)

    return saved_tensors_hooks(pack, unpack)


def parse_recompute(text: str, num_layers: int, offload: bool = False, compiled: bool = False) -> Recompute:
    """Return the policies that `text` names for `num_layers` blocks; else ValueError with the legal forms."""
    policies: list[str] = []
    for place, part in enumerate(parts := text.split(",")):
        policy, colon, count = part.partition(":")
        rest = num_layers - len(policies)
        whole = not colon and place == len(parts) - 1
        if policy not in POLICIES or not (whole or (count.isdecimal() and int(count) <= rest)):
            raise ValueError(
                f"recompute {text!r} is not legal for {num_layers} blocks; legal: {LEGAL}; the Ks"
                f" together at most {num_layers}"
            )
        policies += [policy] * (rest if whole else int(count))
    policies += ["none"] * (num_layers - len(policies))
    if offload and set(policies) == {"none"}:
        raise ValueError(
            f"recompute {text!r} keeps everything on the device; offloading what is kept needs selective,"
            " attention or full"
        )
    return Recompute(tuple(policies), offload, compiled)
