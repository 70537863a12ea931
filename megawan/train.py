"""Full finetuning of a Wan diffusion transformer.

    deepspeed megawan/train.py --deepspeed ds_configs/zero3.json     # debug variant, synthetic latents
    torchrun --nproc_per_node 2 megawan/train.py --parallel.ulysses_degree 2
    python -m megawan.train --dry-run

Reads top-down: parse, plan, join the group, build, fill, loop.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    # Started as a script: Python put megawan/ itself first, where our module names would shadow others'.
    sys.path[0] = os.path.dirname(sys.path[0])

import torch
from torch import Tensor
from tqdm import tqdm

from megawan import checkpoint, cli, config, dist, filler
from megawan.data.batch import Batch
from megawan.data.loader import make_loader
from megawan.files import write_json
from megawan.flow.loss import flow_loss
from megawan.metrics import Clock, LossMeter, RunLog, describe_environment, peak_memory
from megawan.models.attention import select_attention
from megawan.models.wan import LEAF_MODULES, WanModel, patchify, token_grid
from megawan.parallel.context import ContextParallel
from megawan.plan import Plan, make_plan, open_start, require_inputs, run_folder

PROG = "megawan/train.py"


def main(argv: Sequence[str]) -> None:
    """Train as `argv` says. Raises cli.UserError before any process group exists when something does not
    fit."""
    options = config.parse(argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        place = dist.environment()
        device = dist.pick_device(place.local_rank)
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    plan = make_plan(options, place)
    if options.dry_run:
        if place.rank == 0:
            print("\n".join(plan.describe()))
        return
    require_inputs(plan)
    try:
        dist.initialize(place, device, options.dist_timeout)
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    run(plan, device)
    dist.shutdown()


def run(plan: Plan, device: torch.device) -> None:
    """Build, fill and train; every rank of the world calls it together."""
    from megawan import engine as engines  # imports DeepSpeed, seconds that --help and --dry-run do not need

    options = plan.config
    folder = Path(dist.share_text(str(run_folder(options))))
    for line in plan.describe():
        dist.say(line)
    dist.require_agreement("configuration", str(config.to_dict(options)))
    dist.require_agreement("data", plan.data.fingerprint)
    dist.require_agreement("recompute policy", plan.recompute)  # auto looks at this rank's own GPU
    warning = dist.PreemptionWarning(options.dist_timeout)
    resume_from = choose_start(folder, options)

    context = ContextParallel.create(plan.topology, torch.distributed.get_rank(), options.dist_timeout)
    kernel = select_attention(
        options.model.attention,
        device.type,
        torch.bfloat16 if plan.deepspeed.precision == "bf16" else torch.float32,
        head_dim=plan.variant.config.dim // plan.variant.config.num_heads,
        need_lse=plan.need_lse,
    )
    dist.say(f"attention: {kernel.describe()}")
    try:
        model = engines.build_model(
            lambda: WanModel(
                plan.variant.config,
                attention=kernel,
                recompute=plan.recompute,
                offload=plan.offload,
                compiled=options.model.compile,
            ),
            plan.deepspeed,
            device,
        )
    except engines.ExtensionError as error:
        raise cli.UserError(str(error)) from None
    engine = engines.initialize(model, LEAF_MODULES, plan.deepspeed, options.optim, plan.steps)
    start = fill(engine, engines, plan, resume_from)
    if start >= plan.steps:
        dist.say(f"nothing to do: {folder} stands at step {start} of {plan.steps}; raise --steps to go on")
        return
    write_run_files(folder, options)

    batches = make_batches(plan, start)
    loop(engine, engines, plan, context, batches, start, folder, device, warning)


def loop(
    engine: Any,
    engines: Any,
    plan: Plan,
    context: ContextParallel,
    batches: Iterator[list[Batch]],
    start: int,
    folder: Path,
    device: torch.device,
    warning: dist.PreemptionWarning,
) -> None:
    """Take the steps from `start` to the end: train, log every n, save every n and when the job is warned."""
    options, meter, clock = plan.config, LossMeter(device), Clock()
    log = RunLog(folder, options.metrics, start, plan.steps)
    log.text("config", "\n".join(f"    {line}" for line in plan.describe()), start)
    tokens, logged = 0, start
    for step in range(start + 1, plan.steps + 1):
        waiting = time.perf_counter()
        micro_batches = [batch.to(device) for batch in next(batches)]
        clock.add_wait(time.perf_counter() - waiting)
        tokens += train_step(engine, engines, plan, context, micro_batches, meter) * plan.topology.dp_size
        last = warning.came() or step == plan.steps
        if last or step % options.metrics.log_every == 0:
            loss, by_sigma = meter.read()
            seconds, waited = clock.read()
            scalars = {
                "train/loss": loss,
                "train/lr": engine.get_lr()[0],
                "train/grad_norm": engines.grad_norm(engine),
                "train/skipped_steps": float(engine.skipped_steps),
                "perf/step_time": seconds / (step - logged),
                "perf/tokens_per_s": tokens / seconds,
                "perf/data_wait": waited / seconds,
                **{f"train/loss_by_sigma/q{index}": value for index, value in by_sigma.items()},
                **peak_memory(device),
            }
            log.step(step, scalars, seconds / (step - logged))
            tokens, logged = 0, step
        if last or (options.checkpoint.save_every and step % options.checkpoint.save_every == 0):
            saved = save(engine, engines, plan, folder, step)
            dist.say(f"saved {saved}")
        if last:
            break
    log.close()
    if step < plan.steps:
        dist.say(f"warned by SIGUSR1 at step {step} of {plan.steps}; the same command goes on from here")
    else:
        dist.say(f"finished {plan.steps} steps; curves: tensorboard --logdir {folder / 'tensorboard'}")


def make_batches(plan: Plan, start: int) -> Iterator[list[Batch]]:
    """Return the micro-batches of every step after `start`, as this rank's data-parallel group takes them."""
    options = plan.config
    batches = make_loader(
        plan.data,
        seed=options.seed,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        dp_rank=plan.topology.coordinates(torch.distributed.get_rank())[0],
        dp_size=plan.topology.dp_size,
        text_len=plan.variant.config.text_len,
        prompt_dropout=options.data.prompt_dropout,
        start_step=start,
        workers=options.data.workers,
    )
    return filler.paced(
        batches,
        plan.data,
        seed=options.seed,
        global_batch=plan.global_batch,
        start=start,
        steps=plan.steps,
        say=dist.say,
    )


