"""From the order to batches: reads samples, replaces bad ones, drops prompts, collates; in this process or in
reading processes."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from megawan.data.balance import deal, imbalance
from megawan.data.batch import Batch, Replaced, Sample, collate
from megawan.data.replacement import BadSamples, BadTally, read_or_replace
from megawan.data.sampler import GlobalOrder, Place
from megawan.data.streams import Shape, Stream
from megawan.rng import generator_at

MAX_BAD = 0.01


class Samples(Protocol):
    """What a latent store offers to the loader."""

    @property
    def streams(self) -> list[Stream]:
        """The samples by latent shape, with their weights."""
        ...

    @property
    def being_filled(self) -> bool:
        """Whether reading may wait for a sample that is not there yet."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of a row of text features."""
        ...

    @property
    def empty_text(self) -> Tensor:
        """Features of the empty prompt, float32 [S, text_dim]."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Sample: ...

    def where(self, sample_id: int) -> str:
        """The file that holds a sample, in words."""
        ...


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
    shape_group: int = 0,
    costs: Mapping[Shape, float] | None = None,
    max_bad: float = MAX_BAD,
) -> Iterator[list[Batch]]:
    """Return an endless iterator over optimizer steps from `start_step` on, each a list of `accumulation`
    batches.

    The global batch of a step depends on (seed, step, micro_batch x accumulation x dp_size, shape_group)
    alone: any split into ranks, micro-batches and `workers` trains on the same samples with the same dropped
    prompts. `shape_group`: how many places in a row have one latent shape; 0 is the whole global batch. With
    several shapes in a step, `costs` (by latent shape; default: their sizes) decide who takes which.

    Raises ValueError for a split that is none. The iterator raises BadSamples when too much cannot be read.
    """
    global_batch = micro_batch * accumulation * dp_size
    group = shape_group or global_batch
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not below dp_size {dp_size}")
    if group % micro_batch:
        raise ValueError(
            f"a micro-batch of {micro_batch} has one shape and does not divide groups of {group}"
        )
    order = GlobalOrder(data.streams, seed=seed, global_batch=global_batch, group=group)
    if costs is None:
        costs = {stream.shape: float(math.prod(stream.shape)) for stream in order.streams}
    cut = _Cut(order, costs, micro_batch, accumulation, dp_rank, dp_size)
    loader = DataLoader(
        _MicroBatches(data, cut, seed, text_len, prompt_dropout),
        batch_size=None,
        sampler=_From(start_step * accumulation),
        num_workers=workers,
        # Started fresh: a forked copy of a process that holds gloo threads or a GPU can hang.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return _steps(loader, accumulation, BadTally(len(data), max_bad, f"data-parallel rank {dp_rank}"))


def _steps(
    loader: "DataLoader[Batch | _Failed]", accumulation: int, tally: BadTally
) -> Iterator[list[Batch]]:
    flat = iter(loader)
    while True:
        batches = []
        for batch in itertools.islice(flat, accumulation):
            if isinstance(batch, _Failed):
                raise BadSamples(batch.problem)
            tally.add(batch)
            batches.append(batch)
        yield batches


@dataclass(frozen=True)
class _Failed:
    """What a reading process gives instead of a batch: an exception of its would bring its traceback."""

    problem: str


class _From(Sampler[int]):
    """Counts up from `start` without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


class _Cut:
    """This data-parallel rank's part of every step."""

    def __init__(
        self,
        order: GlobalOrder,
        costs: Mapping[Shape, float],
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.streams = order.streams
        self._order = order
        self._costs = [costs[stream.shape] for stream in order.streams]
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._last: tuple[int, list[list[Place]], float] | None = None  # turns of one step come together

    def places(self, number: int) -> tuple[list[Place], float]:
        """Return the places of micro-batch `number` of the run (step x accumulation + turn), and the
        imbalance of its step."""
        step, turn = divmod(number, self._accumulation)
        if self._last is None or self._last[0] != step:
            places, size = self._order.step(step), self._micro_batch
            micro_batches = [places[start : start + size] for start in range(0, len(places), size)]
            costs = [self._costs[micro_batch[0].stream] for micro_batch in micro_batches]
            dealt = deal(costs, self._accumulation, self._dp_size)
            mine = [micro_batches[ranks[self._dp_rank]] for ranks in dealt]
            self._last = step, mine, imbalance(costs, dealt)
        return self._last[1][turn], self._last[2]


class _MicroBatches(Dataset["Batch | _Failed"]):
    """This rank's micro-batches by number."""

    def __init__(self, data: Samples, cut: _Cut, seed: int, text_len: int, prompt_dropout: float) -> None:
        self._data = data
        self._cut = cut
        self._seed = seed
        self._text_len = text_len
        self._prompt_dropout = prompt_dropout

    def __getitem__(self, number: int) -> "Batch | _Failed":
        places, unevenness = self._cut.places(number)
        try:
            read = [self._read(place) for place in places]
            batch = collate(
                [sample for _, sample, _ in read],
                [sample_id for sample_id, _, _ in read],
                [place.epoch for place in places],
                self._text_len,
            )
        except (ValueError, OSError) as error:
            if self._data.being_filled and not isinstance(error, BadSamples):
                raise  # what the filling process has to say
            return _Failed(str(error))
        bad = tuple(each for _, _, some in read for each in some)
        return replace(batch, replaced=bad, imbalance=unevenness)

    def _read(self, place: Place) -> tuple[int, Sample, tuple[Replaced, ...]]:
        stream = self._cut.streams[place.stream]
        sample_id, sample, bad = read_or_replace(
            self._data.__getitem__,
            self._data.where,
            # A stand-in that is not encoded yet would wait for an encoder that waits for the training.
            samples=() if self._data.being_filled else stream.samples,
            shape=stream.shape,
            text_dim=self._data.text_dim,
            sample_id=place.sample_id,
            epoch=place.epoch,
            seed=self._seed,
        )
        if self._prompt_dropout > 0:
            draw = torch.rand(1, generator=generator_at(self._seed, "prompt_dropout", sample_id, place.epoch))
            if float(draw) < self._prompt_dropout:
                sample = replace(sample, text=self._data.empty_text, prompt="")
        return sample_id, sample, bad
