"""Every knob of a run: the section dataclasses put together; defaults < --config file < command line."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from megawan import cli
from megawan.checkpoint import CheckpointOptions
from megawan.ema import EmaOptions
from megawan.encode_options import EncodeOptions
from megawan.flow.loss import FlowOptions
from megawan.metrics import MetricsOptions
from megawan.optim import OptimOptions
from megawan.preview_options import PreviewOptions
from megawan.profiling import ProfileOptions
from megawan.validation import ValidationOptions

# Flags that people know from DiffSynth-Studio and DeepSpeed examples.
ALIASES = {
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "gradient_accumulation_steps": "accumulation",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "output_path": "output",
    "output_dir": "output",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "save_steps": "checkpoint.save_every",
    "save_every": "checkpoint.save_every",
    "keep_last": "checkpoint.keep_last",
    "keep_every": "checkpoint.keep_every",
    "save_minutes": "checkpoint.save_minutes",
    "allow_changes": "checkpoint.allow_changes",
    "resume": "checkpoint.resume",
    "resume_from_checkpoint": "checkpoint.resume",
    "deepspeed_config": "deepspeed",
    "max_timestep_boundary": "flow.max_timestep_boundary",
    "min_timestep_boundary": "flow.min_timestep_boundary",
    "num_frames": "data.num_frames",
    "height": "data.height",
    "width": "data.width",
    "init_from": "model.init_from",
    "variant": "model.variant",
    "ulysses_degree": "parallel.ulysses_degree",
    "ring_degree": "parallel.ring_degree",
}


@dataclass(frozen=True)
class ModelOptions:
    """The diffusion transformer."""

    variant: str = "debug"
    """Which Wan: a name of megawan/models/variants.py, such as t2v-1.3B, t2v-14B, i2v-14B-480P, ti2v-5B,
    debug."""
    init_from: Path | None = None
    """Weights to start from (any layout; see docs/checkpoint_formats.md). Without it the start is random,
    from --seed. Weights only: to continue a run use --checkpoint.resume."""
    initialise_missing: bool = False
    """Let --model.init_from lack parts of the variant; they start from random values of --seed and are
    listed."""
    recompute: str = "none"
    """Activation checkpointing: none, selective, attention or full; full:K for the first K blocks; several
    joined by commas (attention:24,selective); auto fits --model.memory_budget_gb (see docs/recompute.md)."""
    memory_budget_gb: float | None = None
    """GiB that recompute auto may plan for on each GPU (default: nine tenths of its memory); another policy
    that needs more is refused."""
    offload_activations: bool = False
    """Hold what recomputed blocks keep in CPU memory until their backward pass."""
    compile: bool = False
    """torch.compile every block: in bf16 half of its memory traffic between matrix products. The first step
    takes a minute or more, once for each video size."""
    attention: str = "auto"
    """Attention kernel; auto picks the best one present and the start-up lines say which."""


@dataclass(frozen=True)
class DataOptions:
    """The latents to train on."""

    path: tuple[Path, ...] = ()
    """Latent stores made by tools/encode_dataset.py, one or several; without any, deterministic synthetic
    latents."""
    weights: tuple[float, ...] = ()
    """How much of what is trained each store of --data.path is, relative to the others: 3 1 1 (default: by
    their numbers of samples; 0 leaves a store out)."""
    image_share: float | None = None
    """Share of still images in what is trained of a store that holds images and videos, 0 to 1 (default: by
    number)."""
    shape_group: int = 0
    """Samples in a row that have one latent shape: 0, all of a step; N, a multiple of --micro_batch, lets
    a step have several shapes, dealt so that no rank waits long for another."""
    num_frames: int | None = None
    """Frames of the synthetic clips (4n+1, default 9); with a store, what its clips must have."""
    height: int | None = None
    """Pixel height of the synthetic clips (default 64); with a store, what its clips must have."""
    width: int | None = None
    """Pixel width of the synthetic clips (default 64); with a store, what its clips must have."""
    prompt_dropout: float = 0.0
    """Share of samples whose caption is replaced by the empty one, so that guidance works; the specification
    has 0."""
    max_bad: float = 0.01
    """Share of the samples that may be unreadable or not finite and are replaced, counted by each rank (one
    always may); more end the run. 0: none may."""
    workers: int = 0
    """Reading processes a rank; 0 reads in the training process (enough for small latents)."""
    source: Path | None = None
    """Clips to encode into the store --data.path while training: what tools/encode_dataset.py takes as
    --input. --encode.* says how; a store that is complete is only read."""
    ahead: int = 64
    """With a source: samples that may be encoded ahead of the training; then the encoder waits."""
    readers: int = 0
    """With a source: processes that look at clips at the same time before the first step."""
    min_free_gb: float = 2.0
    """With a source: GiB that must stay free on the store's disk, else encoding waits."""
    wait_timeout: float = 600.0
    """With a source: seconds without any progress of the encoder after which a run that waits for it ends."""


