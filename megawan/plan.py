"""Everything a run decides before its first collective: one resolved plan, or one message that says what does
not fit.

Imports neither DeepSpeed nor a process group, so `--dry-run` answers on a laptop, and every rank comes to the
same plan by itself.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import torch

from megawan import checkpoint, cost, ds_config, metrics, optim
from megawan.cli import UserError
from megawan.config import TrainConfig
from megawan.data.latents import LatentStore
from megawan.data.synthetic import SyntheticLatents
from megawan.dist import Environment
from megawan.flow.loss import FlowMatching
from megawan.models.attention import select_attention
from megawan.models.recompute import parse_recompute
from megawan.models.variants import CLIP_TOKENS, Variant, WanConfig, get_variant
from megawan.models.wan import token_grid
from megawan.parallel.topology import Topology, validate

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    config: TrainConfig
    variant: Variant
    topology: Topology
    data: LatentStore | SyntheticLatents
    flow: FlowMatching
    deepspeed: ds_config.Resolved
    steps: int
    clean_frames: int  # leading latent frames that are a clean condition (TI2V: 1) and carry no loss

    @property
    def global_batch(self) -> int:
        """Videos of one optimizer step, over the whole world."""
        return self.config.micro_batch * self.config.accumulation * self.topology.dp_size

    def describe(self) -> list[str]:
        """Return the start-up lines: what trains, on what, how it is laid out, what it costs."""
        wan, config, layout = self.variant.config, self.config, self.topology
        shapes = sorted(set(self.data.shapes))
        tokens = [_tokens(shape, wan.patch_size) for shape in shapes]
        longest = max(tokens)
        shape = model_shape(wan)
        states = cost.model_state_bytes_per_rank(
            cost.parameters(shape), layout.world_size, self.deepspeed.zero_stage, self.deepspeed.precision
        )
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
            f"data: {self.data.describe()}; {spread} tokens a video",
            f"layout: {layout.world_size} ranks = dp {layout.dp_size} x ring {layout.ring_degree} x ulysses"
            f" {layout.ulysses_degree}; ZeRO stage {self.deepspeed.zero_stage}, {self.deepspeed.precision},"
            f" recompute {config.model.recompute}",
            f"batch: {self.global_batch} videos a step = micro_batch {config.micro_batch} x accumulation"
            f" {config.accumulation} x dp {layout.dp_size}; {self.steps} steps ="
            f" {self.steps * self.global_batch / len(self.data):.1f} passes over {len(self.data)} samples",
            self.flow.describe(),
            f"cost: {flops / 1e12:,.3g} TFLOP a step (recompute not counted); model states"
            f" {states / 2**30:,.3g} GiB a rank",
        ]


def model_shape(wan: WanConfig) -> cost.ModelShape:
    """Return the sizes of `wan` that its cost depends on."""
    return cost.ModelShape(
        wan.dim,
        wan.ffn_dim,
        wan.num_heads,
        wan.num_layers,
        wan.in_dim,
        wan.out_dim,
        wan.text_len,
        wan.text_dim,
        wan.freq_dim,
        image_branch=wan.has_clip,
        image_tokens=wan.clip_tokens or CLIP_TOKENS,
        image_positions=wan.pos_embed_seq_len is not None,
        patch_volume=wan.patch_volume,
        vace_layers=len(wan.vace_layers),
        vace_in_dim=wan.vace_in_dim,
    )


def make_plan(config: TrainConfig, place: Environment) -> Plan:
    """Return the plan of `config` on this world. Raises cli.UserError for whatever does not fit."""
    try:
        return _resolve(config, place)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None


def _resolve(config: TrainConfig, place: Environment) -> Plan:
    for name in ("steps", "micro_batch", "accumulation"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} must be 1 or more")
    if not config.dist_timeout > 0:
        raise ValueError(f"--dist_timeout {config.dist_timeout} must be above 0 seconds")
    variant = get_variant(config.model.variant)
    validate(
        place.world_size,
        config.parallel.ulysses_degree,
        config.parallel.ring_degree,
        variant.config.num_heads,
        config.model.variant,
    )
    topology = Topology(place.world_size, config.parallel.ulysses_degree, config.parallel.ring_degree)
    parse_recompute(config.model.recompute, variant.config.num_layers)
    data = open_data(config, variant)
    steps = config.steps
    if config.epochs is not None:
        if config.epochs < 1:
            raise ValueError(f"--epochs {config.epochs} must be 1 or more")
        steps = -(-config.epochs * len(data) // (config.micro_batch * config.accumulation * topology.dp_size))
    optim.check(config.optim, steps)
    checkpoint.check(config.checkpoint)
    metrics.check(config.metrics)
    if not 0 <= config.data.prompt_dropout <= 1:
        raise ValueError(f"--data.prompt_dropout {config.data.prompt_dropout} must lie between 0 and 1")
    if config.data.workers < 0:
        raise ValueError(f"--data.workers {config.data.workers} must be 0 or more")
    if config.model.init_from is not None and not config.model.init_from.exists():
        raise FileNotFoundError(f"--model.init_from {config.model.init_from}: no such file or folder")
    file = ds_config.find(config.deepspeed, PACKAGE)
    resolved = ds_config.resolve(
        ds_config.read(file),
        where=f"--deepspeed {file}",
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        world_size=topology.world_size,
        grad_clip=config.optim.grad_clip,
        precision=config.precision,
        on_gpu=torch.cuda.is_available(),
    )
    select_attention(
        config.model.attention,
        "cuda" if torch.cuda.is_available() else "cpu",
        torch.bfloat16 if resolved.precision == "bf16" else torch.float32,
        head_dim=variant.config.dim // variant.config.num_heads,
        need_lse=topology.ring_degree > 1,
    )
    clean_frames = 1 if variant.config.model_type == "ti2v" else 0
    return Plan(config, variant, topology, data, FlowMatching(config.flow), resolved, steps, clean_frames)


def open_data(config: TrainConfig, variant: Variant) -> LatentStore | SyntheticLatents:
    """Return the latents that the run trains on, checked against the variant.

    Raises ValueError when the store is of another VAE, another text encoder, or other clip sizes than asked.
    """
    wan, asked = variant.config, config.data
    stride = variant.vae_stride
    channels = variant.latent_channels
    if asked.path is None:
        shape = latent_shape(
            asked.num_frames or 9, asked.height or 64, asked.width or 64, channels, stride, wan.patch_size
        )
        return SyntheticLatents(shape=shape, text_dim=wan.text_dim, text_len=wan.text_len, seed=config.seed)
    store = LatentStore(asked.path)
    if store.latent_channels != channels or store.text_dim != wan.text_dim:
        raise ValueError(
            f"--data.path {asked.path}: latents of {store.latent_channels} channels and text of"
            f" {store.text_dim} features, but {config.model.variant} takes {channels} and {wan.text_dim};"
            " encode for this variant"
        )
    for size, axis in ((asked.num_frames, 1), (asked.height, 2), (asked.width, 3)):
        wanted = (
            None if size is None else ((size - 1) // stride[0] + 1 if axis == 1 else size // stride[axis - 1])
        )
        other = next((shape for shape in store.shapes if wanted is not None and shape[axis] != wanted), None)
        if other is not None:
            name = ("num_frames", "height", "width")[axis - 1]
            raise ValueError(
                f"--data.{name} {size} means latents of size {wanted}; the store has {tuple(other)}"
            )
    for shape in set(store.shapes):
        _tokens(shape, wan.patch_size)
    return store


def latent_shape(
    frames: int,
    height: int,
    width: int,
    channels: int,
    stride: tuple[int, int, int],
    patch: tuple[int, int, int],
) -> tuple[int, int, int, int]:
    """Return (C, T, H, W) of a clip's latents. Raises ValueError for sizes that the VAE or the patches do not
    divide."""
    if frames < 1 or (frames - 1) % stride[0]:
        raise ValueError(f"{frames} frames: must be {stride[0]}n+1")
    for name, size, step in (
        ("height", height, stride[1] * patch[1]),
        ("width", width, stride[2] * patch[2]),
    ):
        if size < step or size % step:
            raise ValueError(f"{name} {size} must be a multiple of {step}")
    return channels, (frames - 1) // stride[0] + 1, height // stride[1], width // stride[2]


def run_folder(config: TrainConfig) -> Path:
    """Return the run folder: --output, or a new one under ./runs named by variant and time."""
    if config.output is not None:
        return config.output
    return Path("runs") / f"{config.model.variant}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _tokens(shape: tuple[int, int, int, int], patch: tuple[int, int, int]) -> int:
    frames, height, width = token_grid(shape, patch)
    return frames * height * width
