"""Ring attention: every rank keeps its queries, the blocks of keys and values travel around.

Attention to a block gives (out, lse); the blocks merge exactly by their log-sum-exps. Without a causal mask
every block costs the same, so contiguous blocks are balanced. (Liu et al. 2023, arXiv:2310.01889.) A
forward sends 2 (L/P)·D numbers P − 1 times; a backward the same again and the gradients of keys and values,
in float32, as often.
Letters: B batch, l this rank's tokens, N heads, K head width, P ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megawan.parallel.kernel import AttentionKernel

VALUES, GRADIENTS = 0, 1  # message tags: both kinds are under way at once in the backward pass


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: AttentionKernel,
    group: dist.ProcessGroup,
    lengths: Sequence[int],
) -> Tensor:
    """Return attention of q to all ranks' k and v, [B, l, N, K], as q, k, v.

    lengths: how many tokens each rank of the ring holds; they may differ and be 0, no padding is attended.
    """
    if len(lengths) != group.size() or q.shape[1] != lengths[group.rank()] or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"rank {group.rank()} of a ring of {group.size()} has {q.shape[1]} queries and {k.shape[1]} keys,"
            f" but the ring's lengths are {list(lengths)}"
        )
    return _RingAttention.apply(q, k, v, kernel, group, tuple(lengths))  # type: ignore[no-any-return,no-untyped-call]


def merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention to two sets of keys from that to each, out [B, l, N, K], lse [B, N, l].

    lse = log(exp(lse_1) + exp(lse_2)), out = Σ exp(lse_i − lse)·out_i; all in the dtype of `out`, float32
    or more.
    """
    total = torch.logaddexp(lse, block_lse)
    return out * _weight(lse, total) + block.to(out.dtype) * _weight(block_lse, total), total


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """Return exp(part − total) as [B, l, N, 1]."""
    return (part - total).exp().transpose(1, 2).unsqueeze(-1)


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: AttentionKernel,
    group: dist.ProcessGroup,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return (out [B, l, N, K] as q, lse [B, N, l] in float32 or wider), outside autograd."""
    rank, size = group.rank(), group.size()
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q, dtype=wide), None
    block = torch.stack((k, v))
    for step in range(size):
        arriving = None
        if step + 1 < size:
            arriving = _Exchange(block, lengths[(rank - step - 1) % size], group, VALUES)
        if lengths[rank] and lengths[(rank - step) % size]:
            part, part_lse = kernel.forward_lse(q, block[0], block[1])
            if lse is None:
                out, lse = part.to(wide), part_lse.to(wide)
            else:
                out, lse = merge(out, lse, part, part_lse.to(wide))
        if arriving is not None:
            block = arriving.wait()
    if lse is None:  # no query here
        lse = q.new_zeros((q.shape[0], q.shape[2], 0), dtype=wide)
    return out.to(q.dtype), lse.contiguous()


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel: AttentionKernel,
    group: dist.ProcessGroup,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of this rank's q, k and v, from `ring_forward`'s out and lse; two ranks or more."""
    rank, size = group.rank(), group.size()
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dout = torch.zeros_like(q, dtype=wide), dout.contiguous()

    def gradient(keys: Tensor, values: Tensor) -> Tensor:
        """Add to dq; return what this rank's queries give these keys and values, [2, B, l, N, K]."""
        if not keys.shape[1] or not q.shape[1]:
            return keys.new_zeros((2, *keys.shape), dtype=wide)
        dq_part, dk_part, dv_part = kernel.backward(dout, q, keys, values, out, lse)
        dq.add_(dq_part)
        return torch.stack((dk_part, dv_part)).to(wide)

    # The own block comes last: its gradient starts at the next rank, needs size − 1 steps home and makes the
    # last of them while this rank attends.
    arriving = _Exchange(torch.stack((k, v)), lengths[(rank - 1) % size], group, VALUES)
    found: _Exchange | None = None
    for step in range(1, size):
        block, following = arriving.wait(), lengths[(rank - step - 1) % size]
        if step + 1 < size:
            arriving = _Exchange(block, following, group, VALUES)
        dblock = gradient(block[0], block[1])
        if found is not None:  # what the ranks before this one found for the same block
            dblock += found.wait()
        found = _Exchange(dblock, following, group, GRADIENTS)
    assert found is not None
    dk, dv = gradient(k, v).add_(found.wait()).to(k.dtype)
    return dq.to(q.dtype), dk, dv


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: AttentionKernel,
        group: dist.ProcessGroup,
        lengths: tuple[int, ...],
    ) -> Tensor:
        out, lse = ring_forward(q, k, v, kernel, group, lengths)
        ctx.kernel, ctx.group, ctx.lengths = kernel, group, lengths
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ring_backward(dout, q, k, v, out, lse, ctx.kernel, ctx.group, ctx.lengths)
        return dq, dk, dv, None, None, None


class _Exchange:
    """A block on its way to the next rank of the ring while another arrives from the previous one.

    Both ends know both lengths, and nothing is sent for an empty block.
    """

    def __init__(self, block: Tensor, arriving: int, group: dist.ProcessGroup, tag: int) -> None:
        rank, size = group.rank(), group.size()
        shape = (*block.shape[:2], arriving, *block.shape[3:])
        self.sent = block.contiguous()  # kept alive until it has left
        self.received = torch.empty(shape, dtype=block.dtype, device=block.device)
        ranks = dist.get_process_group_ranks(group)
        operations = []
        if self.sent.numel():
            operations.append(dist.P2POp(dist.isend, self.sent, ranks[(rank + 1) % size], group, tag))
        if self.received.numel():
            operations.append(dist.P2POp(dist.irecv, self.received, ranks[(rank - 1) % size], group, tag))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """Return the block that arrived, [2, B, l, N, K], once both ways are done."""
        for work in self.works:
            work.wait()
        return self.received
