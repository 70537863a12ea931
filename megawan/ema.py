"""An exponential moving average of the fp32 masters, sharded as they are: no gathers, 4 bytes a parameter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True)
class EmaOptions:
    """Averaged weights beside the trained ones; choose at export with --weights ema."""

    decay: float = 0.0
    """Share of the average that each update keeps, such as 0.9999; 0 keeps no average. The first updates keep
    less, (1 + n) / (10 + n), so that the start is forgotten."""


def check(options: EmaOptions) -> None:
    """Raise ValueError for a decay outside 0 .. 1."""
    if not 0 <= options.decay < 1:
        raise ValueError(f"--ema.decay {options.decay} must be 0 or more and below 1")


class ShardedEma:
    """The average of one rank's flat fp32 masters; `buffers` mirror them one to one."""

    def __init__(self, masters: Sequence[Tensor], options: EmaOptions) -> None:
        self.buffers = [master.detach().clone() for master in masters]
        self._decay = options.decay

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], updates: int) -> None:
        """Move the average towards the masters; `updates` counts the optimizer's, this one included."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(decay)(self.buffers, [master.detach() for master in masters], updates)
