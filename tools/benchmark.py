"""Measure this machine: our training step beside diffusers' and DiffSynth's, kernels, ranks, loop, disk.

    OMP_NUM_THREADS=2 python tools/benchmark.py --suite cpu
    python tools/benchmark.py --suite gpu
    python tools/benchmark.py --suite kernels

Every implementation has the same weights and inputs and runs once in each round; ratios are taken within a
round. DiffSynth is measured where Python can import it. Writes a JSON and a Markdown table.
"""

import importlib.util
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan import cost, dist
from megawan.benchmark import arms, disk, kernels, ranks, report, steps, trainer
from megawan.benchmark.problem import CPU_PROBLEMS, GPU_PROBLEMS, Problem
from megawan.cli import RunFailed, UserError, parse, run

PROG = "tools/benchmark.py"
Row = Literal["steps", "cp", "loop", "start", "disk"]
LOOP_FLAGS = ("--model.variant=debug", "--data.num_frames=17", "--data.height=256", "--data.width=256")


@dataclass(frozen=True)
class Options:
    """What to measure, how often, where to write it."""

    suite: Literal["cpu", "gpu", "kernels"]
    """cpu and gpu measure steps (gpu needs CUDA); kernels measures single operations on either."""
    only: tuple[Row, ...] = ()
    """Of the cpu suite: steps beside others, cp (2 ranks against one), loop (train.py around its model),
    start (until the first step), disk (export and conversion); all by default. The gpu suite has steps."""
    problems: tuple[str, ...] = ()
    """Sizes by name, all of the suite by default; a wrong name lists them."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """By default both on CPUs and bfloat16 on GPUs."""
    policies: tuple[Literal["none", "full", "attention", "selective"], ...] = cost.POLICIES  # type: ignore[assignment]
    """Recompute policies; others have none and full."""
    ways: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """Compiled blocks take minutes to build."""
    compiled_peers: bool = True
    """Compile the others' blocks too where ours are."""
    optimizer: bool = False
    """Add a step of torch's AdamW, the same for all."""
    repetitions: int = 20
    """Rounds that count."""
    warm_up: int = 3
    """Rounds before them."""
    profile: bool = True
    """Also count memory, FLOPs and self times."""
    gib: float = 1.0
    """Size of the weights of the disk rows."""
    time_limit: float = 3600.0
    """Seconds for the ranks of the cp row."""
    output: Path = Path("benchmark")
    """Folder for SUITE.json and SUITE.md."""


def main(argv: Sequence[str]) -> None:
    """Measure as `argv` says. Raises UserError for what this machine or the suite does not have."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    problems = check(options)
    warnings.filterwarnings("ignore", module=r"torch\._inductor|torch\._dynamo")
    device = torch.device("cuda" if options.suite != "cpu" and torch.cuda.is_available() else "cpu")
    dtypes = options.dtypes or (("bfloat16",) if device.type == "cuda" else ("float32", "bfloat16"))
    command = shlex.join(["python", PROG, *argv])
    tables: list[report.Table] = []

    def keep(so_far: Sequence[report.Table]) -> None:
        report.write(options.output, options.suite, so_far, command)

    def done(*new: report.Table) -> None:
        """Show and keep what is measured so far."""
        tables.extend(new)
        for table in new:
            print(table.markdown(), flush=True)
        keep(tables)

    try:
        if options.suite == "kernels":
            for dtype in dtypes:
                arguments = (device, getattr(torch, dtype), options.repetitions, options.warm_up)
                done(*kernels.attention(*arguments), kernels.products(*arguments))
                done(*kernels.elementwise(*arguments))
            return
        only = options.only or (
            ("steps",) if options.suite == "gpu" else ("steps", "cp", "loop", "start", "disk")
        )
        if "steps" in only:
            for problem in problems:
                for dtype in dtypes:
                    done(step_table(problem, dtype, device, options, lambda table: keep([*tables, table])))
        if "cp" in only:
            names = [problem.name for problem in problems]
            done(ranks.run(names, list(dtypes), options.repetitions, options.warm_up, options.time_limit))
        if "loop" in only:
            done(trainer.loop(LOOP_FLAGS, 20))
        if "start" in only:
            done(trainer.first_step(("--model.variant=debug",), dist.free_port, min(5, options.repetitions)))
        if "disk" in only:
            done(disk.export_and_convert(options.output, options.gib, min(5, options.repetitions)))
    except (RuntimeError, OSError) as error:
        raise RunFailed(str(error)) from None


def step_table(
    problem: Problem,
    dtype: str,
    device: torch.device,
    options: Options,
    timed: Callable[[report.Table], object],
) -> report.Table:
    """Return the table of one problem, with a bar over its rounds; `timed` gets it before it is profiled."""
    ways = [way == "compiled" for way in options.ways]
    wanted = [
        kind
        for kind in steps.kinds(options.policies, arms.available_peers(), ways)
        if options.compiled_peers or kind.framework == arms.OURS or not kind.compiled
    ]
    with tqdm(
        total=options.repetitions + options.warm_up,
        desc=f"{problem.name} {dtype}, {len(wanted)} steps a round",
        disable=None,
    ) as bar:
        return steps.measure(
            problem,
            getattr(torch, dtype),
            wanted,
            device=device,
            repetitions=options.repetitions,
            warm_up=options.warm_up,
            optimizer=options.optimizer,
            profiled=options.profile,
            tick=bar.update,
            timed=timed,
        )


def check(options: Options) -> list[Problem]:
    """Return the problems. Raises UserError for what cannot be measured."""
    if options.suite == "gpu" and not torch.cuda.is_available():
        raise UserError("--suite gpu needs a CUDA GPU, and torch sees none; --suite cpu and kernels run here")
    if options.repetitions < 1 or options.warm_up < 0:
        raise UserError(
            f"--repetitions {options.repetitions} must be 1 or more, --warm_up {options.warm_up} 0 or more"
        )
    if options.suite != "cpu" and options.only not in ((), ("steps",)):
        raise UserError(f"--only {' '.join(options.only)} belongs to --suite cpu; legal here: steps")
    if not options.policies or not options.ways:
        raise UserError("--policies and --ways must each name one or more")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("diffusers cannot be imported; install this package with its requirements")
    every = {problem.name: problem for problem in (GPU_PROBLEMS if options.suite == "gpu" else CPU_PROBLEMS)}
    unknown = sorted(set(options.problems) - every.keys())
    if unknown:
        raise UserError(
            f"--problems {' '.join(unknown)} unknown; legal for --suite {options.suite}: {', '.join(every)}"
        )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror or error}") from None
    if not os.access(options.output, os.W_OK):
        raise UserError(f"--output {options.output} cannot be written")
    return [every[name] for name in options.problems or every]


if __name__ == "__main__":
    run(main, PROG)
