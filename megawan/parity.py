"""The layout never changes the numbers: one small run in many layouts, each compared with one rank alone.

`Bench` takes three AdamW steps on a tiny Wan, either as one rank with the whole batch, the loss written out
and the attention formula (`reference`), or over a world of ranks by plain torch (`plain`) or through the
DeepSpeed engine (`sharded`). `compare` says how far two such runs are apart. The tests run the whole grid.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from megawan import ds_config
from megawan.checkpoint import Fragment
from megawan.data.batch import Batch
from megawan.flow.loss import FlowMatching, FlowOptions, flow_loss
from megawan.models.attention import select_attention
from megawan.models.initial import InitialWeights
from megawan.models.variants import CLIP_TOKENS, WanConfig
from megawan.models.wan import LEAF_MODULES, WanModel, patchify
from megawan.optim import OptimOptions, build_optimizer, parameter_groups
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology, divisors, legal_ulysses
from megawan.rng import generator_at

PACKAGE = Path(__file__).resolve().parent
STEPS = 3
SEED = 11
# Steps large enough to move the weights, and clipping that bites. Adam's epsilon is far above rounding: it
# would otherwise turn the rounding of a gradient near zero into a whole step of either sign.
OPTIM = OptimOptions(learning_rate=1e-2, weight_decay=0.1, eps=1e-4, grad_clip=0.05, schedule="constant")
HEAD_WIDTH = 6
POLICIES = ("none", "full", "full:1", "attention", "selective", "attention:1,selective")
"""The recompute policies that every comparison goes through."""
# Large enough that attention tells its keys apart: gradients that almost cancel are mostly rounding.
NOISE = 0.2


class LivelyWeights(InitialWeights):
    """Initial weights with noise of this size on top: Wan's head starts at zero, which would keep every other
    gradient at zero."""

    def __init__(self, config: WanConfig, seed: int, noise: float = 0.05) -> None:
        super().__init__(config, seed)
        self.noise = noise

    def load(self, key: str) -> Tensor:
        """Return one tensor, CPU float32."""
        noise = torch.randn(self.shape(key), generator=generator_at(7, "lively", key))
        return super().load(key) + self.noise * noise


@dataclass(frozen=True)
class Problem:
    """What is trained: a kind of Wan, its attention heads, and the token grid (t, h, w) of each video."""

    task: Literal["t2v", "i2v", "ti2v"]
    heads: int
    grid: tuple[int, int, int]

    @property
    def config(self) -> WanConfig:
        """The tiny architecture."""
        dim = HEAD_WIDTH * self.heads
        config = WanConfig(
            self.task, dim=dim, ffn_dim=2 * dim, freq_dim=16, in_dim=4, out_dim=4, num_heads=self.heads,
            num_layers=2, text_dim=10, text_len=5,
        )  # fmt: skip
        return replace(config, in_dim=7, image_dim=8) if self.task == "i2v" else config

    @property
    def clean_frames(self) -> int:
        """Leading latent frames that are given clean and carry no loss."""
        return int(self.task == "ti2v")

    @property
    def tokens(self) -> int:
        """L, the tokens of one video."""
        return math.prod(self.grid)

    def describe(self) -> str:
        """Return the problem in a few words."""
        return f"{self.task} heads {self.heads} grid {'x'.join(map(str, self.grid))}"

    def batch(self, ids: Sequence[int], device: torch.device, dtype: torch.dtype) -> Batch:
        """Return these samples; each depends on its id alone."""
        drawn = [self._sample(sample_id) for sample_id in ids]
        latents, text, *image = (torch.stack(parts).to(device, dtype) for parts in zip(*drawn, strict=True))
        return Batch(
            latents,
            text,
            torch.tensor(list(ids)),
            torch.zeros(len(ids), dtype=torch.int64),
            ("",) * len(ids),
            *image,
        )

    def _sample(self, sample_id: int) -> tuple[Tensor, ...]:
        config, generator = self.config, generator_at(SEED, "sample", sample_id)
        (pt, ph, pw), (t, h, w) = config.patch_size, self.grid
        size = (t * pt, h * ph, w * pw)
        shapes = [(config.out_dim, *size), (config.text_len, config.text_dim)]
        if config.image_dim is not None:
            shapes += [(CLIP_TOKENS, config.image_dim), (config.in_dim - config.out_dim, *size)]
        drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        drawn[1][1 + sample_id % config.text_len :] = 0  # past the prompt's end
        return tuple(drawn)


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work, and how one rank does its part."""

    ulysses: int = 1
    ring: int = 1
    recompute: str = "none"
    micro_batch: int = 1
    accumulation: int = 1

    def describe(self, world_size: int) -> str:
        """Return the layout in a few words."""
        dp = world_size // (self.ulysses * self.ring)
        split = f"{self.micro_batch}x{self.accumulation}x{dp}"
        return f"dp {dp} ring {self.ring} ulysses {self.ulysses} batch {split} recompute {self.recompute}"


