"""Context parallelism against one process, the same global work: `run` starts the ranks; this module itself
is what each of them runs (`python -m`).

Both ways are taken in turn by the same ranks, so that what else the machine does meets both alike: all ranks
together, each with `threads` threads, then the first alone with all the threads while the others wait.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from megawan import dist
from megawan.benchmark.problem import CPU_PROBLEMS, Problem, make_inputs
from megawan.benchmark.report import Table
from megawan.benchmark.steps import source_model
from megawan.benchmark.timing import Spread, paired_ratio
from megawan.flow.loss import flow_loss
from megawan.models.wan import patchify
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2


class RanksFailed(RuntimeError):
    """The ranks failed or time ran out; the message ends with their last lines."""


def run(problems: list[str], dtypes: list[str], repetitions: int, warm_up: int, time_limit: float) -> Table:
    """Return the table of 2 ranks with 1 thread against 1 rank with 2 threads. Raises RanksFailed."""
    table = Table("Context parallelism: 2 ranks x 1 thread against 1 rank x 2 threads, same global work")
    with tempfile.TemporaryDirectory(prefix="megawan-benchmark-") as name:
        result, log = Path(name) / "result.json", Path(name) / "log"
        options = json.dumps(
            {
                "result": str(result),
                "problems": problems,
                "dtypes": dtypes,
                "repetitions": repetitions,
                "warm_up": warm_up,
            }
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={WORLD}"),
            *("--master_addr=127.0.0.1", f"--master_port={dist.free_port()}"),
            *("-m", "megawan.benchmark.ranks", options),
        ]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(time_limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        if code != 0:
            tail = log.read_text("utf-8", "replace").splitlines()[-15:]
            raise RanksFailed("\n".join([f"the ranks ended with {code} (limit {time_limit:g} s):", *tail]))
        for entry in json.loads(result.read_text("utf-8")):
            together, alone = Spread.of(entry["together"]), Spread.of(entry["alone"])
            ratio = paired_ratio(entry["together"], entry["alone"])
            table.rows.append(
                {
                    "problem": entry["problem"],
                    "layout": entry["layout"],
                    "2 ranks x 1 thread, s": together.median,
                    "1 rank x 2 threads, s": alone.median,
                    "ratio": f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                }
            )
            table.details.append(entry)
    return table


def main(options: dict[str, Any]) -> None:
    """Measure on this rank; rank 0 writes the result."""
    place = dist.environment()
    dist.initialize(place, torch.device("cpu"), 300)
    problems = {problem.name: problem for problem in CPU_PROBLEMS}
    entries = [
        _compare(problems[name], getattr(torch, dtype), layout, options)
        for name in options["problems"]
        for dtype in options["dtypes"]
        for layout in ("ulysses", "ring")
    ]
    if place.rank == 0:
        Path(options["result"]).write_text(json.dumps(entries), "utf-8")
    dist.shutdown()


def _compare(problem: Problem, dtype: torch.dtype, layout: str, options: dict[str, Any]) -> dict[str, Any]:
    rank, cpu = torch_dist.get_rank(), torch.device("cpu")
    ulysses = WORLD if layout == "ulysses" else 1
    topology = Topology(WORLD, ulysses, WORLD // ulysses)
    model, inputs = source_model(problem, cpu, dtype), make_inputs(problem, cpu, dtype)
    many, one = ContextParallel.create(topology, rank, 300), ContextParallel.single()

    def step(context: ContextParallel) -> None:
        pred = model(inputs.x_t, inputs.timestep, inputs.text, context=context)
        target = context.shard(patchify(inputs.target, problem.config.patch_size))
        loss = flow_loss(
            pred, target, inputs.weight, valid=None, valid_tokens=problem.tokens, cp_size=context.size
        ).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    together, alone = list[float](), list[float]()
    for number in range(options["warm_up"] + options["repetitions"]):
        torch.set_num_threads(1)
        torch_dist.barrier()
        began = time.perf_counter()
        step(many)
        torch_dist.barrier()
        seconds = time.perf_counter() - began
        if rank == 0:
            torch.set_num_threads(WORLD)
            began = time.perf_counter()
            step(one)
            if number >= options["warm_up"]:
                alone.append(time.perf_counter() - began)
                together.append(seconds)
    short = str(dtype).removeprefix("torch.")
    return {"problem": f"{problem.name} {short}", "layout": layout, "together": together, "alone": alone}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    dist.leave(0)
