"""Everything a run decides before its first collective: one resolved plan, or one message that says what does
not fit.

Imports neither DeepSpeed nor a process group, so `--dry-run` answers on a laptop, and every rank comes to the
same plan by itself.
"""

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megawan import (
    checkpoint,
    cost,
    ds_config,
    ema,
    filler,
    metrics,
    optim,
    preview_options,
    profiling,
    validation,
)
from megawan.cli import UserError
from megawan.config import TrainConfig, to_dict
from megawan.data.filling import FillingError, FillingStore
from megawan.data.latents import LatentStore, StoredSamples
from megawan.data.mixture import ALIKE, Mixture
from megawan.data.synthetic import SyntheticLatents
from megawan.dist import Environment
from megawan.encode_options import EncodeOptions, checked_size
from megawan.flow.loss import FlowMatching, FlowOptions
from megawan.models.attention import Kernel, select_attention
from megawan.models.initial import InitialWeights
from megawan.models.layouts import OpenedWeights, open_weights
from megawan.models.recompute import Recompute, parse_recompute
from megawan.models.variants import Variant, get_variant
from megawan.models.wan import token_grid
from megawan.parallel.topology import Topology, divisors, legal_ulysses, validate
from megawan.rng import position_key
from megawan.sizes import (
    GIB,
    RESERVE,
    describe_memory,
    latent_shape,
    memory_layout,
    model_shape,
    require_trainable,
)