def global_batch(world_size: int) -> int:
    """Return the videos of one step: the least multiple of the ranks that is at least 4."""
    return world_size * -(-4 // world_size)


def layouts(world_size: int, heads: int, policies: Sequence[str]) -> list[Layout]:
    """Return every layout of this world: degrees that fit the heads, batch splits, recompute policies."""
    found = []
    for ulysses in legal_ulysses(world_size, heads):
        for ring in divisors(world_size // ulysses):
            videos = global_batch(world_size) * ulysses * ring // world_size  # of one context-parallel group
            for accumulation in divisors(videos):
                found += [
                    Layout(ulysses, ring, policy, videos // accumulation, accumulation) for policy in policies
                ]
    return found


@dataclass(frozen=True)
class Outcome:
    """What a run came to: loss and gradient norm of each step, the first step's gradient before clipping, and
    the parameters after the last."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart, each relative to the wanted value's size; not a number counts as
    infinite."""

    loss: float
    grad_norm: float
    gradient: float
    gradient_name: str
    parameter: float
    parameter_name: str

    def worst(self) -> float:
        """Return the largest of the four."""
        return max(self.loss, self.grad_norm, self.gradient, self.parameter)


def compare(found: Outcome, wanted: Outcome) -> Difference:
    """Return the largest differences over all steps and all tensors.

    A tensor's is its largest difference over its largest wanted element.
    """
    if (
        found.gradients.keys() != wanted.gradients.keys()
        or found.parameters.keys() != wanted.parameters.keys()
    ):
        raise ValueError("the two runs have parameters of different names")
    return Difference(
        max(map(relative_difference, found.losses, wanted.losses)),
        max(map(relative_difference, found.grad_norms, wanted.grad_norms)),
        *worst_tensor(found.gradients, wanted.gradients),
        *worst_tensor(found.parameters, wanted.parameters),
    )


def worst_tensor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of any tensor, relative to its largest wanted element, and its name."""
    return max(
        (_finite(float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12))), name)
        for name, value in wanted.items()
    )


def relative_difference(found: float, wanted: float) -> float:
    """Return the difference relative to the wanted value, infinite where it is not a number."""
    return _finite(abs(found - wanted) / max(abs(wanted), 1e-12))


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def build_model(
    problem: Problem, recompute: str, attention: str, device: torch.device, dtype: torch.dtype
) -> WanModel:
    """Return the tiny model; its values are left to the caller. attention: a kernel with a log-sum-exp."""
    kernel = select_attention(attention, device.type, dtype, head_dim=HEAD_WIDTH, need_lse=True)
    return WanModel(problem.config, attention=kernel, recompute=recompute).to(device, dtype)


class Bench:
    """One rank's side of the comparisons; process groups and reference runs are made once and kept."""

    def __init__(self, world_size: int, rank: int, device: torch.device, timeout_s: float) -> None:
        self.world_size = world_size
        self.rank = rank
        self.device = device
        self.timeout_s = timeout_s
        self.flow = FlowMatching(FlowOptions())
        # CUDA's fused kernels that give a log-sum-exp take half precision only.
        self.attention = "auto" if device.type == "cpu" else "math"
        self._contexts: dict[tuple[int, int], ContextParallel] = {}
        self._references: dict[tuple[Problem, torch.dtype], Outcome] = {}

    def context(self, layout: Layout) -> ContextParallel:
        """Return this rank's context in the layout's groups; collective the first time."""
        key = (layout.ulysses, layout.ring)
        if key not in self._contexts:
            topology = Topology(self.world_size, *key)
            self._contexts[key] = ContextParallel.create(topology, self.rank, self.timeout_s)
        return self._contexts[key]

    def reference(self, problem: Problem, dtype: torch.dtype) -> Outcome:
        """Return the run of one rank with the whole batch at once: no groups, no shards, no recomputation."""
        if (problem, dtype) not in self._references:
            model = self._filled(problem, "none", "math", dtype)
            self._references[problem, dtype] = _train(
                model, lambda step: self._written_out(model, problem, step, dtype)
            )
        return self._references[problem, dtype]

    def plain(self, problem: Problem, layout: Layout, dtype: torch.dtype) -> Outcome:
        """Return the run in `layout` by torch alone, gradients averaged over the world; collective."""
        context = self.context(layout)
        model = self._filled(problem, layout.recompute, self.attention, dtype)

        def backward(step: int) -> Tensor:
            total = torch.zeros((), dtype=dtype, device=self.device)
            for ids in self.shares(layout, step):
                loss = self.loss(model, problem, problem.batch(ids, self.device, dtype), context)
                (loss / layout.accumulation).backward()
                total += loss.detach() / layout.accumulation
            return self._average(model, total)

        return _train(model, backward)

    def sharded(self, problem: Problem, layout: Layout, stage: int) -> Outcome:
        """Return the run in `layout` through the DeepSpeed engine at a ZeRO stage, float32; collective."""
        from megawan import engine as engines  # imports DeepSpeed, which `plain` does not need

        context = self.context(layout)
        file = ds_config.find(f"ds_configs/zero{stage}.json", PACKAGE)
        resolved = ds_config.resolve(
            ds_config.read(file),
            where=str(file),
            micro_batch=layout.micro_batch,
            accumulation=layout.accumulation,
            world_size=self.world_size,
            grad_clip=OPTIM.grad_clip,
            precision="fp32",
            on_gpu=self.device.type == "cuda",
        )
        model = engines.build_model(
            lambda: build_model(problem, layout.recompute, self.attention, self.device, torch.float32),
            resolved,
            self.device,
        )
        engine = engines.initialize(model, LEAF_MODULES, resolved, OPTIM, STEPS)
        engines.load_weights(engine, LivelyWeights(problem.config, SEED, NOISE), lambda: None)
        losses, norms, gradients = [], [], dict[str, Tensor]()
        for step in range(STEPS):
            total = torch.zeros((), device=self.device)
            for ids in self.shares(layout, step):
                loss = self.loss(engine, problem, problem.batch(ids, self.device, torch.float32), context)
                engine.backward(loss)
                engines.optimizer_step(engine, OPTIM.grad_clip)
                total += loss.detach() / layout.accumulation
            torch.distributed.all_reduce(total)
            losses.append(float(total) / self.world_size)
            norms.append(engines.grad_norm(engine))
            if step == 0:  # Adam's first moment is (1 - beta1) times the clipped gradient
                scale = max(1.0, norms[0] / OPTIM.grad_clip) / (1 - OPTIM.beta1)
                moments = self._whole(
                    engines.fragments(engine), engines.true_shapes(engine.module), "exp_avg"
                )
                gradients = {name: value * scale for name, value in moments.items()}
        shapes = engines.true_shapes(engine.module)
        parameters = self._whole(engines.fragments(engine), shapes, "master")
        engine.destroy()
        return Outcome(losses, norms, gradients, parameters)

    @torch.no_grad()
    def _whole(
        self, fragments: Iterable[Fragment], shapes: Mapping[str, tuple[int, ...]], kind: str
    ) -> dict[str, Tensor]:
        """Return the whole tensors of one kind of state, put together from all ranks' shares; collective."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        everything = torch.zeros(sum(sizes), device=self.device)
        parts = dict(zip(shapes, everything.split(sizes), strict=True))
        for piece in fragments:
            if piece.kind == kind:
                parts[piece.name][piece.start : piece.start + piece.values.numel()] += piece.values.flatten()
        torch.distributed.all_reduce(everything)
        return {name: parts[name].view(shape) for name, shape in shapes.items()}

    def shares(self, layout: Layout, step: int) -> list[range]:
        """Return the sample ids of this rank's micro-batches at `step`; a context-parallel group has the
        same."""
        dp_rank, size = self.rank // (layout.ulysses * layout.ring), layout.micro_batch
        first = step * global_batch(self.world_size) + dp_rank * layout.accumulation * size
        return [range(first + i * size, first + (i + 1) * size) for i in range(layout.accumulation)]

    def loss(self, model: nn.Module, problem: Problem, batch: Batch, context: ContextParallel) -> Tensor:
        """Return this rank's loss: its own tokens' part, times the size of the context-parallel group."""
        pred, target, weight = self._predict(model, problem, batch, context)
        here, skipped = context.local_length(problem.tokens), _clean_tokens(problem)
        place = torch.arange(here, device=self.device) + context.rank * here
        return flow_loss(
            pred,
            context.shard(target),
            weight,
            valid=(place >= skipped) & (place < problem.tokens),
            valid_tokens=problem.tokens - skipped,
            cp_size=context.size,
        ).loss

    def _predict(
        self, model: nn.Module, problem: Problem, batch: Batch, context: ContextParallel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's velocity tokens, the whole target tokens and the samples' weights."""
        sample = self.flow.sample(
            batch.latents,
            seed=SEED,
            sample_ids=batch.sample_ids,
            epochs=batch.epochs,
            clean_frames=problem.clean_frames,
        )
        pred = model(
            sample.x_t,
            sample.timestep,
            batch.text,
            context=context,
            clean_frames=sample.clean_frames,
            clip=batch.clip,
            condition=batch.condition,
        )
        return pred, patchify(sample.target, problem.config.patch_size), sample.weight

    def _written_out(self, model: nn.Module, problem: Problem, step: int, dtype: torch.dtype) -> Tensor:
        """Leave the whole batch's gradient and return its loss, as the specification writes it."""
        size = global_batch(self.world_size)
        batch = problem.batch(range(step * size, (step + 1) * size), self.device, dtype)
        pred, target, weight = self._predict(model, problem, batch, ContextParallel.single())
        per_sample = (pred - target)[:, _clean_tokens(problem) :].square().mean(dim=(1, 2))
        loss = (per_sample * weight.to(dtype)).mean()
        loss.backward()
        return loss.detach()

    def _filled(self, problem: Problem, recompute: str, attention: str, dtype: torch.dtype) -> WanModel:
        model = build_model(problem, recompute, attention, self.device, dtype)
        weights = LivelyWeights(problem.config, SEED, NOISE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.load(name))
        return model

    def _average(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Put the mean over the world into every gradient, and return the loss's; one message."""
        parameters = list(model.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        everything = torch.cat([loss.view(1), *(_grad(parameter).flatten() for parameter in parameters)])
        if self.world_size > 1:
            torch.distributed.all_reduce(everything)
        everything /= self.world_size
        mean, *parts = everything.split([1, *(parameter.numel() for parameter in parameters)])
        for parameter, part in zip(parameters, parts, strict=True):
            _grad(parameter).copy_(part.view_as(parameter))
        return mean[0]


def _train(model: nn.Module, backward: Callable[[int], Tensor]) -> Outcome:
    """Return what the steps came to; `backward(step)` leaves the step's gradient and returns its loss."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), shapes, OPTIM.weight_decay), OPTIM)
    losses, norms, gradients = [], [], dict[str, Tensor]()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(backward(step))
        if step == 0:
            gradients = {name: _grad(parameter).clone() for name, parameter in model.named_parameters()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip))
        optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Outcome([float(loss) for loss in losses], [float(norm) for norm in norms], gradients, parameters)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _clean_tokens(problem: Problem) -> int:
    _, height, width = problem.grid
    return problem.clean_frames * height * width