def train_step(
    engine: Any,
    engines: Any,
    plan: Plan,
    context: ContextParallel,
    micro_batches: Sequence[Batch],
    meter: LossMeter,
) -> int:
    """Take one optimizer step over `micro_batches` and return how many tokens this data-parallel rank trained
    on.

    The specification's §2, one t per sample: draw sigma and noise, noise the latents, predict the velocity,
    weighted MSE. All ranks of a context-parallel group draw the same and each takes the loss of its own
    tokens.
    """
    tokens, patch = 0, plan.variant.config.patch_size
    for batch in micro_batches:
        sample = plan.flow.sample(
            batch.latents,
            seed=plan.config.seed,
            sample_ids=batch.sample_ids,
            epochs=batch.epochs,
            clean_frames=plan.clean_frames,
        )
        pred = engine(
            sample.x_t,
            sample.timestep,
            batch.text,
            context=context,
            clean_frames=sample.clean_frames,
            clip=batch.clip,
            condition=batch.condition,
        )
        valid, valid_tokens = loss_tokens(batch.latents, patch, sample.clean_frames, context)
        target = context.shard(patchify(sample.target, patch))
        result = flow_loss(
            pred, target, sample.weight, valid=valid, valid_tokens=valid_tokens, cp_size=context.size
        )
        engine.backward(result.loss)
        engines.optimizer_step(engine, plan.config.optim.grad_clip)
        meter.add(result.loss, result.per_sample, sample.sigma)
        tokens += batch.latents.shape[0] * valid_tokens
    return tokens


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


def fill(engine: Any, engines: Any, plan: Plan, resume_from: Path | None) -> int:
    """Fill the engine with a checkpoint, given weights or random ones; return the step that this stands
    at."""
    if resume_from is not None:
        saved = checkpoint.StepWeights(resume_from)
        require_same_parameters(engines.true_shapes(engine.module), saved, resume_from)
        with progress("resume", 2 * len(saved.keys())) as bar:
            engines.load_weights(engine, saved, bar.update)
            engines.load_optimizer(engine, saved, bar.update)
        dist.say(f"resumed {resume_from}, written by {saved.manifest['world_size']} ranks")
        return saved.step
    try:
        source = open_start(plan.config, plan.variant)
        with progress("weights", len(source.keys())) as bar:
            engines.load_weights(engine, source, bar.update)
    except (ValueError, OSError) as error:  # they were whole when the plan was made
        raise cli.UserError(str(error)) from None
    return 0


def require_same_parameters(
    model: dict[str, tuple[int, ...]], saved: checkpoint.StepWeights, folder: Path
) -> None:
    """Raise ValueError naming the first parameter that a checkpoint lacks, adds or has in another shape."""
    theirs = {key: saved.shape(key) for key in saved.keys()}
    for name in sorted(model.keys() | theirs.keys()):
        if model.get(name) != theirs.get(name):
            raise cli.UserError(f"{folder}: {name} is {theirs.get(name)}, the model has {model.get(name)}")


def choose_start(folder: Path, options: config.TrainConfig) -> Path | None:
    """Return the checkpoint to resume, None for a new run; the same on all ranks."""
    try:
        return checkpoint.choose(folder / "checkpoints", options.checkpoint.resume)
    except ValueError as error:
        raise cli.UserError(str(error)) from None


def save(engine: Any, engines: Any, plan: Plan, folder: Path, step: int) -> Path:
    """Commit a checkpoint of this step, all ranks together."""
    state = {
        "variant": plan.config.model.variant,
        "model": config.to_dict(plan.variant.config),
        "config": config.to_dict(plan.config),
        "data": plan.data.fingerprint,
        "global_batch": plan.global_batch,
    }
    pieces = engines.fragments(engine)
    return checkpoint.save(folder / "checkpoints", step, pieces, state, plan.config.checkpoint.keep_last)


def write_run_files(folder: Path, options: config.TrainConfig) -> None:
    """Write what ran and where beside the curves, on rank 0."""
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.to_dict(options))
        write_json(folder / "env.json", describe_environment())


def progress(title: str, total: int) -> "tqdm[Any]":
    """Return a bar on rank 0's terminal that counts tensors; silent elsewhere."""
    return tqdm(total=total, desc=title, unit="tensor", disable=None if dist.is_main() else True)


if __name__ == "__main__":
    cli.run(main, PROG, rank=dist.environment().rank, leave=dist.leave)
