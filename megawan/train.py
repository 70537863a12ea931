"""Full finetuning of a Wan diffusion transformer.

    deepspeed megawan/train.py --deepspeed ds_configs/zero3.json     # debug variant, synthetic latents
    torchrun --nproc_per_node 2 megawan/train.py --parallel.ulysses_degree 2
    python -m megawan.train --dry-run

Reads top-down: parse, plan, join the group, take the run folder, build, fill, loop.
"""

import gc
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    # Started as a script: Python put megawan/ itself first, where our module names would shadow others'.
    sys.path[0] = os.path.dirname(sys.path[0])
if __name__ == "__main__":
    gc.disable()  # until training is built: half a million objects are made, and all of them stay

import torch
from tqdm import tqdm

from megawan import checkpoint, cli, config, dist, looks
from megawan.agreement import StepAgreement, describe_samples
from megawan.changes import changes, flat, refused
from megawan.data.mixture import Mixture
from megawan.data.replacement import BadSamples
from megawan.ds_config import Resolved
from megawan.faults import broken
from megawan.files import write_json
from megawan.hardware import peak_flops
from megawan.health import examine
from megawan.metrics import (
    DataMeter,
    LossMeter,
    LossReading,
    RunLog,
    Stragglers,
    describe_environment,
    peak_memory,
    software,
    speed,
)
from megawan.plan import Plan, make_plan, open_start, require_inputs, run_folder
from megawan.profiling import StepProfiler
from megawan.run_folder import USED, RunFolder
from megawan.saving import Saver
from megawan.step_times import BESIDE, StepTimes
from megawan.watch import BUILD, Watch

if TYPE_CHECKING:  # imports DeepSpeed, seconds that --help and --dry-run do not need
    from megawan.trainer import Trainer

PROG = "megawan/train.py"
FAILED_SAVES = 3
"""Saves in a row that may fail before the run ends: work that cannot be kept is not worth its GPUs."""


def main(argv: Sequence[str]) -> None:
    """Train as `argv` says. Raises cli.UserError before any process group exists when something does not
    fit."""
    dist.end_with_launcher()
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
    except RuntimeError as error:  # no such address, or not all ranks came in time
        raise cli.RunFailed(
            f"cannot join the other {place.world_size - 1} ranks within {options.dist_timeout:g} s"
            f" (--dist_timeout): {str(error).partition(chr(10))[0]}"
        ) from None
    run(plan, device)
    dist.shutdown()


def run(plan: Plan, device: torch.device) -> None:
    """Take the run folder, build, fill and train; every rank of the world calls it together."""
    options = plan.config
    path = Path(dist.share_text(str(run_folder(options))))
    for line in plan.describe():
        dist.say(line)
    require_agreement(plan)
    warning = dist.PreemptionWarning()
    folder = RunFolder(path)
    try:
        resume_from = checkpoint.choose(path / "checkpoints", options.checkpoint.resume)
        folder.claim(plan.checkpoint_bytes, dist.job_id())
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    warn_of_little_room(path / "checkpoints", plan.checkpoint_bytes, options.checkpoint)
    watch = Watch(path, options.dist_timeout)
    try:
        if options.health_check:
            look_at_ranks(device, watch)
        watch.at(0, BUILD)
        from megawan.engine import ExtensionError
        from megawan.trainer import Trainer

        gc.freeze()  # or DeepSpeed's own collections look through all that was imported
        try:
            trainer = Trainer(plan, device)
        except ExtensionError as error:
            raise cli.UserError(str(error)) from None
        begin_collecting(plan.deepspeed)
        dist.say(f"attention: {trainer.kernel.describe()}")
        start = fill(trainer, resume_from)
        if start >= plan.steps:
            dist.say(f"nothing to do: {path} stands at step {start} of {plan.steps}; raise --steps to go on")
            return
        write_run_files(path, options)
        loop(trainer, start, path, warning, watch)
    except (cli.UserError, cli.RunFailed):
        raise
    except BadSamples as error:
        raise cli.RunFailed(str(watch.explain(error))) from None
    except Exception as error:
        raise watch.explain(error) from None
    finally:
        watch.close()
        folder.release()


def require_agreement(plan: Plan) -> None:
    """Raise RunFailed on every rank where ranks have another source, configuration or data."""
    settings = flat(config.to_dict(plan.config))
    alike = {
        "software": "\n".join(f"{name} {version}" for name, version in software().items()),
        "configuration": "\n".join(f"{name} {value}" for name, value in settings.items()),
        "data": plan.data.fingerprint,
        "recompute policy": plan.recompute,  # auto looks at this rank's own GPU
    }
    try:
        for what, text in alike.items():
            dist.require_agreement(what, text)
    except RuntimeError as error:
        raise cli.RunFailed(str(error)) from None


