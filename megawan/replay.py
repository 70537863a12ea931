"""Take a step again that did not update the weights, and say which of its videos was to blame."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megawan import checkpoint, dist
from megawan.faults import broken
from megawan.metrics import LossMeter
from megawan.plan import Plan, open_start
from megawan.skipped import gather_drawn
from megawan.trainer import Taken, Trainer


@dataclass(frozen=True)
class Dump:
    """What a run wrote down of a step that it skipped (megawan/skipped.py)."""

    step: int
    samples: list[dict[str, Any]]


def read_dump(file: Path) -> Dump:
    """Return the dump in `file`. Raises ValueError when it is none; OSError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples = content["samples"]
        if not all(type(row["id"]) is int and type(row["epoch"]) is int for row in samples):
            raise TypeError
        return Dump(int(content["step"]), samples)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what a run writes of a skipped step ({error})") from None


def start_before(root: Path, step: int) -> Path | None:
    """Return the newest sound step folder under `root` of an earlier step, None when there is none."""
    for folder in checkpoint.step_folders(root):
        if checkpoint.step_of(folder) < step:
            try:
                checkpoint.verify(folder)
                return folder
            except checkpoint.DamagedCheckpoint as error:
                dist.say(f"skipped {error}")
    return None


def replay(trainer: Trainer, start: Path | None, dump: Dump) -> list[str]:
    """Return what the step of `dump` does now, in lines: from the checkpoint `start` (or the run's first
    weights) all steps up to it are taken again, which is bit for bit what the run did in the same layout;
    collective."""
    plan = trainer.plan
    if start is None:
        trainer.start(open_start(plan.config, plan.variant), lambda: None)
    else:
        trainer.resume(checkpoint.StepWeights(start), lambda: None)
    batches, meter, faults = trainer.batches(trainer.steps_done), LossMeter(trainer.device), dist.faults()
    dist.say(f"from {start or 'the first weights'}: {dump.step - trainer.steps_done} steps to take")
    while True:
        step = trainer.steps_done + 1
        micro_batches = broken(dist.strike(step, "step", faults), next(batches))
        taken = trainer.step([batch.to(trainer.device) for batch in micro_batches], meter)
        if step == dump.step:
            return report(trainer, taken, dump)


def report(trainer: Trainer, taken: Taken, dump: Dump) -> list[str]:
    """Return a line for every video of the step, what it has in common with the dump, and what is not
    finite."""
    plan = trainer.plan
    # Another layout deals the samples of a step to other ranks.
    rows = sorted(gather_drawn(taken, trainer.dp_rank, plan), key=_sample)
    before = sorted(dump.samples, key=_sample)
    if list(map(_sample, rows)) != list(map(_sample, before)):
        raise ValueError(
            f"step {dump.step} trained on samples {[row['id'] for row in before]}, now on"
            f" {[row['id'] for row in rows]}: give the data, seed and global batch of the run"
        )
    lines = []
    for row, then in zip(rows, before, strict=True):
        lines.append(
            f"sample {row['id']} (epoch {row['epoch']}, sigma {row['sigma']:.6f}): mse {row['mse']:.6g}, then"
            f" {then['mse']}; {_inputs(plan, int(row['id']))}; {then.get('prompt', '')!r}"
        )
    said = "updates the weights" if taken.updated else "does not update the weights"
    return [*lines, f"step {dump.step} {said}: gradient norm {trainer.grad_norm:.6g}"]


def _sample(row: dict[str, Any]) -> tuple[int, int]:
    return row["id"], row["epoch"]


def _inputs(plan: Plan, sample_id: int) -> str:
    """Return which stored features of a sample are not finite."""
    try:
        sample = plan.data[sample_id]
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    features = {
        "latents": sample.latents,
        "text": sample.text,
        "clip": sample.clip,
        "condition": sample.condition,
    }
    bad = [
        f"{int((~torch.isfinite(value)).sum())} numbers of its {name} are not finite"
        for name, value in features.items()
        if value is not None and not torch.isfinite(value).all()
    ]
    if bad:
        return ", ".join(bad)
    largest = max(float(value.abs().max()) for value in features.values() if value is not None)
    return f"its features are finite, largest {largest:.3g}"
