"""A block's gates: x + gate·y, and the same where y is a linear layer's product that nobody keeps.

gate: [B, R, D], a row for all tokens of a sample (R 1), or row 0 for its first `clean` tokens and row 1 for
the others (R 2), as in `precision.modulated_norm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megawan.models.compiling import compile_each_size
from megawan.models.precision import by_row, operand, row_slices, row_sums, runs, times, wide


def gated_add(x: Tensor, y: Tensor, gate: Tensor, clean: int) -> Tensor:
    """Return x + y·gate [B, l, D], summed in float32 and rounded once to x's dtype. Keeps y for the backward
    pass."""
    return _GatedAdd.apply(x, y, gate, clean)  # type: ignore[no-any-return,no-untyped-call]


Code = Callable[..., Any]


@dataclass(frozen=True)
class GateCode:
    """What `gated_linear` runs: as it is written or compiled. Compiled from inside, whatever became of its
    code, it keeps the same tensors in the same order, which a recomputation must."""

    forward: Code
    backward: Code

    def compiled(self) -> "GateCode":
        """Return it with both parts compiled."""
        return GateCode(compile_each_size(self.forward), compile_each_size(self.backward))


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, clean: int) -> Tensor:
        ctx.clean = clean
        ctx.save_for_backward(y, gate)
        return _sum(x, y, gate, clean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate = ctx.saved_tensors
        tokens, product = wide(grad), operand(y)
        grad_gate = row_sums(times(product, tokens, own=product is not y), gate, ctx.clean)
        return grad, _gated(tokens, gate, ctx.clean, tokens is not grad).to(y.dtype), grad_gate, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor,
        clean: int,
        product: Tensor | None,
        needed: bool,
        code: GateCode,
    ) -> Tensor:
        ctx.clean, ctx.code = clean, code
        ctx.save_for_backward(h, weight, bias, gate)
        if not needed:
            return x.new_zeros(()).expand(x.shape)
        out: Tensor = code.forward(x, h, weight, bias, gate, clean, product)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, grad_weight, grad_bias, grad_gate = ctx.code.backward(grad, *ctx.saved_tensors, ctx.clean)
        return grad, dh, grad_weight, grad_bias, grad_gate, None, None, None, None


def _gated_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    clean: int,
    product: Tensor | None,
) -> Tensor:
    return _sum(x, F.linear(h, weight, bias) if product is None else product, gate, clean)


def _gated_linear_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, clean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of h, weight, bias and gate; x has the output's own."""
    gated, totals = _gated_and_totals(grad, gate, clean, weight.dtype)
    grad_gate, grad_weight = totals * bias, None
    parts = zip(runs(grad.to(weight.dtype), gate, clean), runs(h, gate, clean), strict=True)
    for (g, b, r), (inputs, _, _) in parts:
        scaled, dots = _scaled_and_dots(g.t() @ inputs, weight, gate[b, r])
        grad_weight = scaled if grad_weight is None else grad_weight.add_(scaled)
        grad_gate[b, r] += dots
    assert grad_weight is not None
    return gated @ weight, grad_weight, (totals * gate).sum((0, 1)).to(bias.dtype), grad_gate


def _gated_and_totals(grad: Tensor, gate: Tensor, clean: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return grad·gate in `dtype` and grad's sums over the tokens of each row, as gate. What it widens is
    gone afterwards."""
    tokens = operand(grad)
    totals = row_sums(tokens, gate, clean, gate.dtype)
    return _gated(tokens, gate, clean, tokens is not grad).to(dtype), totals


GATE_CODE = GateCode(_gated_linear, _gated_linear_backward)


def gated_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    clean: int,
    *,
    product: Tensor | None = None,
    needed: bool = True,
    code: GateCode = GATE_CODE,
) -> Tensor:
    """Return x + gate·(h W^T + b), [B, l, D] from h [B, l, F], as `gated_add` of the product does.

    The product is not kept. Its sum with a gradient g, which is the gate's own, is that of the weight before
    the gate: Σ_t g_t·(W h_t) = Σ_f (W ⊙ Σ_t g_t h_tᵀ)_f, so one multiplication gives both.
    product: h W^T + b where the caller has it. needed: False leaves the result a placeholder, of which only
    the backward pass is right; a recomputation multiplies nothing.
    """
    return _GatedLinear.apply(x, h, weight, bias, gate, clean, product, needed, code)  # type: ignore[no-any-return,no-untyped-call]


def _sum(x: Tensor, y: Tensor, gate: Tensor, clean: int) -> Tensor:
    """Return x + y·gate in x's dtype."""
    total = operand(x)
    # gate is wide, and so is the sum; a widened copy takes it, as first touches of memory cost most here.
    if total is x:
        return by_row(torch.addcmul, clean, gate, x, y).to(x.dtype)
    return by_row(Tensor.addcmul_, clean, gate, total, operand(y)).to(x.dtype)


def _gated(tokens: Tensor, gate: Tensor, clean: int, own: bool) -> Tensor:
    """Return tokens·gate, in the tokens' memory where that is the caller's `own`."""
    return by_row(Tensor.mul_ if own else torch.mul, clean, gate, tokens)


def _scaled_and_dots(product: Tensor, weight: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return product [D, F] with its rows times `row` [D], perhaps in its memory, and the dot products [D] of
    its rows with the weight's, summed in float32.

    Uncompiled half-precision terms are rounded on a GPU, as `product` is: widened copies of weights would
    take twice the memory traffic.
    """
    if torch.compiler.is_compiling():
        return (product * row.unsqueeze(1)).to(product.dtype), (wide(product) * weight).sum(-1)
    dots = torch.empty_like(row)
    for rows in row_slices(weight):  # which a CPU's cache holds between the two
        part = product[rows]
        dots[rows] = (operand(part) * weight[rows]).sum(-1, dtype=row.dtype)
        part.mul_(row[rows].unsqueeze(1))
    return product, dots