@dataclass(frozen=True)
class ParallelOptions:
    """Context parallelism: one video over ulysses_degree x ring_degree ranks; the rest of the world is data
    parallel."""

    ulysses_degree: int = 1
    """Ranks that exchange heads for tokens; must divide the heads (12, 24 or 40). Keep it inside a node."""
    ring_degree: int = 1
    """Ranks that pass key/value blocks around; any number. May span nodes."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    deepspeed: str = "ds_configs/zero3.json"
    """DeepSpeed JSON: ZeRO stage, buckets, offload. Ours are in ds_configs/; the path may be relative to the
    repository."""
    config: Path | None = None
    """JSON file of these fields, nested by section (a run's own config.json works); the command line wins
    over it."""
    output: Path | None = None
    """Run folder: config.json, tensorboard/, checkpoints/. Default: runs/VARIANT-DATE-TIME, a new one each
    time."""
    steps: int = 20
    """Optimizer steps of the whole run, those before a resume included."""
    epochs: int | None = None
    """Passes over the data instead of --steps."""
    micro_batch: int = 1
    """Videos a context-parallel group holds at a time."""
    accumulation: int = 1
    """Micro-batches a group adds up before an optimizer step; global batch = micro_batch x accumulation x
    dp."""
    seed: int = 0
    """Seed of initial weights, data order, sigmas, noise and prompt dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights and matrix products; auto is bf16 on GPUs and fp32 on CPUs. Masters and optimizer states are
    always fp32."""
    dist_timeout: float = 600.0
    """Seconds after which a collective that waits for a lost rank ends the run."""
    health_check: bool = False
    """Look at all ranks before the model is built: wrong numbers end the run naming rank and machine, slow
    ranks and links are named (the Slurm scripts ask for it)."""
    dry_run: bool = False
    """Print the resolved plan and touch nothing."""
    local_rank: int = -1
    """Set by the deepspeed launcher; the environment decides."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    metrics: MetricsOptions = field(default_factory=MetricsOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    sample: PreviewOptions = field(default_factory=PreviewOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)


Config = TypeVar("Config", bound=TrainConfig)


def parse(argv: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """Return the run that `argv` asks for, its --config file (if any) taken as the defaults.

    Raises cli.UserError for an unknown flag or key, a wrong type or an illegal choice.
    """
    return parse_as(TrainConfig, argv, prog=prog, description=description)


def parse_as(kind: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """Return what `parse` does as a `kind`, which has fields of its own beside those of a run."""
    parsed = cli.parse(kind, argv, prog=prog, description=description, aliases=ALIASES)
    if parsed.config is not None:
        defaults: Config = from_dict(kind, _read_json(parsed.config), where=str(parsed.config))
        parsed = cli.parse(kind, argv, prog=prog, description=description, aliases=ALIASES, default=defaults)
    # Every rank must come to the same configuration, and the launcher gives each another local rank.
    return dataclasses.replace(parsed, local_rank=-1)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as JSON-ready nested dictionaries, paths as strings."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def from_dict(kind: type, values: Any, *, where: str) -> Any:
    """Return `kind` (a dataclass) from nested dictionaries, missing keys at their defaults.

    Raises cli.UserError naming the file and key for an unknown key or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise cli.UserError(
            f"{where}: expected an object with fields of {kind.__name__}, found {type(values).__name__}"
        )
    hints = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; legal: {', '.join(hints)}"
        raise cli.UserError(f"{where}: unknown key {unknown[0]!r}{hint}")
    chosen = {key: _convert(hints[key], value, where=f"{where}: {key}") for key, value in values.items()}
    return kind(**chosen)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise cli.UserError(f"{where} is {value!r}; legal: {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(inner[0], value, where=where)
    if origin is tuple:
        if not isinstance(value, list):  # one value stands for a list of one, null for none
            value = [] if value is None else [value]
        kinds = typing.get_args(hint)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_convert(kind, item, where=where) for kind, item in zip(kinds, value, strict=True))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise cli.UserError(f"{where} is {value!r}; expected {hint.__name__}")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cli.UserError(f"--config {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise cli.UserError(f"--config {path}: not JSON ({error})") from None
