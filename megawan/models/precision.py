"""The fp32 islands: operations that run in at least float32 whatever the weights are, and round once at the
end.

Half-precision values are widened where they are used; float64 stays float64, so a model in double is exact
throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if it is bfloat16 or float16, else x itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _WideLinear(torch.autograd.Function):
    """y = x W^T + b in float32, keeping only the half-precision W for the backward pass.

    `F.linear(x, W.float())` would keep a float32 copy of W alive until the backward pass: 630 MB for the time
    projection of a 14B model, and outside ZeRO-3's sharding at that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return F.linear(wide(x), wide(weight), wide(bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # The sinusoids of the time need none.
        grad_x = (grad @ wide(weight)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (rows.t() @ wide(x).reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight, rows.sum(0).to(ctx.bias_dtype)


class WideLinear(nn.Linear):
    """A linear layer whose product runs in at least float32 and whose result stays there."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [..., out_features], float32 (float64 for double weights)."""
        return _WideLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


class LayerNorm(nn.LayerNorm):
    """Affine layer norm over the last axis; torch's kernel computes in float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x in the weights' dtype; a wider x is reduced only after the norm."""
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight; computed in float32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) · weight in x's dtype."""
        if x.is_cuda:  # one fused kernel each way, which keeps x and a number a token
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return,no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """What torch does on CPUs too, without the two float32 copies of x that it keeps there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, rstd, weight = ctx.saved_tensors
        y, grad = wide(x) * rstd, wide(grad)
        grad_y = grad * wide(weight)
        grad_x = (grad_y - y * (grad_y * y).mean(-1, keepdim=True)) * rstd
        grad_weight = (grad * y).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, clean: int) -> Tensor:
    """Return LN(x)·(1 + scale) + shift, float32 arithmetic and result, [B, l, D].

    shift and scale: [B, R, D] where R is 1 (one row for all tokens) or 2 (row 0 for the first `clean` tokens,
    row 1 for the others: TI2V's clean frame and noisy rest). No per-token modulation is ever built, and of
    the tokens only x and two numbers each are kept for the backward pass.
    """
    return _ModulatedNorm.apply(x, shift, scale, eps, clean)  # type: ignore[no-any-return,no-untyped-call]


def gated_add(x: Tensor, y: Tensor, gate: Tensor, clean: int) -> Tensor:
    """Return x + y·gate, summed in float32 and rounded once to x's dtype; gate [B, R, D] as in
    `modulated_norm`. Keeps y for the backward pass."""
    return _GatedAdd.apply(x, y, gate, clean)  # type: ignore[no-any-return,no-untyped-call]


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, clean: int) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], None, None, eps)
        ctx.clean = clean
        ctx.save_for_backward(x, mean, rstd, scale)
        return _by_row(
            lambda tokens, shift, scale: torch.addcmul(shift, tokens, 1 + scale), clean, y, shift, scale
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, mean, rstd, scale = ctx.saved_tensors
        tokens = wide(x)
        grad_y = _by_row(lambda tokens, scale: tokens * (1 + scale), ctx.clean, grad, scale)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y, tokens, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        grad_scale = _row_sums(grad * ((tokens - mean) * rstd), scale, ctx.clean)
        return grad_x.to(x.dtype), _row_sums(grad, scale, ctx.clean), grad_scale, None, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, clean: int) -> Tensor:
        ctx.clean = clean
        ctx.save_for_backward(y, gate)
        gated = _by_row(lambda tokens, gate: tokens * gate, clean, wide(y), gate)
        return (wide(x) + gated).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate = ctx.saved_tensors
        tokens = wide(grad)
        grad_y = _by_row(lambda tokens, gate: tokens * gate, ctx.clean, tokens, gate).to(y.dtype)
        return grad, grad_y, _row_sums(tokens * wide(y), gate, ctx.clean), None


def _by_row(f: Callable[..., Tensor], clean: int, tokens: Tensor, *rows: Tensor) -> Tensor:
    """Return f(tokens, *rows) where every token meets its row: the first `clean` row 0, the others row 1."""
    if rows[0].shape[1] == 1:
        return f(tokens, *rows)
    head = f(tokens[:, :clean], *(row[:, :1] for row in rows))
    rest = f(tokens[:, clean:], *(row[:, 1:] for row in rows))
    return torch.cat((head, rest), dim=1)


def _row_sums(x: Tensor, like: Tensor, clean: int) -> Tensor:
    """Return the sums over the tokens of each row, [B, R, D] as `like`."""
    if like.shape[1] == 1:
        return x.sum(1, keepdim=True)
    return torch.stack((x[:, :clean].sum(1), x[:, clean:].sum(1)), dim=1)
