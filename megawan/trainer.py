"""What trains: the sharded model, its optimizer and its groups, and one optimizer step of them.

Which steps there are, when one is saved and what is said about it is megawan/train.py's; a step alone is also
what tools/replay_step.py takes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megawan import dist, filler
from megawan import engine as engines
from megawan.checkpoint import EMA, Fragment, StepWeights
from megawan.data.batch import Batch
from megawan.data.loader import make_loader
from megawan.data.streams import dataset_of
from megawan.ema import ShardedEma
from megawan.flow.loss import FlowLoss, FlowSample, flow_loss
from megawan.metrics import LossMeter
from megawan.models.layouts import TensorSource
from megawan.models.wan import LEAF_MODULES, WanModel, patchify, token_grid, unpatchify
from megawan.parallel.context import ContextParallel
from megawan.plan import Plan
from megawan.step_times import StepTimes

if TYPE_CHECKING:  # codecs, which a run without videos does not need
    from megawan.previews import Preview


@dataclass(frozen=True)
class Drawn:
    """What one micro-batch of a step was trained at; the tensors stay on the device."""

    batch: Batch
    sigma: Tensor
    """float32 [B]."""
    mse: Tensor
    """float32 [B], unweighted, of this rank's tokens times cp_size: its mean over the context-parallel group
    is the video's."""


@dataclass(frozen=True)
class Taken:
    """One optimizer step as this rank took it."""

    tokens: int
    """Tokens with loss, of this data-parallel rank's videos."""
    updated: bool
    """Whether the weights moved; the same on all ranks."""
    drawn: list[Drawn]
    weight_delta: float | None = None
    """L2 norm of what the step changed in the fp32 masters of all ranks, where it was asked for."""


