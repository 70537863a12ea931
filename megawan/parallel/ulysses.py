"""Ulysses: exchange heads for tokens, attend to the whole block with a share of the heads, exchange back.

Two all-to-alls a layer, one for q, k and v together and one for the output: 4 (L/P)·D numbers of which
(P − 1)/P leave the rank. (Jacobs et al. 2023, arXiv:2309.14509.)
Letters: B batch, l tokens of a rank, N heads, n = N/P heads of a rank, K head width, P ranks.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from megawan.parallel.collectives import all_to_all


def heads_for_tokens(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [B, P·l, n, K]: all ranks' tokens, this rank's heads, from [B, l, N, K]."""
    by_rank = [rearrange(x, "b l (p n) k -> p b l n k", p=group.size()) for x in (q, k, v)]
    received = all_to_all(torch.stack(by_rank, dim=1), group)
    q, k, v = rearrange(received, "p three b l n k -> three b (p l) n k")
    return q, k, v


def tokens_for_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [B, l, N, K], this rank's tokens with all heads, from out [B, P·l, n, K]."""
    received = all_to_all(rearrange(out, "b (p l) n k -> p b l n k", p=group.size()), group)
    return rearrange(received, "p b l n k -> b l (p n) k")
