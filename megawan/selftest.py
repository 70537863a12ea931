"""The self-test of a machine: a pruned grid of layouts on its GPUs or CPUs, each compared with one rank.

`launch` starts the ranks and yields their lines; this module itself is what each rank runs (`python -m`).
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megawan import dist
from megawan.parity import POLICIES, Bench, Difference, Layout, Outcome, Problem, compare, layouts

RANK_MODULE = "megawan.selftest"
ROOT = Path(__file__).resolve().parents[1]
MOST_CPU_RANKS = 8
POLL_S = 0.1
GRACE_S = 10.0
TAIL_LINES = 30
# Heads: 8 take Ulysses 2, 4 and 8, 6 take Ulysses 2, 3 and 6, 5 on most machines a ring alone.
PROBLEMS = (Problem("t2v", 8, (3, 3, 5)), Problem("ti2v", 6, (5, 3, 7)), Problem("i2v", 5, (5, 1, 1)))
ENGINE_PROBLEM = Problem("t2v", 8, (3, 3, 5))
STAGES = (3, 2, 1)
# A fault shows as 1e-2 and more in some gradient. Float32 rounding alone reached 3e-6 on CPUs.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-5}
ENGINE_SHARE = 0.7
"""Of the time limit; no case through the engine starts later."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    problem: str
    layout: str
    zero: str
    difference: Difference
    ok: bool
    """On every rank."""
    seconds: float

    def line(self) -> str:
        """Return the row under `HEADING`."""
        found = self.difference
        return (
            f"{self.problem:<26} {self.layout:<56} {self.zero:<4} {found.loss:<8.1e} {found.parameter:<8.1e}"
            f" {found.gradient:<8.1e} {found.gradient_name:<34} {'ok' if self.ok else 'DIFFERS'}"
        )


HEADING = f"{'model':<26} {'layout':<56} {'zero':<4} {'loss':<8} {'weights':<8} {'worst gradient':<43} result"


class SelftestError(RuntimeError):
    """The ranks failed or time ran out; the message ends with their last output."""


def check(ranks: int, time_limit: float) -> None:
    """Raise ValueError for a world that this machine does not hold, or no time."""
    if torch.cuda.is_available():
        most, what = torch.cuda.device_count(), "this machine's GPUs"
    else:
        most, what = MOST_CPU_RANKS, "on CPUs"
    if not 1 <= ranks <= most:
        raise ValueError(f"--ranks {ranks} must be 1 to {most} ({what})")
    if not time_limit > 0:
        raise ValueError(f"--time_limit {time_limit} must be above 0 seconds")


