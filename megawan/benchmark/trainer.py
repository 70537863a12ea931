"""What train.py costs beside its model: the loop around it, and the time until its first step."""

import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megawan.benchmark.report import Table
from megawan.benchmark.timing import Spread, paired_ratio

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "megawan/train.py"
# train.py ends its process itself; this calls its main() under a profiler and ends as usual.
PROFILED = """
import cProfile, runpy, sys
main = runpy.run_path(sys.argv[1], run_name="profiled_train")["main"]
profile = cProfile.Profile()
profile.runcall(main, sys.argv[3:])
profile.dump_stats(sys.argv[2])
import os; os._exit(0)
"""
# Importing what every DeepSpeed trainer imports, and its initialize() on one linear layer.
BARE = """
import os, torch, deepspeed
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys_port, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
model = torch.nn.Linear(8, 8)
deepspeed.initialize(model=model, config={"train_batch_size": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}})
print("step 1/", flush=True); os._exit(0)
"""
PARTS = {
    # (file, function): what it is called in the table
    ("loop", "train.py"): "whole loop",
    ("step", "trainer.py"): "trainer.step",
    ("ask", "agreement.py"): "agreement",
    ("sample", "loss.py"): "noise, levels, target",
    ("flow_loss", "loss.py"): "loss",
    ("read", "metrics.py"): "meters",
    ("start", "saving.py"): "save: copy",
    ("finish", "saving.py"): "save: wait",
    ("step", "metrics.py"): "log",
    ("describe_samples", "agreement.py"): "names of samples",
}


def loop(flags: Sequence[str], steps: int) -> Table:
    """Return how much of the loop's time is not trainer.step's (model and optimizer) nor the save at the end.

    By Python's profiler, which makes Python itself slower: an upper bound. Raises RuntimeError if the run
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="megawan-benchmark-") as name:
        stats_file = Path(name) / "stats"
        command = [sys.executable, "-c", PROFILED, str(TRAIN), str(stats_file), f"--steps={steps}"]
        done = subprocess.run(
            [*command, *flags, f"--output={name}/run"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not stats_file.exists():
            raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-600:]}")
        raw: Any = pstats.Stats(str(stats_file)).stats  # type: ignore[attr-defined]
    seconds = dict.fromkeys(PARTS.values(), 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in raw.items():
        part = PARTS.get((function, Path(file).name))
        if part is not None and "megawan" in file:
            seconds[part] += cumulative
    around = seconds["whole loop"] - seconds["trainer.step"] - seconds["save: copy"] - seconds["save: wait"]
    step = seconds["trainer.step"] / steps
    table = Table(
        "Training loop outside model and optimizer",
        note=f"`train.py {' '.join(flags)}`, {steps} steps, under Python's profiler (an upper bound).",
    )
    table.rows.append(
        {
            "trainer.step, ms": 1e3 * step,
            "loop around it, ms a step": 1e3 * around / steps,
            "share": f"{around / seconds['trainer.step']:.2%}",
            "of which": ", ".join(
                f"{name} {1e3 * seconds[name] / steps:.2f}"
                for name in ("agreement", "meters", "log", "names of samples")
            ),
            "inside the step: noise and loss, ms": 1e3
            * (seconds["noise, levels, target"] + seconds["loss"])
            / steps,
        }
    )
    table.details.append(seconds)
    return table


def first_step(flags: Sequence[str], port: Callable[[], int], repetitions: int) -> Table:
    """Return the time until train.py prints its first step, against importing torch and deepspeed and
    initialize() of one layer; in turn, after one of each."""
    ours, bare = list[float](), list[float]()
    for number in range(repetitions + 1):
        with tempfile.TemporaryDirectory(prefix="megawan-benchmark-") as name:
            script = BARE.replace("sys_port", repr(str(port())))
            bare_s = until_first_step([sys.executable, "-c", script], name)
            command = [sys.executable, str(TRAIN), "--steps=1", *flags, f"--output={name}/run"]
            ours_s = until_first_step(command, name)
        if number:
            ours.append(ours_s)
            bare.append(bare_s)
    ratio = paired_ratio(ours, bare)
    table = Table("Time to first step, from a cold process", note=f"Median of {repetitions}.")
    table.rows.append(
        {
            "train.py, s": Spread.of(ours).median,
            "import torch, deepspeed; initialize, s": Spread.of(bare).median,
            "ratio": f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        }
    )
    table.details.append({"ours": ours, "bare": bare})
    return table


def until_first_step(command: Sequence[str], folder: str) -> float:
    """Return the seconds until `command` prints "step 1/". Raises RuntimeError if it never does."""
    began = time.perf_counter()
    with open(f"{folder}/err", "w+") as errors:
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
        )
        seconds = None
        assert process.stdout is not None
        for line in process.stdout:
            if seconds is None and "step 1/" in line:
                seconds = time.perf_counter() - began
        process.wait()
        errors.seek(0)
        if seconds is None:
            raise RuntimeError(
                f"no first step; the process ended with {process.returncode}: {errors.read()[-600:]}"
            )
    return seconds


def environment() -> dict[str, str]:
    """Return the environment of a run on this machine's CPUs or first GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