class Trainer:
    """The model of a plan in training, one rank's part of it; every method is collective."""

    def __init__(self, plan: Plan, device: torch.device, context: ContextParallel | None = None) -> None:
        """Build model, optimizer and groups; the weights are left for `start` or `resume`.

        `context`: groups of the same topology that are there already. Raises ExtensionError (engine.py).
        """
        self.plan = plan
        self.device = device
        self.context = context or ContextParallel.create(
            plan.topology, torch_dist.get_rank(), plan.config.dist_timeout
        )
        self.kernel = plan.select_attention(device.type)
        model = engines.build_model(self._make, plan.deepspeed, device)
        self.engine = engines.initialize(model, LEAF_MODULES, plan.deepspeed, plan.config.optim, plan.steps)
        self.average: ShardedEma | None = None
        self.steps_done = 0
        """Optimizer steps behind these weights, skipped ones included."""

    def _make(self) -> WanModel:
        return WanModel(
            self.plan.variant.config,
            attention=self.kernel,
            recompute=self.plan.recompute,
            offload=self.plan.offload,
            compiled=self.plan.config.model.compile,
        )

    def start(self, source: TensorSource, tick: Callable[[], None]) -> None:
        """Fill the weights; `tick` is called after each tensor."""
        engines.load_weights(self.engine, source, tick)
        self._begin_average()

    def resume(self, saved: StepWeights, tick: Callable[[], None]) -> None:
        """Fill weights, moments, learning rate and average as they were; raises ValueError when the
        checkpoint is of another model. `tick` is called twice for each tensor."""
        saved.require(engines.true_shapes(self.engine.module), f"--model.variant {self.plan.variant.name}")
        engines.load_weights(self.engine, saved, tick)
        engines.load_optimizer(self.engine, saved, tick)
        self._begin_average()
        if self.average is not None and saved.has_ema:
            engines.load_buffers(self.engine, saved, EMA, self.average.buffers)
        self.steps_done = saved.step

    def _begin_average(self) -> None:
        if self.plan.config.ema.decay:
            self.average = ShardedEma(engines.master_buffers(self.engine), self.plan.config.ema)

    def fragments(self) -> Iterator[Fragment]:
        """Yield what a checkpoint of this rank holds: views of masters, moments and average."""
        yield from engines.fragments(self.engine)
        if self.average is not None:
            yield from engines.cut(self.engine, EMA, self.average.buffers)

    def state(self) -> dict[str, Any]:
        """Return what else a checkpoint says, as JSON: what a resume compares, and what a person wants to
        know."""
        return {**self.plan.state(), "skipped_steps": self.skipped_steps}

    @property
    def skipped_steps(self) -> int:
        """How many steps of this run left the weights as they were."""
        return int(self.engine.skipped_steps)

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """Return the micro-batches of every step after `start`, as this rank's data-parallel group takes
        them."""
        options = self.plan.config
        batches = make_loader(
            self.plan.data,
            seed=options.seed,
            micro_batch=options.micro_batch,
            accumulation=options.accumulation,
            dp_rank=self.dp_rank,
            dp_size=self.plan.topology.dp_size,
            text_len=self.plan.variant.config.text_len,
            prompt_dropout=options.data.prompt_dropout,
            start_step=start,
            workers=options.data.workers,
            shape_group=options.data.shape_group,
            costs=self.plan.sample_costs,
            max_bad=options.data.max_bad,
        )
        return filler.paced(
            batches,
            self.plan.data,
            seed=options.seed,
            global_batch=self.plan.global_batch,
            group=options.data.shape_group or self.plan.global_batch,
            start=start,
            steps=self.plan.steps,
            say=dist.say,
        )

    @property
    def grad_norm(self) -> float:
        """The global gradient norm before clipping of the last step (synchronises with the device)."""
        return engines.grad_norm(self.engine)

    @property
    def dp_rank(self) -> int:
        """This rank's data-parallel place, which its context-parallel group shares."""
        return self.plan.topology.coordinates(torch_dist.get_rank())[0]

    def step(
        self,
        micro_batches: Sequence[Batch],
        meter: LossMeter,
        times: StepTimes | None = None,
        measure_delta: bool = False,
    ) -> Taken:
        """Take one optimizer step over `micro_batches`, on this device.

        The specification's §2, one t per sample: draw sigma and noise, noise the latents, predict the
        velocity, weighted MSE. All ranks of a context-parallel group draw the same and each takes the loss
        of its own tokens. `measure_delta`: also say how far the step moved the masters; they are held twice
        while the optimizer works.
        """
        options, times = self.plan.config, times or StepTimes(self.device)
        tokens, updated, drawn, before = 0, True, list[Drawn](), list[Tensor]()
        for turn, batch in enumerate(micro_batches, start=1):
            with times.device("forward"):
                sample = self.plan.flow.sample(
                    batch.latents,
                    seed=options.seed,
                    sample_ids=batch.sample_ids,
                    epochs=batch.epochs,
                    clean_frames=self.plan.clean_frames,
                )
                result, valid_tokens = self._compare(batch, sample)
            meter.add(
                result.loss, result.per_sample, sample.sigma, sample.weight, dataset_of(batch.sample_ids)
            )
            drawn.append(Drawn(batch, sample.sigma, result.per_sample))
            with times.device("backward"):
                self.engine.backward(self._bounded(result.loss, result.per_sample))
            if measure_delta and turn == len(micro_batches):
                before = [master.detach().clone() for master in engines.master_buffers(self.engine)]
            with times.device("optimizer"):
                updated = engines.optimizer_step(self.engine, options.optim.grad_clip)
            tokens += batch.latents.shape[0] * valid_tokens
        self.steps_done += 1
        if updated and self.average is not None:
            self.average.update(engines.master_buffers(self.engine), self.steps_done - self.skipped_steps)
        return Taken(tokens, updated, drawn, engines.distance(self.engine, before) if before else None)

    def _compare(self, batch: Batch, sample: FlowSample) -> tuple[FlowLoss, int]:
        """Return the loss of the model's velocity on this rank's tokens, and how many tokens with loss the
        whole video has."""
        patch = self.plan.variant.config.patch_size
        pred = self._predict(
            sample.x_t, sample.timestep, batch.text, sample.clean_frames, batch.clip, batch.condition
        )
        valid, valid_tokens = loss_tokens(batch.latents, patch, sample.clean_frames, self.context)
        target = self.context.shard(patchify(sample.target, patch))
        loss = flow_loss(
            pred, target, sample.weight, valid=valid, valid_tokens=valid_tokens, cp_size=self.context.size
        )
        return loss, valid_tokens

    def _predict(
        self,
        x_t: Tensor,
        timestep: Tensor,
        text: Tensor,
        clean_frames: int,
        clip: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        """Return the velocity [B, L/cp, P] of this rank's tokens, as `WanModel.forward`."""
        pred: Tensor = self.engine(
            x_t,
            timestep,
            text,
            context=self.context,
            clean_frames=clean_frames,
            clip=clip,
            condition=condition,
        )
        return pred

    @torch.no_grad()
    def measure(self, batch: Batch, sample: FlowSample) -> Tensor:
        """Return the unweighted mse [B] of this rank's tokens times cp_size; nothing of the training
        changes."""
        return self._compare(batch, sample)[0].per_sample

    @torch.no_grad()
    def velocity(self, preview: "Preview", x_t: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Return the whole velocity [1, C, T, H, W] on every rank of the context-parallel group."""
        tokens = self._predict(x_t, timestep, text, self.plan.clean_frames, preview.clip, preview.condition)
        patch = self.plan.variant.config.patch_size
        grid = token_grid(tuple(x_t.shape[1:]), patch)
        return unpatchify(self.context.gather(tokens, math.prod(grid)), grid, patch)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a block inside which the model has the moving average's weights; collective."""
        assert self.average is not None
        return engines.other_weights(self.engine, self.average.buffers)

    def _bounded(self, loss: Tensor, mse: Tensor) -> Tensor:
        """Return the loss, not a number when a video's is above --optim.max_loss: the gradient norm of the
        whole world is then none either, and no rank updates. No rank waits for another, nor for the
        device."""
        limit = self.plan.config.optim.max_loss
        if math.isinf(limit):
            return loss
        return loss * torch.where(self.context.mean(mse).max() > limit, math.nan, 1.0)


def loss_tokens(
    latents: Tensor, patch: tuple[int, int, int], clean_frames: int, context: ContextParallel
) -> tuple[Tensor, int]:
    """Return which of this rank's tokens carry loss, bool [L/cp], and how many of the whole video do.

    Padding at the global end carries none, nor do the tokens of clean leading latent frames.
    """
    frames, height, width = token_grid(tuple(latents.shape[1:]), patch)
    length, skipped = frames * height * width, clean_frames * height * width
    here = context.local_length(length)
    place = torch.arange(here, device=latents.device) + context.rank * here
    return (place >= skipped) & (place < length), length - skipped
