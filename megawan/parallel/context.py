"""One video over many ranks: what the model calls, and the identity for one rank.

The flattened (t, h, w) sequence of L tokens is cut into `size` contiguous slices of ceil(L / size); the
last ones are zero padded at the global end, and the padding is sliced off again before attention. There is
no mask and the result is exact for every L.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from megawan.parallel.collectives import all_gather, pad, shard
from megawan.parallel.kept import Spread, kept_attention
from megawan.parallel.kernel import AttentionKernel, Kept
from megawan.parallel.ring import ring_attention
from megawan.parallel.topology import Topology
from megawan.parallel.ulysses import heads_for_tokens, tokens_for_heads

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class ContextParallel:
    """This rank's place among the ranks that share one video: rank = ring_rank · ulysses_size + ulysses_rank.

    Build it with `single()` or `create(...)`. Gradients are those of the sum of all ranks' losses.
    """

    def __init__(
        self,
        cp_group: dist.ProcessGroup | None,
        ulysses_group: dist.ProcessGroup | None,
        ring_group: dist.ProcessGroup | None,
    ) -> None:
        self._cp_group = cp_group
        self._ulysses_group = ulysses_group
        self._ring_group = ring_group
        self.size = 1 if cp_group is None else cp_group.size()
        self.rank = 0 if cp_group is None else cp_group.rank()
        self.ulysses_size = 1 if ulysses_group is None else ulysses_group.size()
        self.ring_size = 1 if ring_group is None else ring_group.size()

    @classmethod
    def single(cls) -> ContextParallel:
        """Return the context of one rank: every method is the identity and no process group is needed."""
        return cls(None, None, None)

    @classmethod
    def create(cls, topology: Topology, rank: int, timeout_s: float) -> ContextParallel:
        """Return the context of global rank `rank`, with groups whose waits end after `timeout_s` seconds.

        Collective: every rank of the world calls it with the same topology. Raises ValueError when the
        topology is not that of the running world, before any group is made.
        """
        if topology.cp_size == 1:
            return cls.single()
        if not dist.is_initialized() or dist.get_world_size() != topology.world_size:
            running = dist.get_world_size() if dist.is_initialized() else "no process group"
            raise ValueError(
                f"a topology of {topology.world_size} ranks needs a world of that size, not {running}"
            )
        ulysses = _own_group(topology.ulysses_groups(), rank, timeout_s)
        ring = _own_group(topology.ring_groups(), rank, timeout_s)
        if topology.ring_degree == 1:
            return cls(ulysses, ulysses, None)
        if topology.ulysses_degree == 1:
            return cls(ring, None, ring)
        return cls(_own_group(topology.cp_groups(), rank, timeout_s), ulysses, ring)

    def local_length(self, length: int) -> int:
        """Return ceil(length / size), the tokens that each rank holds, padding included."""
        return -(-length // self.size)

    def local_range(self, length: int) -> tuple[int, int]:
        """Return the true global tokens [start, stop) that this rank holds; start == stop if it has none."""
        here = self.local_length(length)
        return min(self.rank * here, length), min((self.rank + 1) * here, length)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's slice of x along `dim`: local_length(x.shape[dim]) long, zeros past the end."""
        if self._cp_group is None:
            return x
        return shard(x, dim, self.rank, self.local_length(x.shape[dim]))

    def gather(self, x: Tensor, length: int, dim: int = 1) -> Tensor:
        """Return the whole of what `shard` cut, `length` long along `dim`, on every rank.

        The gradient sums over the ranks: if each computes the same loss from it, average or divide by `size`.
        """
        self._require_local(x, length, dim)
        if self._cp_group is None:
            return x
        rows = all_gather(x.movedim(dim, 0), self._cp_group)
        return rows.flatten(0, 1)[:length].movedim(0, dim).contiguous()

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over the ranks, same shape and dtype, without gradient."""
        if self._cp_group is None:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total, group=self._cp_group)
        return total / self.size

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, kernel: Attention, length: int, kept: Kept | None = None
    ) -> Tensor:
        """Return attention of this rank's tokens to all `length` tokens, [B, l, N, K] as q, k and v.

        Padded rows of the output are 0. kernel: attention on whole sequences; with ring_size > 1 or `kept` an
        AttentionKernel, else ValueError. kept: where a forward pass that will be recomputed leaves its
        result, see `parallel.kept`. Raises ValueError when the heads do not divide by ulysses_size or the
        tensors are not local_length(length) long.
        """
        for x in (q, k, v):
            self._require_local(x, length, 1)
        if q.shape[2] % self.ulysses_size:
            raise ValueError(f"{q.shape[2]} heads do not divide by ulysses_size {self.ulysses_size}")
        if self.ring_size > 1 and not isinstance(kernel, AttentionKernel):
            raise ValueError(
                f"ring_size {self.ring_size} needs an attention kernel with forward_lse and backward"
                f" (an AttentionKernel), not {kernel!r}"
            )
        held = q.shape[1] * self.ulysses_size
        lengths = tuple(min(max(length - block * held, 0), held) for block in range(self.ring_size))
        if kept is not None:
            spread = Spread(self._ulysses_group, self._ring_group, lengths, self.rank // self.ulysses_size)
            return kept_attention(q, k, v, kernel, kept, spread)
        if self._cp_group is None:
            return kernel(q, k, v)
        if self._ulysses_group is not None:
            q, k, v = heads_for_tokens(self._ulysses_group, q, k, v)
        q, k, v = (x[:, : lengths[self.rank // self.ulysses_size]] for x in (q, k, v))
        if self._ring_group is None:
            out = kernel(q, k, v)
        else:
            assert isinstance(kernel, AttentionKernel)
            out = ring_attention(q, k, v, kernel, self._ring_group, lengths)
        out = pad(out, 1, held)
        return out if self._ulysses_group is None else tokens_for_heads(self._ulysses_group, out)[0]

    def _require_local(self, x: Tensor, length: int, dim: int) -> None:
        if x.shape[dim] != self.local_length(length):
            raise ValueError(
                f"dimension {dim} of {tuple(x.shape)} must be {self.local_length(length)}: a rank's share of"
                f" {length} tokens over {self.size} ranks"
            )


def _own_group(groups: list[list[int]], rank: int, timeout_s: float) -> dist.ProcessGroup | None:
    """Return the new group that holds `rank`, None for groups of one; all ranks make all, in one order."""
    if len(groups[0]) == 1:
        return None
    timeout = datetime.timedelta(seconds=timeout_s)
    made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    own = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
