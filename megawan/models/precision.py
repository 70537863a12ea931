"""The fp32 islands: operations that run in at least float32 whatever the weights are, and round once at the
end.

Half-precision values are widened where they are used; float64 stays float64, so a model in double is exact
throughout.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if it is bfloat16 or float16, else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def on_cpu(x: Tensor) -> bool:
    """Return whether x is a CPU's: the one question that chooses between formulas for CPUs and for GPUs."""
    return x.device.type == "cpu"


def operand(x: Tensor) -> Tensor:
    """Return half-precision x as operations beside float32 values take it best: on CPUs, where each of them
    would first widen a copy, widened once; on GPUs, where they widen in registers, as it is."""
    return wide(x) if on_cpu(x) else x


def times(x: Tensor, factor: Tensor, own: bool) -> Tensor:
    """Return x·factor, in x's memory where that is the caller's `own`."""
    return x.mul_(factor) if own else x * factor


SUMMED_AT_ONCE = 16
"""Tokens whose rows a CPU's nearest cache holds."""


def token_sums(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return x [..., L, D] summed over the tokens, [..., D], in `dtype` (None: x's).

    What torch compiles for a CPU sums a cache line's columns through all rows before it turns to the next.
    There a few tokens at a time are summed first, so that the rows are read in the order of memory.
    """
    length = x.shape[-2]
    if not (torch.compiler.is_compiling() and on_cpu(x)):
        return x.sum(-2, dtype=dtype)
    few = max(n for n in range(1, SUMMED_AT_ONCE + 1) if length % n == 0)
    tokens = wide(x)
    if few > 1:
        tokens = tokens.reshape(*x.shape[:-2], length // few, few, x.shape[-1]).sum(-2)
    return tokens.sum(-2).to(dtype or x.dtype)


WIDENED_AT_ONCE = 1 << 20
"""Numbers of a weight: 4 MiB in float32, which a CPU's cache holds."""


class _WideLinear(torch.autograd.Function):
    """y = x W^T + b in float32, of a half-precision W that is widened a few rows at a time.

    `F.linear(x, W.float())` would write and read a float32 copy of W, for the time projection of a 14B model
    630 MB, and keep it alive until the backward pass, outside ZeRO-3's sharding at that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        x, bias = wide(x), wide(bias)
        return torch.cat([F.linear(x, wide(weight[rows]), bias[rows]) for rows in row_slices(weight)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        tokens, grads = wide(x).reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_weight, grad_x = torch.empty_like(weight), None
        for rows in row_slices(weight):
            grad_weight[rows] = grads[:, rows].t() @ tokens
            if ctx.needs_input_grad[0]:  # the sinusoids of the time need none
                part = grads[:, rows] @ wide(weight[rows])
                grad_x = part if grad_x is None else grad_x.add_(part)
        back = None if grad_x is None else grad_x.view_as(x).to(x.dtype)
        return back, grad_weight, grads.sum(0).to(ctx.bias_dtype)


def row_slices(weight: Tensor) -> list[slice]:
    """Return the rows of a weight [out, in] in runs of about WIDENED_AT_ONCE numbers; on a GPU, where a
    launch takes as long as many numbers, of 16 times as many."""
    numbers = WIDENED_AT_ONCE * (1 if on_cpu(weight) else 16)
    rows = max(1, numbers // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


class WideLinear(nn.Linear):
    """A linear layer whose product runs in at least float32 and whose result stays there."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [..., out_features], float32 (float64 for double weights)."""
        if wide(self.weight) is self.weight:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return _WideLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


class LayerNorm(nn.LayerNorm):
    """Affine layer norm over the last axis; torch's kernel computes in float32 inside.

    Compiled, it takes x [B, l, D] only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x in the weights' dtype; a wider x is reduced only after the norm."""
        if torch.compiler.is_compiling():
            row, shift = (wide(p).expand(x.shape[0], 1, -1) for p in (self.weight, self.bias))
            return _affine_norm(x, row, shift, self.eps, 0, self.weight.dtype)
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class TanhGELU(nn.Module):
    """GELU in its tanh form, x·(1 + tanh(u)) / 2 with u = sqrt(2/π)·(x + 0.044715·x³)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU(x), any shape, float32 arithmetic rounded once to x's dtype."""
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        # The same function as x·sigmoid(2u): one exponential, where code for a tanh takes twice the time.
        tokens = wide(x)
        u = math.sqrt(2 / math.pi) * tokens * (1 + 0.044715 * tokens.square())
        return (tokens * torch.sigmoid(2 * u)).to(x.dtype)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, clean: int, dtype: torch.dtype
) -> Tensor:
    """Return LN(x)·(1 + scale) + shift [B, l, D], float32 arithmetic rounded once to `dtype`.

    shift and scale: [B, R, D] where R is 1 (one row for all tokens) or 2 (row 0 for the first `clean` tokens,
    row 1 for the others: TI2V's clean frame and noisy rest). No per-token modulation is ever built, and of
    the tokens only x and two numbers each are kept for the backward pass.
    """
    return _affine_norm(x, 1 + scale, shift, eps, clean, dtype)


def _affine_norm(
    x: Tensor, weight: Tensor, shift: Tensor, eps: float, clean: int, dtype: torch.dtype
) -> Tensor:
    """Return LN(x)·weight + shift, as `modulated_norm` does."""
    return _AffineNorm.apply(x, weight, shift, eps, clean, dtype)  # type: ignore[no-any-return,no-untyped-call]


class _AffineNorm(torch.autograd.Function):
    """Where a run of tokens shares a row, this is torch's affine norm: one kernel, and one backward that also
    sums the row's gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, eps: float, clean: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.clean = clean
        parts = [
            torch.native_layer_norm(_kernel_input(run, dtype), run.shape[-1:], weight[b, r], shift[b, r], eps)
            for run, b, r in runs(x, weight, clean)
        ]
        ctx.save_for_backward(x, weight, shift, *(number for _, *both in parts for number in both))
        return _joined([y for y, _, _ in parts], x.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, shift, *numbers = ctx.saved_tensors
        grads_x, grad_weight, grad_shift = [], torch.zeros_like(weight), torch.zeros_like(shift)
        parts = zip(
            runs(grad, weight, ctx.clean),
            runs(x, weight, ctx.clean),
            numbers[::2],
            numbers[1::2],
            strict=True,
        )
        for (grad_run, b, r), (run, _, _), mean, rstd in parts:
            tokens = _kernel_input(run, grad.dtype)
            grad_x, grad_weight[b, r], grad_shift[b, r] = _norm_backward(
                grad_run.to(tokens.dtype), tokens, mean, rstd, weight[b, r], shift[b, r]
            )
            grads_x.append(grad_x.to(x.dtype))
        return _joined(grads_x, x.shape), grad_weight, grad_shift, None, None, None


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [L, D], weight [D] and shift [D], given that of LN(x)·weight + shift."""
    if not torch.compiler.is_compiling():
        operator = torch.ops.aten.native_layer_norm_backward
        grad_x, grad_weight, grad_shift = operator(
            grad, x, x.shape[-1:], mean, rstd, weight, shift, [True, True, True]
        )
        return grad_x, grad_weight, grad_shift
    y, g = (x - mean) * rstd, grad * weight
    grad_x = rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    return grad_x, token_sums(grad * y), token_sums(grad)


def _kernel_input(x: Tensor, other: torch.dtype) -> Tensor:
    """Return x as the norm's kernel takes it beside a float32 weight: wide, but on CPUs half-precision x with
    a result of the same dtype as it is (torch computes in float32 inside; compiled code widens by itself, and
    torch's decomposition would round the statistics)."""
    mixed = x.dtype == other and on_cpu(x) and not torch.compiler.is_compiling()
    return x if mixed else wide(x)


def runs(x: Tensor, rows: Tensor, clean: int) -> list[tuple[Tensor, int, int]]:
    """Return (tokens [l', D], b, r) for the runs of x [B, l, D] whose tokens meet row r of sample b."""
    if rows.shape[1] == 1:
        return [(sample, b, 0) for b, sample in enumerate(x.unbind())]
    return [(part, b, r) for b, s in enumerate(x.unbind()) for r, part in enumerate((s[:clean], s[clean:]))]


def _joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Return what `runs` took apart, [B, l, D]."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


def by_row(f: Callable[..., Tensor], clean: int, row: Tensor, *tokens: Tensor) -> Tensor:
    """Return f(*tokens, row) where every token meets its row: the first `clean` row 0, the others row 1."""
    if row.shape[1] == 1:
        return f(*tokens, row)
    head = f(*(x[:, :clean] for x in tokens), row[:, :1])
    rest = f(*(x[:, clean:] for x in tokens), row[:, 1:])
    return torch.cat((head, rest), dim=1)


def row_sums(x: Tensor, like: Tensor, clean: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return the sums over the tokens of each row, [B, R, D] as `like`, as `token_sums` does."""
    if like.shape[1] == 1:
        return token_sums(x, dtype).unsqueeze(1)
    return torch.stack((token_sums(x[:, :clean], dtype), token_sums(x[:, clean:], dtype)), dim=1)
