"""What train.py costs beside its model: the loop around it, and the time until its first step."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megawan.benchmark.report import Table
from megawan.benchmark.timing import Spread, paired_ratio

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "megawan/train.py"
TIME_LIMIT = 600.0
"""Seconds for a process to begin its training; the first on a machine builds DeepSpeed's extension."""
FIRST_STEPS = 3
"""Steps that build what later ones find."""
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
WORK = ("forward", "backward", "optimizer")
AROUND = ("data", "agreement")


def loop(flags: Sequence[str], steps: int) -> Table:
    """Return how much of a step is neither the model's (noise and loss with it) nor the optimizer's, from the
    curves of a run that logs every step. Raises RuntimeError if the run fails or hangs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # not for --help

    with tempfile.TemporaryDirectory(prefix="megawan-benchmark-") as name:
        try:
            done = subprocess.run(
                [sys.executable, str(TRAIN), f"--steps={FIRST_STEPS + steps}", "--metrics.log_every=1"]
                + [*flags, f"--output={name}/run"],
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=TIME_LIMIT + 60 * steps,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"train.py did not end within {error.timeout:g} s") from None
        if done.returncode:
            raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-600:]}")
        curves = EventAccumulator(f"{name}/run/tensorboard", size_guidance={"scalars": 0}).Reload()
        seconds = {
            part: [point.value for point in curves.Scalars(f"perf/{part}")][FIRST_STEPS:]
            for part in ("step_time", *(f"time_{part}" for part in WORK + AROUND))
        }
    of_work = zip(*(seconds[f"time_{part}"] for part in WORK), strict=True)
    seconds["around"] = [step - sum(work) for step, work in zip(seconds["step_time"], of_work, strict=True)]
    medians = {part: 1e3 * Spread.of(values).median for part, values in seconds.items()}
    share = paired_ratio(seconds["around"], seconds["step_time"])
    table = Table(
        "Training loop outside model and optimizer",
        note=f"`train.py {' '.join(flags)}`, logging every step; medians of {steps} steps.",
    )
    table.rows.append(
        {
            "step, ms": medians["step_time"],
            "loop around model and optimizer, ms": medians["around"],
            "share": f"{share.median:.2%} ({share.low:.2%} to {share.high:.2%})",
            "of which": ", ".join(f"{part} {medians[f'time_{part}']:.2f}" for part in AROUND)
            + ", the rest log and meters",
        }
    )
    table.details.append(seconds)
    return table


def first_step(flags: Sequence[str], port: Callable[[], int], repetitions: int) -> Table:
    """Return the time until train.py prints its first step, against importing torch and deepspeed and
    initialize() of one layer; in turn, after one of each. Raises RuntimeError where one fails or hangs."""
    from megawan.engine import extension_folder  # imports DeepSpeed

    ours, bare = list[float](), list[float]()
    for number in range(repetitions + 1):
        with tempfile.TemporaryDirectory(prefix="megawan-benchmark-") as name:
            command = [sys.executable, str(TRAIN), "--steps=1", *flags, f"--output={name}/run"]
            ours_s = until_first_step(command, name)
            # In a folder of its own DeepSpeed would build its extension again, or wait for another's lock.
            script = BARE.replace("sys_port", repr(str(port())))
            folder = {"TORCH_EXTENSIONS_DIR": str(extension_folder())}
            bare_s = until_first_step([sys.executable, "-c", script], name, folder)
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


def until_first_step(command: Sequence[str], folder: str, more: dict[str, str] | None = None) -> float:
    """Return the seconds until `command` prints "step 1/"; more: variables for its environment.

    Raises RuntimeError if it never does, or not within TIME_LIMIT.
    """
    began = time.perf_counter()
    with open(f"{folder}/err", "w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment() | (more or {}),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
        )
        limit = threading.Timer(TIME_LIMIT, process.kill)
        limit.daemon = True  # an interrupted benchmark does not wait for it
        limit.start()
        seconds = None
        assert process.stdout is not None
        for line in process.stdout:
            if seconds is None and "step 1/" in line:
                seconds = time.perf_counter() - began
        process.wait()
        limit.cancel()
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