def default_ranks() -> int:
    """Return the GPUs of this machine, or 2 without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def launch(ranks: int, *, zero: bool, time_limit: float) -> Generator[Row | str, None, None]:
    """Yield the rows, and notes between them, as `ranks` ranks on this machine come to them.

    The ranks run in a session of their own, which has ended when this ends.
    Raises SelftestError when a rank fails or `time_limit` seconds have passed.
    """
    with tempfile.TemporaryDirectory(prefix="megawan-selftest-") as name:
        results, log = Path(name) / "results.jsonl", Path(name) / "log"
        results.touch()
        options = json.dumps({"results": str(results), "zero": zero, "time_limit": time_limit})
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
            *("--master_addr=127.0.0.1", f"--master_port={dist.free_port()}", "-m", RANK_MODULE, options),
        ]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        with log.open("wb") as output, results.open(encoding="utf-8") as reader:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            deadline = time.monotonic() + time_limit + GRACE_S  # each rank ends itself at time_limit
            try:
                while True:
                    ended = process.poll() is not None
                    for line in reader:
                        yield _parse(line)
                    if ended or time.monotonic() > deadline:
                        break
                    time.sleep(POLL_S)
            finally:
                _end(process)
        if process.returncode:
            tail = log.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:]
            what = f"the ranks ended with exit code {process.returncode} (time limit {time_limit:g} s)"
            raise SelftestError("\n".join([f"{what}; their last lines:", *tail]))


def _parse(line: str) -> Row | str:
    entry = json.loads(line)
    if "note" in entry:
        return str(entry["note"])
    return Row(**{**entry, "difference": Difference(**entry["difference"])})


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the launcher: it ends its ranks, which have sessions of their own, when it is asked to."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_rank(options: dict[str, Any]) -> None:
    """Run every case on this rank; rank 0 writes the rows."""
    faulthandler.dump_traceback_later(options["time_limit"], exit=True)  # a hang in a collective included
    began = time.monotonic()
    place = dist.environment()
    device = dist.pick_device(place.local_rank)
    torch.set_float32_matmul_precision("highest")  # no TF32: its rounding would hide faults
    torch.backends.cudnn.allow_tf32 = False
    dist.initialize(place, device, options["time_limit"])
    bench = Bench(place.world_size, place.rank, device, options["time_limit"])
    with Path(options["results"]).open("a", encoding="utf-8") as file:

        def write(entry: dict[str, Any]) -> None:
            if place.rank == 0:
                file.write(json.dumps(entry) + "\n")
                file.flush()

        for problem in PROBLEMS:
            for layout in pruned(place.world_size, problem.heads, problem.heads):
                write(asdict(_row(bench, problem, layout, None)))
        if options["zero"]:
            objection = _engine_objection(device)
            if not dist.all_succeeded(objection is None):
                write({"note": f"ZeRO was left out: {objection or 'DeepSpeed fails on another rank'}"})
            else:
                for stage, layout in engine_cases(place.world_size):
                    if not dist.all_succeeded(
                        time.monotonic() - began < ENGINE_SHARE * options["time_limit"]
                    ):
                        write({"note": "the other ZeRO cases were left out: raise --time_limit for them"})
                        break
                    write(asdict(_row(bench, ENGINE_PROBLEM, layout, stage)))
    dist.shutdown()
    faulthandler.cancel_dump_traceback_later()


def pruned(world_size: int, heads: int, turn: int) -> list[Layout]:
    """Return one layout for every pair of degrees; batch splits and recompute policies change with `turn`."""
    chosen: dict[tuple[int, int], list[Layout]] = {}
    for layout in layouts(world_size, heads, POLICIES):
        chosen.setdefault((layout.ulysses, layout.ring), []).append(layout)
    return [group[(4 * index + turn) % len(group)] for index, group in enumerate(chosen.values())]


def engine_cases(world_size: int) -> list[tuple[int, Layout]]:
    """Return (ZeRO stage, layout) of each case through the engine, the stage that most people use first."""
    heads = ENGINE_PROBLEM.heads
    return [(stage, layout) for stage in STAGES for layout in pruned(world_size, heads, stage)]


def _row(bench: Bench, problem: Problem, layout: Layout, stage: int | None) -> Row:
    began = time.monotonic()
    dtype = torch.float64 if stage is None else torch.float32
    wanted = bench.reference(problem, dtype)
    found: Outcome = (
        bench.plain(problem, layout, dtype) if stage is None else bench.sharded(problem, layout, stage)
    )
    difference = compare(found, wanted)
    return Row(
        problem.describe(),
        layout.describe(bench.world_size),
        "-" if stage is None else str(stage),
        difference,
        dist.all_succeeded(difference.worst() < TOLERANCES[dtype]),
        time.monotonic() - began,
    )


def _engine_objection(device: torch.device) -> str | None:
    """Return why the DeepSpeed engine cannot run here, None if it can."""
    try:
        from megawan import engine
    except ImportError as error:
        return str(error)
    try:
        if device.type == "cpu":
            engine.load_host_extension()
    except engine.ExtensionError as error:
        return str(error)
    return None


if __name__ == "__main__":
    run_rank(json.loads(sys.argv[1]))
    dist.leave(0)
