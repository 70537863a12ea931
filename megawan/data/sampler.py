"""The order of samples as a pure function of (seed, step): no state, so nothing to save and nothing to lose.

Samples of one latent shape form a bucket. A bucket's samples, shuffled anew each epoch, make one endless row
that is cut into global batches, so every batch has one shape, every sample comes once an epoch, and none is
dropped: a last part that does not fill a batch is filled up from the next epoch. In round r a bucket of n
samples puts floor((r + 1)·n / G) − floor(r·n / G) batches of G samples into the run, in a shuffled order over
the buckets: over the rounds each has its share exactly. With one bucket this is simply the row itself.
"""

from collections.abc import Sequence

import torch

from megawan.rng import generator_at

Shape = tuple[int, ...]
Place = tuple[int, int]  # (sample id, epoch)


class GlobalOrder:
    """Which samples each optimizer step trains on, whatever ranks, micro-batches or workers share the
    work."""

    def __init__(self, shapes: Sequence[Shape], *, seed: int, global_batch: int) -> None:
        """Raises ValueError without samples or for a global batch below 1."""
        if not shapes:
            raise ValueError("there are no samples to order")
        if global_batch < 1:
            raise ValueError(f"the global batch must be 1 or more, got {global_batch}")
        self._seed = seed
        self._batch = global_batch
        buckets: dict[Shape, list[int]] = {}
        for sample_id, shape in enumerate(shapes):
            buckets.setdefault(tuple(shape), []).append(sample_id)
        self._buckets = [buckets[shape] for shape in sorted(buckets)]
        self._shuffled: dict[
            tuple[int, int], list[int]
        ] = {}  # the permutations in use, not state of the order

    def step(self, step: int) -> list[Place]:
        """Return the global batch of optimizer step `step` (from 0): (sample id, epoch) of each of its
        places."""
        bucket, number = self._batch_of(step)
        return [self._place(bucket, number * self._batch + offset) for offset in range(self._batch)]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """Return (bucket, which of its batches) that step takes."""
        low, high = 0, 1
        while self._batches_before(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        queue = [
            (bucket, number)
            for bucket, samples in enumerate(self._buckets)
            for number in range(low * len(samples) // self._batch, (low + 1) * len(samples) // self._batch)
        ]
        if len(self._buckets) > 1:
            # A shuffle of buckets only: batches of one bucket keep their order, so its epochs do not mix.
            shuffle = torch.randperm(len(queue), generator=generator_at(self._seed, "round", low)).tolist()
            turns = [queue[index][0] for index in shuffle]
            following = {
                bucket: iter([entry for entry in queue if entry[0] == bucket]) for bucket in set(turns)
            }
            queue = [next(following[bucket]) for bucket in turns]
        return queue[step - self._batches_before(low)]

    def _batches_before(self, round_number: int) -> int:
        return sum(round_number * len(samples) // self._batch for samples in self._buckets)

    def _place(self, bucket: int, place: int) -> Place:
        samples = self._buckets[bucket]
        epoch, index = divmod(place, len(samples))
        key = (bucket, epoch)
        if key not in self._shuffled:
            # Only neighbouring epochs of a bucket are ever in use together.
            self._shuffled = {
                used: row for used, row in self._shuffled.items() if used[0] != bucket or used[1] == epoch - 1
            }
            generator = generator_at(self._seed, "order", bucket, epoch)
            self._shuffled[key] = torch.randperm(len(samples), generator=generator).tolist()
        return samples[self._shuffled[key][index]], epoch


def micro_batch_places(
    places: Sequence[Place], *, micro_batch: int, accumulation: int, dp_rank: int, dp_size: int
) -> list[list[Place]]:
    """Return this data-parallel rank's micro-batches of a global batch, one list per accumulation step.

    Raises ValueError when micro_batch x accumulation x dp_size is not the number of places.
    """
    if micro_batch * accumulation * dp_size != len(places) or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"micro_batch {micro_batch} x accumulation {accumulation} x dp {dp_size} is not the global batch"
            f" of {len(places)}, or dp_rank {dp_rank} is not below {dp_size}"
        )
    starts = [(turn * dp_size + dp_rank) * micro_batch for turn in range(accumulation)]
    return [list(places[start : start + micro_batch]) for start in starts]