def warn_of_little_room(root: Path, size: int, options: checkpoint.CheckpointOptions) -> None:
    """Say when the disk holds fewer checkpoints of `size` bytes than will lie there: those that stay and the
    one being written."""
    if dist.is_main() and options.keep_last:
        held = len(checkpoint.step_folders(root))
        room, wanted = held + shutil.disk_usage(root).free // size, options.keep_last + 1
        if room < wanted:
            dist.say(
                f"warning: {root} has room for {room} checkpoints of {size / 1e9:.3g} GB,"
                f" --checkpoint.keep_last {options.keep_last} needs {wanted} while it saves"
            )


def look_at_ranks(device: torch.device, watch: Watch) -> None:
    """Say how fast ranks and links are, and which are slow. Raises RunFailed naming those that compute wrong
    numbers; a rank that does not take part is named by `watch`."""
    watch.at(0, "health check, alone")
    dist.strike(0, "health", dist.faults())
    health = examine(device, lambda: watch.at(0, "health check, together"))
    dist.say(health.describe())
    for warning in health.warnings():
        dist.say(f"warning: {warning}")
    if health.wrong:
        raise cli.RunFailed("; ".join(health.problems()))


def begin_collecting(deepspeed: Resolved) -> None:
    """Turn Python's garbage collector on, for what is made from now on.

    Looking through all that start-up made takes a rank a quarter of a second, in the middle of any step, and
    the others wait for it. DeepSpeed's `disable_python_gc` leaves it off.
    """
    gc.freeze()
    if not deepspeed.config.get("disable_python_gc"):
        gc.enable()


def loop(trainer: "Trainer", start: int, folder: Path, warning: dist.PreemptionWarning, watch: Watch) -> None:
    """Take the steps from `start` to the end: train, log every n, validate every n, save every n and when
    anybody asks."""
    from megawan.skipped import SkippedSteps

    plan, device = trainer.plan, trainer.device
    options, meter, times = plan.config, LossMeter(device, len(dataset_names(plan))), StepTimes(device)
    data_meter, stragglers = DataMeter(plan.topology.dp_size, plan.sample_flops), Stragglers()
    log = RunLog(folder, options.metrics, start, plan.steps, config.to_dict(options))
    log.text("plan", "\n".join(f"    {line}" for line in plan.describe()), start)
    saver = Saver(folder / "checkpoints", options.checkpoint, options.dist_timeout)
    agreement = StepAgreement(
        folder,
        options.checkpoint.save_minutes,
        warning,
        trainer.dp_rank,
        plan.topology.dp_size,
        options.dist_timeout,
    )
    skipped = SkippedSteps(folder, plan, options.optim.max_skipped)
    profiler = StepProfiler(options.profile, folder / "profile", device, times, start + 1)
    peak = gpu_peak(options.metrics.peak_tflops, device)
    watch.at(start, "validation")
    validation = looks.hold_out(trainer)
    previews = looks.choose_previews(trainer)
    if validation is not None and start == 0:
        looks.validate(trainer, validation, log, watch, 0)
    batches, faults = trainer.batches(start), dist.faults()
    logged, failed_saves, looked = start, 0, False
    times.read()
    for step in range(start + 1, plan.steps + 1):
        watch.at(step, "data")
        with times.host("data"):
            micro_batches = broken(dist.strike(step, "step", faults), next(batches))
        samples = describe_samples(micro_batches)
        watch.at(step, "agreement", samples)
        with times.host("agreement"):
            request = agreement.ask(samples)
        if not looked:  # else rank 0 has decoded videos meanwhile
            stragglers.add(request.last_rank, request.late_s)
        last = request.quit or step == plan.steps
        logs = last or step % options.metrics.log_every == 0
        watch.at(step, "forward and backward", samples)
        with profiler.around(step):
            taken = trainer.step(
                [batch.to(device) for batch in micro_batches],
                meter,
                times,
                measure_delta=logs and options.metrics.weight_delta and not plan.offloads_optimizer,
            )
        data_meter.add(micro_batches, taken.tokens)
        watch.at(step, "log", samples)
        if not taken.updated:
            skipped.add(step, taken, trainer.grad_norm)
        else:
            skipped.clear()
        if logs:
            lost, counted = meter.read(), data_meter.read()
            seconds, parts = times.read()
            late, warned = stragglers.read(seconds)
            seconds -= sum(parts.get(part, 0.0) for part in BESIDE)
            scalars = {
                **losses(lost, dataset_names(plan)),
                "train/lr": trainer.engine.get_lr()[0],
                "train/grad_norm": trainer.grad_norm,
                "train/skipped_steps": float(trainer.skipped_steps),
                **({} if taken.weight_delta is None else {"train/weight_delta_norm": taken.weight_delta}),
                **speed(counted, seconds, parts, step - logged, plan.topology.world_size, peak),
                **counted.curves,
                **late,
                **profiler.take(),
                **peak_memory(device),
            }
            log.step(step, scalars, seconds / (step - logged))
            if warned and step > start + 1:  # the first step waits for what each rank builds
                dist.say(warned)
            logged = step
        if validation is not None and (last or step % options.validation.every == 0):
            with times.host("validation"):
                looks.validate(trainer, validation, log, watch, step)
        looked = previews is not None and (last or step % options.sample.every == 0)
        if looked and previews is not None:
            watch.at(step, "samples")
            with times.host("samples"):
                looks.show(trainer, previews, log, step, folder)
        due = options.checkpoint.save_every and step % options.checkpoint.save_every == 0
        if last or due or request.reason:
            watch.at(step, "save", samples)
            if request.reason:
                dist.say(f"saving step {step}: {request.reason}")
            with times.host("save"):
                saver.finish()
            failed_saves = report_saves(saver, log, step, failed_saves)
            if failed_saves >= FAILED_SAVES:
                raise cli.RunFailed(f"{failed_saves} checkpoints in a row could not be saved; see above")
            with times.host("save"):
                saver.start(step, trainer.fragments(), trainer.state())
            agreement.saved()
        failed_saves = report_saves(saver, log, step, failed_saves)
        if last:
            break
    watch.at(step, "end")
    profiler.close()
    saver.finish()
    failed_saves = report_saves(saver, log, step, failed_saves)
    log.close()
    if failed_saves:
        raise cli.RunFailed(f"step {step} is trained but not saved; see above")
    if step < plan.steps:
        dist.say(f"{request.reason} at step {step} of {plan.steps}; the same command goes on from here")
    else:
        dist.say(f"finished {plan.steps} steps; curves: tensorboard --logdir {folder / 'tensorboard'}")


