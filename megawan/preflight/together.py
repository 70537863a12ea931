"""What ranks can only tell together: clocks, Slurm's view, the checkpoint to go on from, the run folder."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megawan import checkpoint, dist
from megawan.changes import changes, refused
from megawan.config import TrainConfig
from megawan.models.keys import expected_shapes
from megawan.plan import Plan
from megawan.preflight.table import Check, Checks
from megawan.run_folder import RunFolder

CLOCKS_S = 5.0
"""Clocks that differ more mix up the times of logs, events and locks."""


def compare_clocks(times: Sequence[float], hosts: Sequence[str]) -> Check:
    """Return the row of the ranks' clocks, read at the same moment, in seconds."""
    spread = max(times) - min(times)
    if len(times) == 1:
        return Check("clocks", None, "one rank has one clock")
    found = f"{spread:.2g} s apart"
    if spread > CLOCKS_S:
        late, early = times.index(min(times)), times.index(max(times))
        found += f": rank {late} on {hosts[late]} is behind rank {early} on {hosts[early]}"
    return Check("clocks", spread <= CLOCKS_S, found, "synchronise the machines' clocks (chrony, ntpd)")


def compare_slurm(
    told: Sequence[Mapping[str, str]], places: Sequence[dist.Environment], hosts: Sequence[str]
) -> Check:
    """Return the row of Slurm's view, `told` as dist.slurm gives it, against the launched ranks."""
    if not any("STEP_NUM_TASKS" in one for one in told):
        return Check("slurm", None, "not started by srun")
    nodes = [one.get("NODENAME", host) for one, host in zip(told, hosts, strict=True)]
    problem = _slurm_problem(told, places, nodes)
    found = problem or f"job {told[0]['JOB_ID']}: {len(places)} ranks on {len(set(nodes))} nodes"
    mend = (
        "start one torchrun a node (srun --ntasks-per-node=1) with --nnodes and --nproc_per_node of this"
        " allocation, as slurm/*.sh do"
    )
    return Check("slurm", not problem, found, mend)


def _slurm_problem(
    told: Sequence[Mapping[str, str]], places: Sequence[dist.Environment], nodes: Sequence[str]
) -> str:
    """Return what does not go together, in words; `nodes`: of every rank, its node."""
    for what in ("JOB_ID", "STEP_NUM_TASKS", "STEP_NUM_NODES"):
        values = sorted({one.get(what, "none") for one in told})
        if len(values) > 1:
            return f"SLURM_{what} differs between ranks: {', '.join(values)}"
    names, step = sorted(set(nodes)), told[0]
    if step["STEP_NUM_NODES"] != str(len(names)):
        return f"srun started {step['STEP_NUM_NODES']} nodes, but ranks are on {', '.join(names)}"
    if step["STEP_NUM_TASKS"] not in (str(len(names)), str(len(places))):
        return (
            f"srun started {step['STEP_NUM_TASKS']} tasks on {len(names)} nodes for a world of {len(places)}"
            " ranks; legal: one a node, or one a rank"
        )
    for name in names:
        here = sorted(place.local_rank for place, node in zip(places, nodes, strict=True) if node == name)
        if here != list(range(len(here))):
            return f"{name} has the local ranks {here}, not 0 to {len(here) - 1}"
    return ""


def look_at_folder(checks: Checks, path: Path, config: TrainConfig, made: Plan | None, size: int) -> None:
    """Add the rows of the checkpoint to go on from and of the run folder, left as it was; collective.

    `size`: bytes of one checkpoint. Without a plan a checkpoint is not compared with it.
    """
    root, options = path / "checkpoints", config.checkpoint
    checks.attempt(
        "resume",
        lambda: resumed(root, config, made),
        str,
        "move a damaged step folder away; go back to the run's settings, or name the change in"
        " --checkpoint.allow_changes; or begin anew with another --output",
    )

    def tried() -> str:
        folder = RunFolder(path)
        folder.claim(size, dist.job_id())
        try:
            there = len(checkpoint.step_folders(root))
            return require_space(shutil.disk_usage(root).free, size, options.keep_last, there)
        finally:
            dist.all_succeeded(True)  # all have looked at what rank 0 takes away
            folder.release()
            dist.all_succeeded(True)  # it is gone before anybody looks again

    checks.attempt(
        "run folder",
        tried,
        lambda found: f"{path}: {found}",
        "free some space, lower --checkpoint.keep_last, or choose another --output",
        alike=lambda found: str(path),
    )


def resumed(root: Path, config: TrainConfig, made: Plan | None) -> str:
    """Return what the run goes on from, headers read only; collective. Raises ValueError when the newest
    checkpoint is damaged, of another model, or of another experiment."""
    options = config.checkpoint
    chosen = checkpoint.choose(root, options.resume, contents=False)
    if chosen is None:
        return f"starts anew: no checkpoint under {root}"
    if options.resume in ("auto", "must"):
        # Training would take an older one and say so; a person who is still there may want to know before.
        newest = dist.share_text(str(checkpoint.step_folders(root)[0]) if dist.is_main() else "")
        checkpoint.verify(Path(newest), contents=False)
    saved = checkpoint.StepWeights(chosen)
    if made is None:
        return f"goes on from {chosen}, which is whole; not compared with this run: needs the rows above"
    saved.require(expected_shapes(made.variant.config), f"--model.variant {made.variant.name}")
    found = changes(saved.manifest, made.state(), had_ema=saved.has_ema)
    changed = "; ".join(f"{name} was {then}, is {now}" for name, (then, now) in found.items())
    if refused(found, options.allow_changes):
        raise ValueError(f"{chosen} is of another experiment: {changed}")
    return f"goes on from {chosen}, step {saved.step} of {made.steps}" + (f"; {changed}" if changed else "")


def require_space(free: int, one: int, keep_last: int, there: int) -> str:
    """Return what the disk has room for, in words: `free` bytes, checkpoints of `one`, of which `keep_last`
    stay (0: all) and `there` are there.

    Raises ValueError when the run would fill the disk: one more than those that stay lies there while it is
    written.
    """
    more = max(1, keep_last + 1 - there)
    text = f"{free / 1e9:.1f} GB free, a checkpoint takes {one / 1e9:.3g} GB"
    if free < more * one:
        raise ValueError(
            f"{text}, and {more} more will lie there at once (--checkpoint.keep_last {keep_last} and the one"
            " that is written)"
        )
    return text


def places_of(texts: Sequence[str]) -> list[dist.Environment]:
    """Return the ranks' environments from what `described` made of them."""
    return [dist.Environment(**json.loads(text)) for text in texts]


def described(place: dist.Environment) -> str:
    """Return this rank's environment as text."""
    return json.dumps(dataclasses.asdict(place))
