"""From a projection to the attention's q or k: the norm over all heads together and, in self-attention, the
rotation.

Both in one operation that keeps its input and a number a token: the norm's scale of a token is folded into
the token's cosines and sines, a twelfth of its width. torch.compile gets the formulas instead and fuses them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megawan.models.precision import on_cpu, operand, times, token_sums, wide
from megawan.models.rope import rotate

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight; computed in float32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, heads: int, rope: Rope | None = None) -> Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight [B, l, N, K] in x's dtype from x [B, l, N·K]; rope: the
        rows by which each head is turned before the one rounding."""
        if rope is None and not on_cpu(x):  # one fused kernel each way, which keeps x and a number a token
            return _split(F.rms_norm(x, self.weight.shape, self.weight, self.eps), heads)
        cos, sin = rope or (None, None)
        return _NormedHeads.apply(x, self.weight, self.eps, heads, cos, sin)  # type: ignore[no-any-return,no-untyped-call]


class _NormedHeads(torch.autograd.Function):
    """y = turn(x·weight·r), r = 1 / sqrt(mean(x²) + eps)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, heads: int, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        scale, tokens = wide(weight), operand(x)
        norm: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=scale.dtype)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()
        y = _split(times(tokens, scale, own=tokens is not x), heads)
        ctx.rotated = cos is not None
        ctx.save_for_backward(x, weight, r, *((cos, sin) if ctx.rotated else ()))
        return _scaled_and_turned(y, r, cos, sin, 1, own=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, weight, r, *rope = ctx.saved_tensors
        cos, sin = rope if ctx.rotated else (None, None)
        scale, tokens = wide(weight), operand(x)
        # g = r · (gradient of what is turned); grad_x = g·weight − x · r²/D · Σ g·weight·x
        dy = wide(grad)
        g = _scaled_and_turned(dy, r, cos, sin, -1, own=dy is not grad).flatten(-2)
        along = g * tokens
        grad_weight = token_sums(along.flatten(0, -2))
        share = (along @ scale).unsqueeze(-1) * (r.square() / -x.shape[-1])
        grad_x = g.mul_(scale).addcmul_(tokens, share)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None, None


def zero_sum(k: Tensor) -> Tensor:
    """Return k [B, S, N, K] as it is; its gradient [B, S, N, K] sums to zero over the keys.

    For all keys of an attention without a mask, of which that is true: one vector added to each of them
    changes no softmax. The kernel's gradient misses it by the rounding of the attention's result, and a bias
    before the norm, whose own terms all but cancel, would collect what is left.
    """
    return _ZeroSum.apply(k)  # type: ignore[no-any-return,no-untyped-call]


class _ZeroSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        return k.view_as(k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mean = grad.mean(1, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32))
        return (grad - mean).to(grad.dtype)


def _split(x: Tensor, parts: int) -> Tensor:
    """Return x with its last axis in `parts`."""
    return x.reshape(*x.shape[:-1], parts, -1)


def _scaled_and_turned(
    y: Tensor, r: Tensor, cos: Tensor | None, sin: Tensor | None, way: int, own: bool
) -> Tensor:
    """Return r·y, contiguous, turned by the angles (way 1) or back (−1); y [B, l, N, K] wide, r [B, l, 1].
    own: whether it may be y's memory."""
    r = r.unsqueeze(-1)
    if cos is None or sin is None:
        return times(y, r, own).contiguous()
    sin = sin * way
    if torch.compiler.is_compiling():  # it makes no code for complex numbers
        return rotate(y, cos * r, sin * r).contiguous()
    # A gradient comes from attention with its axes in any order; a complex view needs pairs side by side.
    if y.stride(-1) != 1 or y.storage_offset() % 2 or any(step % 2 for step in y.stride()[:-1]):
        y, own = y.clone(memory_format=torch.contiguous_format), True
    pairs = torch.view_as_complex(_split(y, y.shape[-1] // 2))
    turned = pairs if own and y.is_contiguous() else pairs.new_empty(pairs.shape)
    torch.mul(pairs, torch.complex(cos * r, sin * r), out=turned)
    return torch.view_as_real(turned).flatten(-2)
