"""Differentiable collectives on the tensors of one group.

Each sends contiguous memory and returns contiguous memory, whatever strides autograd hands it: a collective
reads and fills raw memory in order, and `torch.empty_like` of a permuted gradient would keep the permuted
strides, which gives wrong gradients without any error.
The gradient is the adjoint for the sum of all ranks' losses, as everywhere in this package.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return y [P, ...] where y[i] is what rank i of the group's P has in x[this rank]; x is [P, ...]."""
    if x.shape[0] != group.size():
        raise ValueError(
            f"the first dimension of {tuple(x.shape)} must be {group.size()}, a row for each rank"
        )
    return _AllToAll.apply(x, group)  # type: ignore[no-any-return,no-untyped-call]


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return y [P, ...] where y[i] is rank i's x; all ranks' x have one shape."""
    return _AllGather.apply(x, group)  # type: ignore[no-any-return,no-untyped-call]


def shard(x: Tensor, dim: int, index: int, length: int) -> Tensor:
    """Return x[index·length : (index+1)·length] along `dim`, zero padded behind its end, contiguous.

    No communication: every rank holds the whole of x.
    """
    total = x.shape[dim]
    start, stop = min(index * length, total), min((index + 1) * length, total)
    piece = x.narrow(dim, start, stop - start)
    return pad(piece, dim, length).contiguous()


def pad(x: Tensor, dim: int, length: int) -> Tensor:
    """Return x with zeros behind its end along `dim`, `length` long; x itself if it is that already."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)


def exchange_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the all-to-all of x [P, ...] in fresh contiguous memory, without a gradient."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(y, x, group=group)
    return y


class _AllToAll(torch.autograd.Function):
    """Its own adjoint: element (i, j) goes to (j, i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange_rows(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return exchange_rows(dy, ctx.group), None


class _AllGather(torch.autograd.Function):
    """Its adjoint sums each rank's row over the ranks: a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        y = torch.empty((group.size(), *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather(list(y.unbind(0)), x, group=group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dy = dy.contiguous()
        dx = torch.empty(dy.shape[1:], dtype=dy.dtype, device=dy.device)
        dist.reduce_scatter(dx, list(dy.unbind(0)), group=ctx.group)
        return dx, None
