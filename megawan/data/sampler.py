"""The order of samples as a pure function of (seed, step): no state, so nothing to save and nothing to lose.

Samples of one latent shape form a bucket. The endless row of a bucket is cut into groups (as long as the
global batch, unless said otherwise), so every group has one shape, and the buckets take turns: over the
rounds each has its share exactly. Where several datasets have samples of a shape, they take turns in its row
likewise. A dataset's samples of a shape, shuffled anew each epoch, are an endless row too: every sample comes
once an epoch, and none is dropped: a last part that does not fill a group is filled up from the next epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from megawan.data.streams import Shape, Stream
from megawan.rng import generator_at


class Place(NamedTuple):
    """One place of a global batch."""

    sample_id: int
    epoch: int
    stream: int
    """Which of the order's streams the sample is of."""


class GlobalOrder:
    """Which samples each optimizer step trains on, whatever ranks, micro-batches or workers share the
    work."""

    def __init__(
        self, streams: Sequence[Stream], *, seed: int, global_batch: int, group: int | None = None
    ) -> None:
        """`group`: how many places in a row have one shape; default all of a step.

        Raises ValueError without samples, for a global batch below 1 and a group that does not divide it.
        """
        group = global_batch if group is None else group
        if not streams or any(not stream.samples or stream.weight <= 0 for stream in streams):
            raise ValueError("there are no samples to order")
        if global_batch < 1:
            raise ValueError(f"the global batch must be 1 or more, got {global_batch}")
        if group < 1 or global_batch % group:
            raise ValueError(f"groups of {group} places do not divide the global batch of {global_batch}")
        self.streams = list(streams)
        self._seed = seed
        self._group = group
        self._groups = global_batch // group
        buckets: dict[Shape, list[int]] = {}
        for number, stream in enumerate(self.streams):
            buckets.setdefault(stream.shape, []).append(number)
        self._buckets = [buckets[shape] for shape in sorted(buckets)]
        weights = [
            sum((self.streams[number].weight for number in bucket), Fraction()) for bucket in self._buckets
        ]
        # A round of the buckets is a pass over as many places as there are samples.
        samples = sum(len(stream.samples) for stream in self.streams)
        self._turns = _Turns([samples * w / sum(weights) / group for w in weights], seed, "round")
        # A round within a bucket is as long as a group: in each, every dataset has nearly its share.
        self._turns_within = [
            _Turns(
                [group * self.streams[number].weight / weight for number in bucket],
                seed,
                "mix",
                str(self.streams[bucket[0]].shape),
            )
            for bucket, weight in zip(self._buckets, weights, strict=True)
        ]
        self._shuffled: dict[tuple[int, int], Tensor] = {}  # the permutations in use, not state of the order

    def step(self, step: int) -> list[Place]:
        """Return the places of optimizer step `step` (from 0), group by group."""
        places = []
        for group in range(step * self._groups, (step + 1) * self._groups):
            bucket, number = self._turns.at(group)
            for offset in range(number * self._group, (number + 1) * self._group):
                turn, passed = self._turns_within[bucket].at(offset)
                places.append(self._place(self._buckets[bucket][turn], passed))
        return places

    def _place(self, number: int, passed: int) -> Place:
        stream = self.streams[number]
        epoch, index = divmod(passed, len(stream.samples))
        if (number, epoch) not in self._shuffled:
            # Only neighbouring epochs of a stream are ever in use together.
            self._shuffled = {
                used: row for used, row in self._shuffled.items() if used[0] != number or used[1] == epoch - 1
            }
            generator = generator_at(self._seed, "order", stream.key, epoch)
            self._shuffled[number, epoch] = torch.randperm(len(stream.samples), generator=generator)
        return Place(stream.samples[int(self._shuffled[number, epoch][index])], epoch, number)


@dataclass(frozen=True)
class _Round:
    number: int
    first: int
    turns: list[tuple[int, int]]


class _Turns:
    """An endless row of turns: in round r, taker i has floor((r + 1)·quota_i) − floor(r·quota_i) of them, in
    shuffled order. Over the rounds each has its share exactly."""

    def __init__(self, quotas: Sequence[Fraction], seed: int, *position: str) -> None:
        self._whole = math.lcm(*(quota.denominator for quota in quotas))
        self._quotas = [int(quota * self._whole) for quota in quotas]
        self._seed, self._position = seed, position
        self._recent: list[_Round] = []  # the rounds in use, not state

    def at(self, turn: int) -> tuple[int, int]:
        """Return who has turn `turn` (from 0), and how many turns it had before."""
        if len(self._quotas) == 1:
            return 0, turn
        for known in self._recent:
            if 0 <= turn - known.first < len(known.turns):
                return known.turns[turn - known.first]
        self._recent = [self._round(self._round_of(turn)), *self._recent[:1]]
        return self.at(turn)

    def _round_of(self, turn: int) -> int:
        if self._recent:  # mostly the next one
            known = self._recent[0]
            end = known.first + len(known.turns)
            if end <= turn < self._first_of(known.number + 2):
                return known.number + 1
        low, high = 0, 1
        while self._first_of(high) <= turn:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._first_of(middle) <= turn else (low, middle)
        return low

    def _first_of(self, round_number: int) -> int:
        return sum([round_number * quota // self._whole for quota in self._quotas])

    def _round(self, number: int) -> _Round:
        passed = [number * quota // self._whole for quota in self._quotas]
        after = [(number + 1) * quota // self._whole for quota in self._quotas]
        queue = [
            taker
            for taker, (low, high) in enumerate(zip(passed, after, strict=True))
            for _ in range(low, high)
        ]
        # Takers are shuffled, not their turns: each keeps its own order, so its epochs do not mix.
        shuffle = torch.randperm(len(queue), generator=generator_at(self._seed, *self._position, number))
        first, turns = sum(passed), []
        for index in shuffle.tolist():
            taker = queue[index]
            turns.append((taker, passed[taker]))
            passed[taker] += 1
        return _Round(number, first, turns)
