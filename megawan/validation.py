"""Validation whose curve can be read: the same held-out samples with the same noise at the same sigmas, every
time.

Two points of the curve differ by the model alone. The sigmas are stratified: each sample is looked at once in
each of `levels` equal slices of the trained range, at another place of the slice than the other samples. The
error is also given over that of the best constant answer, the negated mean of the latents: 1 is a model that
has learned nothing, 0 a perfect one, at any VAE and any size of model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megawan import dist
from megawan.data.batch import Batch, Sample, collate
from megawan.flow.loss import FlowMatching, FlowSample
from megawan.metrics import SIGMA_BINS
from megawan.parallel.topology import Topology
from megawan.rng import generator_at

SEED = 0  # of the noise and the choice of samples: of no run, so that runs of other seeds compare

# (batch, noised sample) -> unweighted mse [B] of this rank's tokens times cp_size, without gradient
Measure = Callable[[Batch, FlowSample], Tensor]


@dataclass(frozen=True)
class ValidationOptions:
    """Held-out loss, at fixed noise."""

    every: int = 0
    """Optimizer steps between two validations, the start and the end included; 0: none."""
    path: tuple[Path, ...] = ()
    """Latent store of samples that are not trained on, made as those of --data.path; without it, and without
    that, synthetic ones."""
    samples: int = 16
    """How many samples of it to look at."""
    levels: int = 10
    """Noise levels at which each is looked at, one in each of as many slices of the trained sigmas."""


def check(options: ValidationOptions) -> None:
    """Raise ValueError for numbers that measure nothing."""
    if options.every < 0:
        raise ValueError(f"--validation.every {options.every} must be 0 (none) or more")
    for name in ("samples", "levels"):
        if getattr(options, name) < 1:
            raise ValueError(f"--validation.{name} {getattr(options, name)} must be 1 or more")
    if len(options.path) > 1:
        raise ValueError(
            f"--validation.path takes one store, not {len(options.path)}; encode the held-out clips into one"
        )
    if options.path and not options.every:
        raise ValueError("--validation.path has no effect without --validation.every N")


class HeldOut(Protocol):
    """What a store offers here."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Latent shape of each sample."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Sample: ...


@dataclass(frozen=True)
class Look:
    """A sample at a noise level."""

    sample_id: int
    level: int
    sigma: float


def looks(count: int, asked: int, levels: int, low: float, high: float) -> list[Look]:
    """Return the looks at min(asked, count) of `count` samples, at sigmas that divide [low, high] evenly.

    Level j of the i-th sample lies in slice j, in its part (i + j) mod samples: all slices are filled alike,
    and no sample is always at the low end.
    """
    order = torch.randperm(count, generator=generator_at(SEED, "validation")).tolist()
    chosen = sorted(order[:asked])
    width = (high - low) / levels
    return [
        Look(sample_id, level, low + width * (level + ((i + level) % len(chosen) + 0.5) / len(chosen)))
        for i, sample_id in enumerate(chosen)
        for level in range(levels)
    ]


