"""From the order to batches: reads samples, drops prompts, collates; in this process or in reading
processes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from megawan.data.batch import Batch, Sample, collate
from megawan.data.sampler import GlobalOrder, Place, micro_batch_places
from megawan.rng import generator_at


class Samples(Protocol):
    """What a latent store offers to the loader."""

    @property
    def shapes(self) -> Sequence[tuple[int, int, int, int]]:
        """Latent shape (C, T, H, W) of every sample, by id."""
        ...

    @property
    def empty_text(self) -> Tensor:
        """Features of the empty prompt, float32 [S, text_dim]."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def make_loader(
    data: Samples,
    *,
    seed: int,
    micro_batch: int,
    accumulation: int,
    dp_rank: int,
    dp_size: int,
    text_len: int,
    prompt_dropout: float,
    start_step: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """Return an endless iterator over optimizer steps from `start_step` on, each a list of `accumulation`
    batches.

    The global batch of a step depends on (seed, step, micro_batch x accumulation x dp_size) alone: any split
    into ranks, micro-batches and `workers` trains on the same samples with the same dropped prompts.
    """
    order = GlobalOrder(data.shapes, seed=seed, global_batch=micro_batch * accumulation * dp_size)
    dataset = _MicroBatches(
        data, order, seed, micro_batch, accumulation, dp_rank, dp_size, text_len, prompt_dropout
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_From(start_step * accumulation),
        num_workers=workers,
        # Started fresh: a forked copy of a process that holds gloo threads or a GPU can hang.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    flat = iter(loader)
    while True:
        yield list(itertools.islice(flat, accumulation))


class _From(Sampler[int]):
    """Counts up from `start` without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


class _MicroBatches(Dataset[Batch]):
    """Micro-batch number i of this rank, by number: step i // accumulation, turn i % accumulation."""

    def __init__(
        self,
        data: Samples,
        order: GlobalOrder,
        seed: int,
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        text_len: int,
        prompt_dropout: float,
    ) -> None:
        self._data = data
        self._order = order
        self._seed = seed
        self._split = {
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "dp_rank": dp_rank,
            "dp_size": dp_size,
        }
        self._text_len = text_len
        self._prompt_dropout = prompt_dropout

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self._split["accumulation"])
        places = micro_batch_places(self._order.step(step), **self._split)[turn]
        samples = [self._sample(place) for place in places]
        return collate(
            samples, [place[0] for place in places], [place[1] for place in places], self._text_len
        )

    def _sample(self, place: Place) -> Sample:
        sample = self._data[place[0]]
        if self._prompt_dropout > 0:
            draw = torch.rand(1, generator=generator_at(self._seed, "prompt_dropout", *place))
            if float(draw) < self._prompt_dropout:
                return replace(sample, text=self._data.empty_text, prompt="")
        return sample
