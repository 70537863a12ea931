"""Attention whose result outlives the forward pass, so that recomputing a block does not repeat it.

The recomputation runs neither the kernel nor any exchange: it finds the output in this rank's tokens (what
the output projection needs) and the log-sum-exp. The gradient needs more. With Ulysses, the q, k and v of
this rank's heads came from other ranks; they are kept too (`Kept.exchanged`: 3 hidden vectors a token) or
fetched again in the one all-to-all that brings the output's gradient (3/4 of a forward pass on the wire).
The output in this rank's heads is needed by neither way: kernels use it only for Σ dout·out of each row, one
number a head and token that travels instead.
Letters: B batch, l tokens of a rank, N heads, K head width, P ranks of Ulysses, n = N/P.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megawan.parallel.collectives import pad
from megawan.parallel.kernel import AttentionKernel, Kept
from megawan.parallel.ring import ring_backward, ring_forward
from megawan.parallel.ulysses import heads_for_tokens, tokens_for_heads

# Gradients below this are nothing: a floor under divisors that keeps their square in float32's range.
TINY = 1e-18


@dataclass(frozen=True)
class Spread:
    """How one attention is spread over ranks; by default it is not."""

    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    lengths: tuple[int, ...] = (0,)
    """True tokens of each block of the ring."""
    ring_rank: int = 0

    def forward_lse(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of q, k, v without padding, in this rank's heads."""
        if self.ring is None:
            return kernel.forward_lse(q, k, v)
        return ring_forward(q, k, v, kernel, self.ring, self.lengths)

    def backward(
        self, kernel: AttentionKernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) without padding, in this rank's heads."""
        if self.ring is None:
            return kernel.backward(dout, q, k, v, out, lse)
        return ring_backward(dout, q, k, v, out, lse, kernel, self.ring, self.lengths)

    def heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in this rank's heads with the tokens of its block, without padding."""
        if self.ulysses is None and self.ring is None:
            return tensors
        if self.ulysses is not None:
            tensors = heads_for_tokens(self.ulysses, *tensors)
        return tuple(x[:, : self.lengths[self.ring_rank]] for x in tensors)

    def tokens(self, held: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in this rank's `held` tokens with all heads: the inverse of `heads`."""
        if self.ulysses is None:
            return tensors if self.ring is None else tuple(pad(x, 1, held) for x in tensors)
        whole = held * self.ulysses.size()
        return tokens_for_heads(self.ulysses, *(pad(x, 1, whole) for x in tensors))


def kept_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: object, kept: Kept, spread: Spread | None = None
) -> Tensor:
    """Return attention of q to k and v, [B, l, N, K], computed only where `kept` holds nothing yet.

    Differentiable. Raises ValueError for a kernel without log-sum-exp.
    """
    if not isinstance(kernel, AttentionKernel):
        raise ValueError(
            "keeping an attention's result needs a kernel with forward_lse and backward (an AttentionKernel),"
            f" not {kernel!r}"
        )
    return _KeptAttention.apply(q, k, v, kernel, kept, spread or Spread())  # type: ignore[no-any-return,no-untyped-call]


def row_stand_in(dout: Tensor, row: Tensor) -> Tensor:
    """Return a tensor x like dout with Σ dout·x = row, the shortest one: dout·row / Σ dout².

    dout: [B, l, N, K]; row: [B, l, N, 1], float32 or wider. It takes the place of an attention output of
    which only that sum is known. Where dout vanishes, so does x.
    """
    wide = dout.to(row.dtype)
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=TINY)
    return (wide / norm * (row / norm)).to(dout.dtype)


class _KeptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel, kept: Kept, spread: Spread
    ) -> Tensor:
        travelled = spread.ulysses is not None
        found = kept.read()
        if found is None:
            inputs = spread.heads(q, k, v)
            in_heads, lse = spread.forward_lse(kernel, *inputs)
            (out,) = spread.tokens(q.shape[1], in_heads)
            kept.write(out.detach(), lse, *(inputs if travelled and kept.exchanged else ()))
        else:
            out, lse, *held = (x.detach() for x in found)
            inputs = tuple(held)
        ctx.has_inputs = travelled and kept.exchanged
        ctx.kernel, ctx.spread = kernel, spread
        ctx.save_for_backward(*(inputs if ctx.has_inputs else (q, k, v)), out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        spread: Spread = ctx.spread
        held = dout.shape[1]
        if spread.ulysses is None:
            q, k, v, dout, out = spread.heads(q, k, v, dout, out)
        else:
            wide = torch.promote_types(out.dtype, torch.float32)
            row = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
            if ctx.has_inputs:
                (dout,) = spread.heads(dout)
            else:
                q, k, v, dout = spread.heads(q, k, v, dout)
            out = row_stand_in(dout, *spread.heads(row))
        dq, dk, dv = spread.tokens(held, *spread.backward(ctx.kernel, dout, q, k, v, out, lse))
        return dq, dk, dv, None, None, None