class Validation:
    """The looks of a run, divided among its ranks."""

    def __init__(
        self,
        store: HeldOut,
        flow: FlowMatching,
        options: ValidationOptions,
        topology: Topology,
        *,
        dp_rank: int,
        micro_batch: int,
        clean_frames: int,
        text_len: int,
    ) -> None:
        """Read the chosen samples once, for their mean. Raises ValueError naming what cannot be read."""
        self._store = store
        self._flow = flow
        self._levels = options.levels
        self._cp_size = topology.cp_size
        self._clean_frames = clean_frames
        self._text_len = text_len
        self._low, self._high = flow.window.low, min(flow.window.high, 1.0)
        self._looks = looks(len(store), options.samples, options.levels, self._low, self._high)
        self._means = channel_means([store[i] for i in sorted({look.sample_id for look in self._looks})])
        batches = self._batches(micro_batch)
        # Sharded weights are gathered by all ranks together: each must run as many batches as the others.
        # Where there are too few, one is run again and not counted.
        turns = range(dp_rank, -(-len(batches) // topology.dp_size) * topology.dp_size, topology.dp_size)
        self._mine = [(batches[turn % len(batches)], turn < len(batches)) for turn in turns]

    def describe(self) -> str:
        """Return what is looked at, for the start-up lines."""
        samples = len({look.sample_id for look in self._looks})
        return (
            f"validation: {samples} of {len(self._store)} held-out samples at {self._levels} noise levels"
            f" each, sigma {self._low:g}..{self._high:g}; eval/normalized 1 is the constant answer's error"
        )

    def _batches(self, micro_batch: int) -> list[list[int]]:
        """Return the looks by number, in batches of one latent shape."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, look in enumerate(self._looks):
            by_shape.setdefault(tuple(self._store.shapes[look.sample_id]), []).append(number)
        return [
            numbers[start : start + micro_batch]
            for _, numbers in sorted(by_shape.items())
            for start in range(0, len(numbers), micro_batch)
        ]

    @torch.no_grad()
    def run(self, measure: Measure, device: torch.device) -> dict[str, float]:
        """Return the points of the eval curves; collective, and the same at every layout up to rounding.

        loss: what the training loss would be, by its own draws and weights; mse: unweighted, over sigmas
        spread evenly; normalized: mse over that of the constant answer. The last two also for each tenth of
        sigma.
        """
        answers = torch.zeros(3, len(self._looks), dtype=torch.float64)
        for numbers, counted in self._mine:
            batch, sample = self._noised(numbers, device)
            mse = measure(batch, sample)
            if counted:
                constant = constant_answer_mse(sample, self._means)
                answers[:, numbers] = torch.stack((mse, constant, sample.weight)).to("cpu", torch.float64)
        # The ranks of a context-parallel group answer the same looks: mse in shares times the group's size.
        mse, constant, weight = dist.sum_over_ranks(answers) / self._cp_size
        return self._curves(mse, constant, weight)

    def _noised(self, numbers: Sequence[int], device: torch.device) -> tuple[Batch, FlowSample]:
        looks = [self._looks[number] for number in numbers]
        ids = [look.sample_id for look in looks]
        batch = collate([self._store[i] for i in ids], ids, [0] * len(ids), self._text_len)
        noise = torch.stack(
            [
                torch.randn(one.shape, generator=generator_at(SEED, "validation", look.sample_id, look.level))
                for one, look in zip(batch.latents, looks, strict=True)
            ]
        )
        batch = batch.to(device)
        sigma = torch.tensor([look.sigma for look in looks])
        return batch, self._flow.at_sigma(
            batch.latents, noise.to(device), sigma, clean_frames=self._clean_frames
        )

    def _curves(self, mse: Tensor, constant: Tensor, weight: Tensor) -> dict[str, float]:
        levels = torch.tensor([look.level for look in self._looks])
        of_level = torch.zeros(self._levels, dtype=torch.float64).index_add_(0, levels, weight * mse)
        of_level /= torch.bincount(levels, minlength=self._levels)
        curves = {
            "eval/loss": float((self._draws() * of_level).sum()),
            "eval/mse": float(mse.mean()),
            "eval/normalized": float(mse.sum() / constant.sum()),
        }
        tenths = torch.tensor([min(int(look.sigma * SIGMA_BINS), SIGMA_BINS - 1) for look in self._looks])
        for tenth in sorted(set(tenths.tolist())):
            here = tenths == tenth
            curves[f"eval/mse_by_sigma/q{tenth}"] = float(mse[here].mean())
            curves[f"eval/normalized_by_sigma/q{tenth}"] = float(mse[here].sum() / constant[here].sum())
        return curves

    def _draws(self) -> Tensor:
        """Return the share of the training's draws that falls into each slice, float64 [levels]."""
        place = (self._flow.scheduler.sigmas.double() - self._low) / (self._high - self._low) * self._levels
        slices = place.long().clamp(0, self._levels - 1)
        shares = torch.zeros(self._levels, dtype=torch.float64)
        return shares.index_add_(0, slices, self._flow.sampler.probability.double())


def channel_means(samples: Sequence[Sample]) -> Tensor:
    """Return the mean of each latent channel over all elements of the samples, float32 [C]."""
    sums = torch.stack([sample.latents.double().sum(dim=(1, 2, 3)) for sample in samples])
    return (sums.sum(0) / sum(sample.latents[0].numel() for sample in samples)).float()


def constant_answer_mse(sample: FlowSample, means: Tensor) -> Tensor:
    """Return the mse [B] of answering the mean velocity −means [C] everywhere, clean frames left out."""
    counted = sample.target[:, :, sample.clean_frames :].float()
    return (counted + means.to(counted.device)[:, None, None, None]).square().mean(dim=(1, 2, 3, 4))
