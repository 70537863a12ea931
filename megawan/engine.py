"""DeepSpeed's engine around the model: building it sharded, filling it with weights, reading its fp32 states.

The only module that imports deepspeed. DeepSpeed never hears of context parallelism: it shards over the whole
world and averages gradients over the whole world, at every stage (the loss carries the factor that makes this
right).
"""

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from megawan.checkpoint import MOMENTS, Fragment, StepWeights
from megawan.dist import say, sum_over_ranks
from megawan.ds_config import Resolved
from megawan.models.layouts import TensorSource
from megawan.optim import OptimOptions, build_optimizer, build_schedule, parameter_groups

Shapes = dict[str, tuple[int, ...]]


class ExtensionError(RuntimeError):
    """DeepSpeed's extension for CPU ranks cannot be built here."""


def build_model(make: Callable[[], nn.Module], resolved: Resolved, device: torch.device) -> nn.Module:
    """Return `make()` with parameters in the run's precision on `device`, sharded while it is built at stage
    3.

    Under zero.Init no rank ever holds more than one whole module. Parameter values are left for
    `load_weights`. Raises ExtensionError on a CPU machine that cannot build DeepSpeed's extension.
    """
    if device.type == "cpu":
        load_host_extension()
    # Start-up prints hundreds of lines otherwise, and torch 2.13 warns of calls that are DeepSpeed's to
    # change.
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # zero.Init asks DeepSpeed's own view of the process group for the world size.
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    if resolved.zero_stage == 3:
        context: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=resolved.config
        )
    else:
        context = device
    with context:
        model = make()
    if resolved.zero_stage < 3:
        model.to(torch.bfloat16 if resolved.precision == "bf16" else torch.float32)
    return model


def load_host_extension() -> None:
    """Build, or load, the extension without which DeepSpeed does not start on CPUs (half a minute, once).

    One process at a time, in a folder for this Python environment alone: DeepSpeed's own way waits forever
    for the lock file of a build that was killed, and environments that share a folder rebuild it under each
    other's feet. Raises ExtensionError.
    """
    folder = extension_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    beside = Path(sys.executable).parent
    if (beside / "ninja").exists():
        # Another ninja than the last build's takes its log for that of other commands and builds all anew;
        # the system's would be found where the environment is not activated.
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "megawan.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process that holds it
            for left_behind in folder.glob("*/lock"):
                left_behind.unlink()
            if not any(folder.glob("*/*.so")):
                say("building DeepSpeed's extension for CPU ranks, once: about half a minute")
            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        if " " in torch.__file__:
            reason = f"its linker command cannot hold the space in {Path(torch.__file__).parent}"
        raise ExtensionError(
            f"cannot build DeepSpeed's CPU extension in {folder}: {reason}; it needs g++, ninja, a folder to"
            " write (TORCH_EXTENSIONS_DIR) and a Python environment whose path has no space"
        ) from error


