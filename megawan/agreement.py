"""What all ranks agree on at the start of a step, in one small message over the host: that a context-parallel
group holds the same samples, and whether anybody wants a checkpoint."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as torch_dist

from megawan import dist
from megawan.cli import RunFailed
from megawan.data.batch import Batch

# In rising order: the strongest of all ranks' wishes counts.
_REASONS = (
    "",
    "--checkpoint.save_minutes have passed",
    "asked by the file save",
    "asked by the file save_quit",
    "warned by SIGUSR1",
    "warned by SIGTERM",
)
_FIRST_THAT_QUITS = 3
_RANKS = 1 << 20  # more than any world


@dataclass(frozen=True)
class Request:
    """What the end of this step should bring, the same on all ranks."""

    reason: str
    """Why to save, in words for the log; empty when nobody asks."""
    quit: bool
    """Whether the run ends after the save."""
    late_s: float
    """How long the first rank waited for the last one at the start of the step before, in seconds."""
    last_rank: int
    """The one that all waited for."""


class StepAgreement:
    """Asks all ranks once a step; collective to create.

    A person asks for a checkpoint with `touch OUTPUT/save` or `touch OUTPUT/save_quit`: rank 0 sees the file
    and takes it away.
    """

    def __init__(
        self,
        folder: Path,
        save_minutes: float,
        warning: dist.PreemptionWarning,
        group: int,
        groups: int,
        timeout_s: float,
    ) -> None:
        """`group`: this rank's data-parallel place of `groups`; its context-parallel group shares it."""
        self._folder = folder
        self._seconds = save_minutes * 60
        self._warning = warning
        self._place, self._places = group, groups
        # On the host: asking must not wait for the kernels that a step left running on the GPU.
        self._group = dist.host_group(timeout_s)
        self._last_save = time.monotonic()
        self._waited = 0.0

    def ask(self, samples: str) -> Request:
        """Return what any rank wants; collective. `samples`: what `describe_samples` says of this rank's
        step.

        Raises RunFailed on every rank when a context-parallel group has not the same samples of the same
        shapes in the same order: it would train on garbage, or hang in its first exchange.
        """
        mine = _digest(samples)
        # The largest digest and the largest negative one of a place tell whether all its ranks have the same.
        vote = torch.full((2 * self._places + 3,), torch.iinfo(torch.int64).min)
        vote[2 * self._place], vote[2 * self._place + 1], vote[-1] = mine, -mine, self._wish()
        # The rank that waited least is the one that the others waited for.
        waited, rank = int(self._waited * 1e6), torch_dist.get_rank()
        vote[-3], vote[-2] = waited, -(waited * _RANKS + rank)
        began = time.monotonic()
        torch_dist.all_reduce(vote, op=torch_dist.ReduceOp.MAX, group=self._group)
        self._waited = time.monotonic() - began
        pairs = vote[:-3].view(-1, 2).tolist()
        broken = [place for place, (high, low) in enumerate(pairs) if high != -low]
        if broken:
            raise RunFailed(
                f"the ranks of data-parallel place {broken[0]} read different samples; this one has"
                f" {samples}: is --data.path the same on all nodes?"
            )
        level = int(vote[-1])
        least, last_rank = divmod(-int(vote[-2]), _RANKS)
        late_s = (int(vote[-3]) - least) / 1e6
        return Request(_REASONS[level], level >= _FIRST_THAT_QUITS, late_s, last_rank)

    def saved(self) -> None:
        """Count --checkpoint.save_minutes from now."""
        self._last_save = time.monotonic()

    def _wish(self) -> int:
        if self._warning.came:
            return _REASONS.index(f"warned by {self._warning.came}")
        if not dist.is_main():
            return 0
        for level, name in ((3, "save_quit"), (2, "save")):
            try:
                (self._folder / name).unlink()
                return level
            except OSError:  # not there; or not ours to remove: it would ask at every step
                continue
        return int(0 < self._seconds <= time.monotonic() - self._last_save)


def describe_samples(micro_batches: Sequence[Batch]) -> str:
    """Return which samples of what shapes a step trains on, in words."""
    return "; ".join(
        f"samples {batch.sample_ids.tolist()} epochs {batch.epochs.tolist()} of {list(batch.latents.shape)}"
        for batch in micro_batches
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