def dataset_names(plan: Plan) -> list[str]:
    """Return a short name of each dataset that is trained on."""
    return plan.data.names if isinstance(plan.data, Mixture) else [""]


def losses(lost: LossReading, datasets: list[str]) -> dict[str, float]:
    """Return the points of the loss curves; those by dataset where there are several."""
    of_datasets = {datasets[number]: value for number, value in lost.by_dataset.items()}
    return {
        "train/loss": lost.loss,
        **{f"train/loss_by_sigma/q{index}": value for index, value in lost.by_sigma.items()},
        **{f"train/weighted_loss_by_sigma/q{index}": each for index, each in lost.weighted_by_sigma.items()},
        **{f"train/loss_by_dataset/{name}": value for name, value in of_datasets.items()},
    }


def gpu_peak(given: float | None, device: torch.device) -> float | None:
    """Return the FLOP/s that one GPU could do at best, None where nobody knows."""
    if given is not None:
        return given * 1e12
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def report_saves(saver: Saver, log: RunLog, step: int, failed: int) -> int:
    """Say how the saves went that have ended; return how many in a row failed by now, `failed` before."""
    for saved in saver.ended():
        failed = failed + 1 if saved.problem else 0
        dist.say(saved.describe())
        log.scalars(
            step,
            {
                "save/copy_s": saved.copy_seconds,
                "save/write_s": saved.write_seconds,
                "save/failed": float(failed),
            },
        )
    return failed


def fill(trainer: "Trainer", resume_from: Path | None) -> int:
    """Fill the trainer with a checkpoint, given weights or random ones; return the step that this stands
    at."""
    plan = trainer.plan
    try:
        if resume_from is not None:
            saved = checkpoint.StepWeights(resume_from)
            say_changes(saved, trainer)
            with progress("resume", 2 * len(saved.keys())) as bar:
                trainer.resume(saved, bar.update)
            dist.say(f"resumed {resume_from}, written by {saved.manifest['world_size']} ranks")
            return saved.step
        source = open_start(plan.config, plan.variant)
        with progress("weights", len(source.keys())) as bar:
            trainer.start(source, bar.update)
    except (ValueError, OSError) as error:  # weights were whole when the plan was made
        raise cli.UserError(str(error)) from None
    return 0


def say_changes(saved: checkpoint.StepWeights, trainer: "Trainer") -> None:
    """Say what differs from the run that wrote a checkpoint. Raises ValueError for what makes it another
    experiment and was not allowed by name."""
    found = changes(saved.manifest, trainer.state(), had_ema=saved.has_ema)
    for name, (then, now) in found.items():
        dist.say(f"changed since step {saved.step}: {name} was {then}, is {now}")
    not_allowed = refused(found, trainer.plan.config.checkpoint.allow_changes)
    if not_allowed:
        differences = "; ".join(f"{name} was {then}, is {now}" for name, (then, now) in found.items())
        raise ValueError(
            f"{saved.folder} was trained with another {', '.join(not_allowed)} ({differences}); go back,"
            f" allow it by --checkpoint.allow_changes {' '.join(not_allowed)}, or begin a new run from its"
            " weights: --model.init_from an export, another --output"
        )


def write_run_files(folder: Path, options: config.TrainConfig) -> None:
    """Write what ran and where beside the curves, on rank 0."""
    if dist.is_main():
        write_json(folder / USED, config.to_dict(options))
        write_json(folder / "env.json", describe_environment())


def progress(title: str, total: int) -> "tqdm[Any]":
    """Return a bar on rank 0's terminal that counts tensors; silent elsewhere."""
    return tqdm(total=total, desc=title, unit="tensor", disable=None if dist.is_main() else True)


if __name__ == "__main__":
    cli.run(main, PROG, rank=dist.environment().rank, leave=dist.leave)