def check_operations(device: torch.device, resolved: Resolved | None) -> str:
    """Return DeepSpeed's version and which of its compiled operations this run takes, built if need be; None:
    what every run takes.

    Raises ExtensionError naming what cannot be built.
    """
    version = f"DeepSpeed {deepspeed.__version__}"
    if device.type == "cpu":
        load_host_extension()
        return f"{version}; its extension for CPU ranks is in {extension_folder()}"
    zero = resolved.config["zero_optimization"] if resolved else {}
    places = {zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")}
    if "nvme" not in places:  # the optimizer is torch's own, on the GPU and offloaded
        return f"{version}; this run takes none of its compiled operations"
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise ExtensionError("offload to nvme needs DeepSpeed's async_io, which needs libaio and its headers")
    return f"{version}; async_io can be built"


def extension_folder() -> Path:
    """Return where the extension is built: TORCH_EXTENSIONS_DIR, or a cache folder of this environment
    alone."""
    environment = f"{sys.prefix} {torch.__version__} {deepspeed.__version__}"
    own = f"megawan-{hashlib.blake2b(environment.encode(), digest_size=4).hexdigest()}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(get_default_build_root(), own))


def initialize(
    model: nn.Module,
    leaves: tuple[type[nn.Module], ...],
    resolved: Resolved,
    options: OptimOptions,
    steps: int,
) -> deepspeed.DeepSpeedEngine:
    """Return the training engine; modules of the `leaves` classes are gathered whole at stage 3 (one message
    each)."""
    shapes = true_shapes(model)
    if resolved.zero_stage == 3:
        set_z3_leaf_modules(model, list(leaves))
    optimizer = build_optimizer(
        parameter_groups(model.named_parameters(), shapes, options.weight_decay), options
    )
    config = dict(resolved.config)
    if resolved.zero_stage == 0:
        config["gradient_clipping"] = 0.0  # stage 0 clips without telling the norm: optimizer_step does it
    with _nothing_compiled():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=build_schedule(optimizer, options, steps),
            config=config,
            dist_init_required=False,
        )
    return engine


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """While it is entered, `torch.compile` returns the function that it is given.

    To see whether it knows an optimizer, DeepSpeed imports its Muon, which compiles its functions: for that
    torch would import its whole compiler, a second of each rank's start, to no use.
    """
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def true_shapes(model: nn.Module) -> Shapes:
    """Return every parameter's full shape by name; a parameter sharded by ZeRO-3 shows an empty one
    itself."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
    }


def optimizer_step(engine: deepspeed.DeepSpeedEngine, grad_clip: float) -> bool:
    """Update the weights at an accumulation boundary; at other micro-batches only count (DeepSpeed's rule).

    Returns False when the update was skipped, on all ranks alike: the global gradient norm was not finite,
    which one number on one rank is enough for. The learning rate moves on even so: it is a function of the
    step.
    """
    skipped = int(engine.skipped_steps)
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), grad_clip)
        engine._global_grad_norm = norm
        if not torch.isfinite(
            norm
        ):  # DeepSpeed looks only with ZeRO; without gradients Adam leaves all as it is
            engine.module.zero_grad(set_to_none=True)
            engine.skipped_steps += 1
        engine.step()
        return int(engine.skipped_steps) == skipped
    engine.step()
    if engine.skipped_steps == skipped:
        return True
    engine.lr_scheduler.step()
    return False


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the global gradient norm before clipping of the last update (synchronises with the device)."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


@torch.no_grad()
def load_weights(engine: deepspeed.DeepSpeedEngine, source: TensorSource, tick: Callable[[], None]) -> None:
    """Fill weights and fp32 masters from `source`, one tensor at a time; `tick` is called after each.

    fp32 in the source reaches the masters unrounded; at stage 3 each rank reads only its own part of a
    tensor. The names and shapes of `source` must have been checked against the model before.
    """
    stage = engine.zero_optimization_stage()
    places, masters = _places(engine), master_buffers(engine)
    for name, parameter in engine.module.named_parameters():
        place = places.get(name)
        if stage == 3:
            parameter.ds_tensor.data.zero_()  # the last rank's padding
            if place is not None:
                part = source.load_part(name, place.start, place.size)
                place.of(masters).copy_(part)
                parameter.ds_tensor.data[: place.size].copy_(part)
        else:
            full = source.load(name).flatten()
            parameter.data.copy_(full.view(parameter.shape))
            if place is not None and stage:
                place.of(masters).copy_(full[place.start : place.start + place.size])
        tick()
    if stage == 3:
        _refresh_resident(engine)


@torch.no_grad()
def load_optimizer(engine: deepspeed.DeepSpeedEngine, saved: StepWeights, tick: Callable[[], None]) -> None:
    """Fill Adam's moments and step count, the learning rate and the count of skipped steps from a checkpoint
    of any world size, stage or layout."""
    _create_states(engine)
    places = _places(engine)
    for kind in MOMENTS:
        load_buffers(engine, saved, kind, _moment_buffers(engine, kind))
    for _ in places:
        tick()
    engine.skipped_steps = saved.skipped_steps
    _set_adam_step(engine, saved.step - saved.skipped_steps)
    schedule = engine.lr_scheduler
    schedule.last_epoch = saved.step
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(saved.step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


@torch.no_grad()
def load_buffers(
    engine: deepspeed.DeepSpeedEngine, saved: StepWeights, kind: str, buffers: Sequence[Tensor]
) -> None:
    """Fill flat buffers that mirror `master_buffers` with this rank's share of a checkpoint's `kind`."""
    for name, place in _places(engine).items():
        place.of(buffers).copy_(saved.load_range(kind, name, place.start, place.size))


def fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """Yield this rank's share of the fp32 masters and Adam moments, as views; over all ranks every element
    appears once."""
    yield from cut(engine, "master", master_buffers(engine))
    for kind in MOMENTS:
        yield from cut(engine, kind, _moment_buffers(engine, kind))


def cut(engine: deepspeed.DeepSpeedEngine, kind: str, buffers: Sequence[Tensor]) -> Iterator[Fragment]:
    """Yield this rank's share of flat buffers that mirror `master_buffers`, parameter by parameter."""
    if engine.zero_optimization_stage() == 0 and torch.distributed.get_rank():
        return  # every rank holds the same whole states
    shapes = true_shapes(engine.module)
    for name, place in _places(engine).items():
        yield Fragment(kind, name, shapes[name], place.start, place.of(buffers))


def master_buffers(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """Return the flat fp32 tensors that this rank's optimizer steps, live: its shares, or at stage 0 the
    parameters."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return [parameter.detach() for parameter in engine.module.parameters()]


@contextlib.contextmanager
def other_weights(engine: deepspeed.DeepSpeedEngine, buffers: Sequence[Tensor]) -> Iterator[None]:
    """Give the model the values of flat buffers that mirror `master_buffers` (a moving average) inside the
    block, and the masters' again, bit for bit, after it; collective. No rank holds more of it than in
    training; the masters and the optimizer are not touched, at stage 0 the masters are the weights."""
    kept = master_buffers(engine)
    if engine.zero_optimization_stage() == 0:
        kept = [master.clone() for master in kept]
    _set_weights(engine, buffers)
    try:
        yield
    finally:
        _set_weights(engine, kept)


@torch.no_grad()
def _set_weights(engine: deepspeed.DeepSpeedEngine, buffers: Sequence[Tensor]) -> None:
    stage, places = engine.zero_optimization_stage(), _places(engine)
    if stage == 3:
        # What a forward pass without a backward left gathered would be used again as it was.
        engine.optimizer.parameter_offload.partition_all_parameters()
    for name, parameter in engine.module.named_parameters():
        place = places.get(name)
        if stage == 3:
            if place is not None:
                parameter.ds_tensor.data[: place.size].copy_(place.of(buffers))
        elif stage == 0:
            assert place is not None
            parameter.data.copy_(place.of(buffers).view(parameter.shape))
        else:
            # Each element is one rank's; of the others' -inf nothing is left, and -0 stays -0.
            whole = torch.full(
                (parameter.numel(),), -math.inf, dtype=parameter.dtype, device=parameter.device
            )
            if place is not None:
                whole[place.start : place.start + place.size].copy_(place.of(buffers))
            torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX)
            parameter.data.copy_(whole.view(parameter.shape))
    if stage == 3:
        _refresh_resident(engine)


DOUBLED_AT_ONCE = 1 << 22
"""Numbers that are widened to float64 together: 32 MiB."""


def distance(engine: deepspeed.DeepSpeedEngine, before: Sequence[Tensor]) -> float:
    """Return the L2 norm of what changed in the masters of all ranks since `before`, copies of
    `master_buffers` that hold the change afterwards; collective."""
    squares = torch.zeros((), dtype=torch.float64)
    for master, earlier in zip(master_buffers(engine), before, strict=True):
        pieces = earlier.sub_(master).flatten().split(DOUBLED_AT_ONCE)
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        squares += sum(norm.square() for norm in norms).cpu()
    if engine.zero_optimization_stage():  # at stage 0 every rank holds all of them
        squares = sum_over_ranks(squares)
    return math.sqrt(float(squares))


@dataclass(frozen=True)
class _Place:
    """Where this rank's share of one parameter lies: elements start .. start + size of the parameter are
    elements offset .. offset + size of flat buffer number `buffer`."""

    buffer: int
    offset: int
    start: int
    size: int

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        return buffers[self.buffer].flatten().narrow(0, self.offset, self.size)


def _places(engine: deepspeed.DeepSpeedEngine) -> dict[str, _Place]:
    """Return the place of every parameter of which this rank holds a part.

    DeepSpeed's own getters give the same views at stage 3, but copy them to the GPU when the optimizer is
    offloaded, and at stages 1 and 2 (0.19.8) fail for the moments of all groups but the first.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    found: dict[str, _Place] = {}
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        if stage == 3:
            share = parameter.ds_tensor.numel()
            start = share * torch.distributed.get_rank(parameter.ds_process_group)
            size = min(share, parameter.ds_numel - start)  # the padding of the last rank is left out
            if size > 0:
                group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                found[name] = _Place(group, offset, start, size)
        elif stage == 0:
            found[name] = _Place(index, 0, 0, parameter.numel())
        elif getattr(parameter, "_hp_mapping", None) is not None:
            mapping = parameter._hp_mapping
            held = mapping.get_hp_fragment_address()
            found[name] = _Place(
                mapping.param_group_index, held.start, mapping.lp_fragment_address.start, held.numel
            )
    return found


def _moment_buffers(engine: deepspeed.DeepSpeedEngine, kind: str) -> list[Tensor]:
    """Return the flat tensors of one Adam moment, one for each of `master_buffers`."""
    tensors, optimizer = _stepped(engine)
    return [optimizer.state[tensor][kind] for tensor in tensors]


def _stepped(engine: deepspeed.DeepSpeedEngine) -> tuple[list[Tensor], Any]:
    """Return the tensors that torch's optimizer steps, as it knows them, and that optimizer."""
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters()), engine.optimizer
    return master_buffers(engine), engine.optimizer.optimizer


def _refresh_resident(engine: deepspeed.DeepSpeedEngine) -> None:
    """Gather anew the small parameters that ZeRO-3 keeps whole on every rank: they still hold the old
    values."""
    resident = engine.optimizer.persistent_parameters
    if resident:
        resident[0].partition(resident, has_been_updated=False)
        resident[0].all_gather(resident)


def _create_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make Adam's states as its first step would, so that a checkpoint can fill them before it."""
    tensors, optimizer = _stepped(engine)
    for tensor in tensors:
        for kind in MOMENTS:
            optimizer.state[tensor].setdefault(kind, torch.zeros_like(tensor))
        optimizer.state[tensor].setdefault("step", torch.zeros((), device=tensor.device))


def _set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    _, optimizer = _stepped(engine)
    for state in optimizer.state.values():
        state["step"].fill_(step)