PACKAGE = Path(__file__).resolve().parent
AUTO = "auto"
NODE = 8  # ranks that Ulysses should stay within
DOUBLINGS = 8


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    config: TrainConfig
    variant: Variant
    topology: Topology
    data: StoredSamples | Mixture | SyntheticLatents
    flow: FlowMatching
    deepspeed: ds_config.Resolved
    steps: int
    clean_frames: int  # leading latent frames that are a clean condition (TI2V: 1) and carry no loss
    recompute: str  # --model.recompute, or what auto chose
    weights: str | None  # what --model.init_from was found to be
    held_out: StoredSamples | SyntheticLatents | None  # what validation looks at, every --validation.every

    @property
    def need_lse(self) -> bool:
        """Whether the attention kernel must give its log-sum-exp."""
        return self.topology.ring_degree > 1 or self._recompute.needs_lse

    @property
    def offload(self) -> bool:
        """Whether kept activations wait in CPU memory; not where auto found that nothing is recomputed."""
        return self.config.model.offload_activations and self.recompute != "none"

    @property
    def _recompute(self) -> Recompute:
        return parse_recompute(self.recompute, self.variant.config.num_layers, self.offload)

    @property
    def global_batch(self) -> int:
        """Videos of one optimizer step, over the whole world."""
        return self.config.micro_batch * self.config.accumulation * self.topology.dp_size

    @property
    def data_fingerprint(self) -> str:
        """What decides the samples of every step, beside seed and global batch."""
        group = self.config.data.shape_group
        return self.data.fingerprint + (f", groups of {group}" if group else "")

    @property
    def sample_costs(self) -> dict[tuple[int, ...], float]:
        """FLOPs of training on one video of each latent shape."""
        shape, patch = model_shape(self.variant.config), self.variant.config.patch_size
        return {each: float(cost.train_flops(shape, _tokens(each, patch))) for each in set(self.data.shapes)}

    @property
    def codec(self) -> str:
        """The video codec that made the latents; synthetic ones decode as noise, by the weightless one."""
        return "dct" if isinstance(self.data, SyntheticLatents) else str(self.data.settings["codec"])

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer and its states are on the CPU."""
        return cost_layout(self.config, self.topology, self.deepspeed).offload_optimizer

    @property
    def sample_flops(self) -> dict[tuple[int, ...], tuple[float, float]]:
        """Model and hardware FLOPs of training on one video of each latent shape."""
        shape, patch = model_shape(self.variant.config), self.variant.config.patch_size
        found = {}
        for each in set(self.data.shapes):
            tokens = _tokens(each, patch)
            hardware = cost.forward_flops(shape, tokens) + cost.backward_flops(shape, tokens)
            found[tuple(each)] = (
                float(cost.train_flops(shape, tokens)),
                float(hardware + self._repeated_flops(shape, tokens)),
            )
        return found

    def _repeated_flops(self, shape: cost.ModelShape, tokens: int) -> int:
        return sum(
            cost.recompute_flops(shape, tokens, policy, until)
            - cost.recompute_flops(shape, tokens, policy, start)
            for policy, start, until in self._recompute.ranges
        )

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint takes on the disk: fp32 master, two moments, and the moving average if kept."""
        return checkpoint_size(self.config, self.variant)

    @property
    def memory(self) -> cost.RankMemory:
        """GPU memory of a rank at the longest video."""
        layout = cost_layout(self.config, self.topology, self.deepspeed)
        tokens = longest_video(self.data, self.variant)
        return cost.rank_memory(model_shape(self.variant.config), tokens, self._recompute.split, layout)

    def select_attention(self, device_type: str) -> Kernel:
        """Return the attention kernel of this run. Raises ValueError when the one asked for does not fit."""
        wan = self.variant.config
        return select_attention(
            self.config.model.attention,
            device_type,
            torch.bfloat16 if self.deepspeed.precision == "bf16" else torch.float32,
            head_dim=wan.dim // wan.num_heads,
            need_lse=self.need_lse,
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of its run, as JSON: what a resume compares."""
        return {
            "variant": self.config.model.variant,
            "model": to_dict(self.variant.config),
            "config": to_dict(self.config),
            "data": self.data_fingerprint,
            "global_batch": self.global_batch,
        }

    def describe(self) -> list[str]:
        """Return the start-up lines: what trains, on what, how it is laid out, what it costs."""
        wan, config, layout = self.variant.config, self.config, self.topology
        shapes = sorted(set(self.data.shapes))
        tokens = [_tokens(shape, wan.patch_size) for shape in shapes]
        longest = max(tokens)
        shape = model_shape(wan)
        memory = self.memory
        repeated = self._repeated_flops(shape, longest)
        chosen = " (auto)" if config.model.recompute == AUTO else ""
        flops = 3 * cost.forward_flops(shape, longest) * self.global_batch
        spread = f"{min(tokens):,} to {longest:,}" if len(shapes) > 1 else f"{longest:,}"
        start = (
            f"weights of {config.model.init_from}"
            if config.model.init_from
            else f"random weights of seed {config.seed}"
        )
        return [
            f"model: {config.model.variant}, {cost.parameters(shape):,} parameters, {wan.num_heads} heads,"
            f" from {start}",
            *([f"weights: {self.weights}"] if self.weights else []),
            f"data: {self.data.describe()}; {spread} tokens a video",
            f"layout: {layout.world_size} ranks = dp {layout.dp_size} x ring {layout.ring_degree} x ulysses"
            f" {layout.ulysses_degree}; ZeRO stage {self.deepspeed.zero_stage}, {self.deepspeed.precision},"
            f" recompute {self.recompute}{chosen}{', offloaded' if self.offload else ''}"
            f"{', compiled' if config.model.compile else ''}",
            f"batch: {self.global_batch} videos a step = micro_batch {config.micro_batch} x accumulation"
            f" {config.accumulation} x dp {layout.dp_size}; {self.steps} steps ="
            f" {self.steps * self.global_batch / len(self.data):.1f} passes over {len(self.data)} samples"
            + (f"; every {config.data.shape_group} of one shape" if config.data.shape_group else ""),
            *([f"held out: {self.held_out.describe()}"] if self.held_out else []),
            *([self._passes(self.data)] if isinstance(self.data, Mixture) else []),
            self.flow.describe(),
            f"cost: {flops / 1e12:,.3g} TFLOP a step (recompute not counted); model states"
            f" {memory.states / GIB:,.3g} GiB a rank",
            f"memory: {describe_memory(memory)}; recompute adds"
            f" {repeated / cost.train_flops(shape, longest):.1%} FLOPs",
        ]

    def _passes(self, mixed: Mixture) -> str:
        passes = mixed.passes(self.steps * self.global_batch)
        return "passes: " + ", ".join(f"{name} {times:.1f}" for name, times in passes)


def require_inputs(plan: Plan) -> None:
    """Raise cli.UserError when the samples lack what the variant's forward pass takes."""
    variant = plan.variant
    try:
        require_trainable(variant)
    except ValueError as error:
        raise UserError(str(error)) from None
    stores: list[tuple[str, StoredSamples | Mixture | SyntheticLatents]] = []
    if not isinstance(plan.data, FillingStore):  # that is encoded for this very variant, and may come late
        stores.append((f"--data.path {' '.join(map(str, plan.config.data.path))}", plan.data))
    if plan.held_out is not None:
        stores.append((f"--validation.path {' '.join(map(str, plan.config.validation.path))}", plan.held_out))
    needed = {
        "CLIP features": (variant.config.has_clip, "clip"),
        "condition": (variant.condition_channels > 0, "condition"),
    }
    for given, store in stores:
        lacking = [name for name, (wanted, stored) in needed.items() if wanted and stored not in store.extras]
        if lacking:
            raise UserError(
                f"{given}: its samples have no {' and no '.join(lacking)}, which {variant.name} takes;"
                " encode for this variant"
            )


def make_plan(config: TrainConfig, place: Environment) -> Plan:
    """Return the plan of `config` on this world. Raises cli.UserError for whatever does not fit."""
    try:
        return _resolve(config, place)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None


def _resolve(config: TrainConfig, place: Environment) -> Plan:
    check_options(config)
    variant, topology = lay_out(config, place.world_size)
    data = open_data(config, variant, place.rank)
    steps = count_steps(config, topology, len(data))
    weights = None if config.model.init_from is None else open_start(config, variant).describe()
    resolved = read_deepspeed(config, topology)
    tokens = longest_video(data, variant)
    recompute = choose_recompute(config, variant, topology, resolved, tokens)
    plan = put_together(config, variant, topology, data, resolved, steps, recompute, weights)
    plan.select_attention("cuda" if torch.cuda.is_available() else "cpu")
    return plan


def check_options(config: TrainConfig) -> None:
    """Raise ValueError for a value that no run can have."""
    for name in ("steps", "micro_batch", "accumulation"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} must be 1 or more")
    if not config.dist_timeout > 0:
        raise ValueError(f"--dist_timeout {config.dist_timeout} must be above 0 seconds")
    if config.epochs is not None and config.epochs < 1:
        raise ValueError(f"--epochs {config.epochs} must be 1 or more")
    checkpoint.check(config.checkpoint)
    ema.check(config.ema)
    metrics.check(config.metrics)
    validation.check(config.validation)
    profiling.check(config.profile)
    if not 0 <= config.data.prompt_dropout <= 1:
        raise ValueError(f"--data.prompt_dropout {config.data.prompt_dropout} must lie between 0 and 1")
    if config.data.workers < 0:
        raise ValueError(f"--data.workers {config.data.workers} must be 0 or more")
    if not 0 <= config.data.max_bad <= 1:
        raise ValueError(f"--data.max_bad {config.data.max_bad} must lie between 0 and 1")


def lay_out(config: TrainConfig, world_size: int) -> tuple[Variant, Topology]:
    """Return what trains and how it is cut over the ranks. Raises ValueError naming legal layouts."""
    variant, asked = get_variant(config.model.variant), config.parallel
    validate(
        world_size, asked.ulysses_degree, asked.ring_degree, variant.config.num_heads, config.model.variant
    )
    topology = Topology(world_size, asked.ulysses_degree, asked.ring_degree)
    check_shape_group(config, topology)
    return variant, topology


def count_steps(config: TrainConfig, topology: Topology, samples: int) -> int:
    """Return the optimizer steps of the whole run. Raises ValueError for an optimizer that cannot take
    them."""
    steps = config.steps
    if config.epochs is not None:
        steps = -(-config.epochs * samples // (config.micro_batch * config.accumulation * topology.dp_size))
    optim.check(config.optim, steps)
    return steps


def read_deepspeed(config: TrainConfig, topology: Topology) -> ds_config.Resolved:
    """Return the settings of DeepSpeed's file with ours. Raises ValueError or FileNotFoundError naming it."""
    file = ds_config.find(config.deepspeed, PACKAGE)
    return ds_config.resolve(
        ds_config.read(file),
        where=f"--deepspeed {file}",
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        world_size=topology.world_size,
        grad_clip=config.optim.grad_clip,
        precision=config.precision,
        on_gpu=torch.cuda.is_available(),
    )


def checkpoint_size(config: TrainConfig, variant: Variant) -> int:
    """Return the bytes of one checkpoint."""
    return (16 if config.ema.decay else 12) * cost.parameters(model_shape(variant.config))


def longest_video(data: StoredSamples | Mixture | SyntheticLatents, variant: Variant) -> int:
    """Return the tokens of the longest video."""
    return max(_tokens(shape, variant.config.patch_size) for shape in set(data.shapes))


def put_together(
    config: TrainConfig,
    variant: Variant,
    topology: Topology,
    data: StoredSamples | Mixture | SyntheticLatents,
    resolved: ds_config.Resolved,
    steps: int,
    recompute: str,
    weights: str | None,
) -> Plan:
    """Return the plan of what was found. Raises ValueError for noise levels, held-out samples or previews
    that do not go with the variant."""
    clean_frames = 1 if variant.config.model_type == "ti2v" else 0
    flow, held_out = FlowMatching(expert_flow(config.flow, variant)), open_held_out(config, variant, data)
    plan = Plan(
        config, variant, topology, data, flow, resolved, steps, clean_frames, recompute, weights, held_out
    )
    preview_options.check(
        config.sample,
        codec=plan.codec,
        channels=variant.latent_channels,
        text_only=not (variant.condition_channels or variant.config.has_clip or clean_frames),
        expert=variant.expert,
        variant=variant.name,
    )
    return plan


def open_start(config: TrainConfig, variant: Variant) -> OpenedWeights | InitialWeights:
    """Return what a new run starts from: --model.init_from, every key and shape checked, or random weights.

    Raises ValueError or FileNotFoundError naming file, key, expected and found.
    """
    if config.model.init_from is None:
        return InitialWeights(variant.config, config.seed)
    return open_weights(
        config.model.init_from,
        variant.config,
        expert=variant.expert,
        initialise_missing=config.model.initialise_missing,
        seed=config.seed,
    )


def expert_flow(flow: FlowOptions, variant: Variant) -> FlowOptions:
    """Return the noise levels to train: of an A14B expert its own side of the boundary, unless a window is
    given.

    Raises ValueError for the window of another expert.
    """
    if variant.expert is not None and flow.expert not in (None, variant.name):
        raise ValueError(
            f"--flow.expert {flow.expert} is not --model.variant {variant.name}; leave --flow.expert out:"
            " the variant says it"
        )
    window = (flow.expert, flow.min_sigma, flow.max_sigma)
    fractions = (flow.min_timestep_boundary, flow.max_timestep_boundary)
    if variant.expert is None or any(value is not None for value in (*window, *fractions)):
        return flow
    if variant.expert == "high":
        return dataclasses.replace(flow, min_sigma=variant.boundary)
    return dataclasses.replace(flow, max_sigma=variant.boundary)


def choose_recompute(
    config: TrainConfig, variant: Variant, topology: Topology, resolved: ds_config.Resolved, tokens: int
) -> str:
    """Return --model.recompute, checked, or what auto makes of it for videos of `tokens` tokens.

    Raises ValueError for an illegal policy, for auto without a budget, and where no policy fits, naming the
    smallest layout in which one does.
    """
    layers, asked = variant.config.num_layers, config.model
    shape, layout = model_shape(variant.config), cost_layout(config, topology, resolved)
    split = [("full", layers)]
    if asked.recompute != AUTO:
        split = parse_recompute(asked.recompute, layers, asked.offload_activations).split
        if asked.memory_budget_gb is None:
            return asked.recompute
    budget = memory_budget(asked.memory_budget_gb)
    needed = cost.rank_memory(shape, tokens, split, layout)
    choice = cost.cheapest_recompute(shape, tokens, budget, layout)
    if asked.recompute != AUTO and needed.total <= budget:
        return asked.recompute
    if asked.recompute == AUTO and choice is not None:
        return choice.text
    instead = (
        f"recompute {choice.text} would fit"
        if choice is not None
        else smallest_layout(config, variant, topology.world_size, resolved, tokens, budget)
    )
    least = "auto: even full" if asked.recompute == AUTO else asked.recompute
    raise ValueError(
        f"recompute {least} needs {describe_memory(needed)}, and the budget is {budget / GIB:.3g}"
        f" GiB; {instead}"
    )


def smallest_layout(
    config: TrainConfig,
    variant: Variant,
    world_size: int,
    resolved: ds_config.Resolved,
    tokens: int,
    budget: int,
) -> str:
    """Return which layout would fit: of this world, else of the smallest one that doubling it reaches."""
    shape, heads = model_shape(variant.config), variant.config.num_heads
    for world in (world_size << doubling for doubling in range(DOUBLINGS)):
        # The fewest ranks a video first; Ulysses before ring, inside one node.
        degrees = sorted(
            ((u, r) for u in legal_ulysses(world, heads) if u <= NODE for r in divisors(world // u)),
            key=lambda degree: (degree[0] * degree[1], degree[1]),
        )
        for ulysses, ring in degrees:
            layout = cost_layout(config, Topology(world, ulysses, ring), resolved)
            choice = cost.cheapest_recompute(shape, tokens, budget, layout)
            if choice is not None:
                return (
                    f"{world} ranks with --parallel.ulysses_degree {ulysses} --parallel.ring_degree {ring}"
                    f" would fit with recompute {choice.text} ({choice.memory.total / GIB:.3g} GiB)"
                )
    return f"no layout of up to {world_size << (DOUBLINGS - 1)} ranks would fit"


def memory_budget(asked: float | None) -> int:
    """Return the bytes a rank may plan for. Raises ValueError where they are neither given nor known."""
    if asked is not None:
        if not asked > 0:
            raise ValueError(f"--model.memory_budget_gb {asked} must be above 0")
        return int(asked * GIB)
    if not torch.cuda.is_available():
        raise ValueError("--model.recompute auto needs --model.memory_budget_gb: there is no GPU to ask")
    return int(torch.cuda.get_device_properties(0).total_memory * (1 - RESERVE))


def cost_layout(config: TrainConfig, topology: Topology, resolved: ds_config.Resolved) -> cost.Layout:
    """Return what of the run decides the memory of a rank."""
    return memory_layout(
        resolved.config["zero_optimization"],
        resolved.precision,
        topology.world_size,
        topology.ulysses_degree,
        topology.ring_degree,
        config.micro_batch,
        config.model.offload_activations,
    )


def check_shape_group(config: TrainConfig, topology: Topology) -> None:
    """Raise ValueError, listing what is legal, for a --data.shape_group that cannot cut the global batch."""
    group, micro_batch = config.data.shape_group, config.micro_batch
    groups = config.accumulation * topology.dp_size
    legal = [micro_batch * number for number in divisors(groups)]
    if group and group not in legal:
        raise ValueError(
            f"--data.shape_group {group} must be a multiple of --micro_batch {micro_batch} and divide the"
            f" global batch of {micro_batch * groups}; legal: 0, {', '.join(map(str, legal))}"
        )


def open_data(config: TrainConfig, variant: Variant, rank: int) -> StoredSamples | Mixture | SyntheticLatents:
    """Return the latents that the run trains on, checked against the variant.

    With --data.source, rank 0 starts the process that fills the store. Raises ValueError when a store is of
    another VAE, another text encoder, or other clip sizes than asked, and when stores do not go together.
    """
    wan, asked = variant.config, config.data
    if asked.source is None and config.encode != EncodeOptions():
        raise ValueError("--encode.* says how --data.source is encoded; give it, or leave --encode.* out")
    if asked.source is not None and len(asked.path) != 1:
        raise ValueError(f"--data.source {asked.source} needs --data.path, the one store to fill")
    if asked.source is not None and (asked.weights or asked.image_share is not None):
        raise ValueError("--data.weights and --data.image_share take finished stores, not --data.source")
    if not asked.path:
        if asked.weights or asked.image_share is not None:
            given = "weights" if asked.weights else "image_share"
            raise ValueError(f"--data.{given} divides latent stores; give them with --data.path")
        shape = latent_shape(
            9 if asked.num_frames is None else asked.num_frames,
            64 if asked.height is None else asked.height,
            64 if asked.width is None else asked.width,
            variant.latent_channels,
            variant.vae_stride,
            wan.patch_size,
        )
        return SyntheticLatents(
            shape=shape,
            text_dim=wan.text_dim,
            text_len=wan.text_len,
            seed=config.seed,
            clip=(wan.clip_tokens, wan.image_dim) if wan.clip_tokens and wan.image_dim else None,
            condition_channels=variant.condition_channels,
        )
    stores = [open_store(path, config, variant, rank) for path in asked.path]
    if len(stores) == 1 and not asked.weights and asked.image_share is None:
        return stores[0]
    return Mixture(
        [store for store in stores if isinstance(store, LatentStore)], asked.weights, asked.image_share
    )


def open_held_out(
    config: TrainConfig, variant: Variant, data: StoredSamples | Mixture | SyntheticLatents
) -> StoredSamples | SyntheticLatents | None:
    """Return the samples that validation looks at, None for no validation.

    Raises ValueError for a store that the variant cannot take or that was made otherwise than what is
    trained on, and where there is none beside a store that is trained on.
    """
    asked = config.validation
    if not asked.every:
        return None
    if not asked.path:
        if not isinstance(data, SyntheticLatents):
            raise ValueError(
                "--validation.every needs --validation.path, a latent store of clips that are not trained"
                " on: tools/encode_dataset.py with the same settings on other clips"
            )
        return data.another(position_key(config.seed, "held out"))
    (path,) = asked.path
    store = check_store(LatentStore(path), f"--validation.path {path}", config, variant)
    if not isinstance(data, SyntheticLatents):
        for name in ALIKE:
            ours, theirs = data.settings.get(name), store.settings.get(name)
            if ours != theirs:
                raise ValueError(
                    f"--validation.path {path}: {name} is {theirs!r}, but {ours!r} in what is trained on;"
                    " encode both alike"
                )
    return store


def open_store(path: Path, config: TrainConfig, variant: Variant, rank: int) -> StoredSamples:
    """Return the store of this folder. Raises ValueError when it is not what the variant or --data.* asks."""
    store, stride = open_folder(path, config, variant, rank), variant.vae_stride
    check_store(store, f"--data.path {path}", config, variant)
    for axis, name in enumerate(("num_frames", "height", "width")):
        size, first = getattr(config.data, name), 1 if axis == 0 else 0  # the first frame is a latent
        held = {(shape[axis + 1] - first) * stride[axis] + first for shape in store.shapes}
        if size is not None and held != {size}:
            raise ValueError(
                f"--data.{name} {size}: the store {path} has clips of {', '.join(map(str, sorted(held)))}"
            )
    return store


def check_store(store: StoredSamples, given: str, config: TrainConfig, variant: Variant) -> StoredSamples:
    """Return the store, whose latents and text the variant takes. Raises ValueError that begins with
    `given`."""
    channels, text_dim = variant.latent_channels, variant.config.text_dim
    if store.latent_channels != channels or store.text_dim != text_dim:
        raise ValueError(
            f"{given}: latents of {store.latent_channels} channels and text of"
            f" {store.text_dim} features, but {config.model.variant} takes {channels} and {text_dim};"
            " encode for this variant"
        )
    codec = store.settings.get("codec")
    if config.model.init_from is not None and variant.repository and codec != f"wan{variant.vae}":
        raise ValueError(
            f"{given}: latents of codec {codec}, but weights of {config.model.variant} know"
            f" those of wan{variant.vae}; encode with --codec wan{variant.vae}"
        )
    for shape in set(store.shapes):
        _tokens(shape, variant.config.patch_size)
    return store


def open_folder(path: Path, config: TrainConfig, variant: Variant, rank: int) -> StoredSamples:
    """Return the store of this folder: a finished one, or with --data.source one that is being filled."""
    asked = config.data
    if asked.source is None:
        return LatentStore(path)
    for name, least in (("ahead", 1), ("readers", 0), ("min_free_gb", 0)):
        if not getattr(asked, name) >= least:
            raise ValueError(f"--data.{name} {getattr(asked, name)} must be {least} or more")
    if not asked.wait_timeout > 0:
        raise ValueError(f"--data.wait_timeout {asked.wait_timeout} must be above 0 seconds")
    try:
        checked_size(config.encode, variant.name)
    except ValueError as error:
        raise ValueError(f"--encode.*: {error}") from None
    options = filler.FillOptions(
        asked.source,
        path,
        variant.name,
        config.encode,
        asked.ahead,
        asked.readers,
        int(asked.min_free_gb * GIB),
    )

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    if config.dry_run:
        return filler.preview(options, variant.latent_channels, variant.config.text_dim, say)
    try:
        return filler.open_filled(options, rank=rank, wait_timeout=asked.wait_timeout, say=say)
    except FillingError as error:
        raise ValueError(str(error)) from None


def run_folder(config: TrainConfig) -> Path:
    """Return the run folder: --output, or a new one under ./runs named by variant and time."""
    if config.output is not None:
        return config.output
    return Path("runs") / f"{config.model.variant}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _tokens(shape: tuple[int, ...], patch: tuple[int, int, int]) -> int:
    frames, height, width = token_grid(shape, patch)
    return frames * height * width
