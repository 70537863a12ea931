"""What each rank does in the preflight's tests: one mistake after the other in one group."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megawan import dist, saving
from megawan.checkpoint import MOMENTS, CheckpointOptions, Fragment, rank_file
from megawan.models.keys import expected_shapes
from megawan.parallel.topology import Topology
from megawan.plan import make_plan
from megawan.preflight.links import try_links
from megawan.preflight.run import examine, parse
from megawan.run_folder import LOCK, RunFolder


def cases(folder: str) -> dict[str, Any]:
    """Return (name, ok, found, mend) of every row of each case, and what each left behind."""
    base, place = Path(folder), dist.environment()
    dist.initialize(place, torch.device("cpu"), 60)
    host = dist.host_group(60)
    seen: dict[str, Any] = {}

    def look(case: str, *argv: str, now: Callable[[], float] = time.time, **variables: str) -> None:
        torch.distributed.barrier()
        before = sorted(map(str, base.rglob("*")))
        with environment(**variables):
            words = ("--output", str(base / "run"), "--collective_timeout", "20", *argv)
            rows = examine(parse(words, prog="preflight.py", description=""), place, host, now).rows
        torch.distributed.barrier()
        seen[case] = {row.name: [row.ok, row.found, row.mend] for row in rows}
        seen[case]["left behind"] = sorted(set(map(str, base.rglob("*"))) - set(before))
        torch.distributed.barrier()  # what comes next writes into the folder

    other = place.rank == place.world_size - 1  # one rank of two, or the only one
    look("sound")
    look("layout", "--parallel.ulysses_degree", "3")
    look("deepspeed", TORCH_EXTENSIONS_DIR="/dev/null/extensions")
    look("another seed", "--seed", "1" if other else "0")
    look("one without data", *(("--data.path", str(base / "nowhere")) if other else ()))
    look("clocks", now=lambda: time.time() + 60 * other)
    for case, tasks, nodes in (
        ("slurm", "1", "1"),
        ("slurm of 7 tasks", "7", "1"),
        ("slurm of 2 nodes", "1", "2"),
    ):
        told = {"SLURM_JOB_ID": "5", "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}
        look(case, **told, SLURMD_NODENAME="n1")
    checkpoints(look, base, other)
    look("numbers", MEGAWAN_FAULT=f"0:{place.world_size - 1}:nan@collective")
    hang = f"0:{place.world_size - 1}:hang@collective"
    look("hang", "--collective_timeout", "2", MEGAWAN_FAULT=hang)  # the last: its thread stays
    return seen


def checkpoints(look: Callable[..., None], base: Path, other: bool) -> None:
    """Look at run folders that hold checkpoints, sound and not, and at one that is held."""
    look("none there", "--checkpoint.resume", "must")
    for step in (1, 2):
        save(base / "run", step)
    look("goes on")
    look("another experiment", "--seed", "3", "--ema.decay", "0.9")
    look(
        "allowed", "--seed", "3", "--checkpoint.allow_changes", "seed", "data"
    )  # synthetic data has the seed
    look("another model", "--model.variant", "debug-i2v")
    held = RunFolder(base / "run")
    held.claim(0, "")
    look("held")
    held.release()
    torch.distributed.barrier()
    file = base / "run/checkpoints/step_0000002" / rank_file(0)
    if dist.is_main():
        file.write_bytes(file.read_bytes()[:-1])
    look("damaged", "--parallel.ulysses_degree", "5")
    torch.distributed.barrier()
    if dist.is_main():
        shutil.rmtree(file.parent)
    if dist.is_main():
        (base / "file").touch()
    look("a file", "--output", str(base / "file"))
    assert not (base / "run" / LOCK).exists()


def save(run: Path, step: int) -> None:
    """Save a checkpoint of zeros of the debug run."""
    words = parse(("--output", str(run)), prog="preflight.py", description="")
    plan = make_plan(words, dist.environment())
    pieces = [
        Fragment(kind, name, shape, 0, torch.zeros(torch.Size(shape).numel()))
        for name, shape in expected_shapes(plan.variant.config).items()
        for kind in ("master", *MOMENTS)
        if dist.is_main()
    ]
    saving.save(run / "checkpoints", step, pieces, plan.state(), CheckpointOptions())


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def layouts() -> dict[str, Any]:
    """Try the groups of two layouts, sound and with wrong numbers; return rates and failed rows."""
    place, found = dist.environment(), dict[str, Any](wrong={})
    dist.initialize(place, torch.device("cpu"), 60)
    host = dist.host_group(60)
    for name, topology in (("ulysses", Topology(2, 2, 1)), ("ring", Topology(2, 1, 2))):
        rows = try_links(topology, torch.device("cpu"), 20, host)
        found[name] = next(row.found for row in rows if row.name == name)
        with environment(MEGAWAN_FAULT="0:1:nan@collective"):
            rows = try_links(topology, torch.device("cpu"), 20, host)
        found["wrong"][name] = [row.name for row in rows if row.ok is False]
    return found
