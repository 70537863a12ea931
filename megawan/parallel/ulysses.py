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


def heads_for_tokens(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors [B, P·l, n, K], all ranks' tokens and this rank's heads, from [B, l, N, K].

    One all-to-all carries them all; they share shape and dtype.
    """
    by_rank = [rearrange(x, "b l (p n) k -> p b l n k", p=group.size()) for x in tensors]
    received = all_to_all(torch.stack(by_rank, dim=1), group)
    return tuple(rearrange(received, "p many b l n k -> many b (p l) n k"))


def tokens_for_heads(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors [B, l, N, K], this rank's tokens with all heads, from [B, P·l, n, K]."""
    by_rank = [rearrange(x, "b (p l) n k -> p b l n k", p=group.size()) for x in tensors]
    received = all_to_all(torch.stack(by_rank, dim=1), group)
    return tuple(rearrange(received, "p many b l n k -> many b l (p n) k"))
