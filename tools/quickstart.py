"""The whole job on toy videos, each step the command a person would type: data, latents, training, export,
samples.

    bash launchers/quickstart.sh      # sets up first; this is what it runs
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository root instead of tools/

import torch

from megawan.cli import UserError, parse, run

PROG = "tools/quickstart.py"
MARK = "quickstart.json"
GLOBAL_BATCH = 16
HELD_OUT = 24


@dataclass(frozen=True)
class Options:
    """Where the quickstart works, and how long it trains."""

    output: Path = ROOT / "runs/quickstart"
    """Folder for everything it makes; an earlier quickstart there is replaced."""
    steps: int = 1000
    """Optimizer steps."""
    captions: int = 12
    """Captions that are sampled and measured."""


def main(argv: Sequence[str]) -> None:
    """Run every step; raises UserError naming the step that failed."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    output = options.output.resolve()
    ranks, ulysses = layout()
    if " " in sys.prefix and not torch.cuda.is_available():
        raise UserError(
            f"{sys.prefix} has a space in its path; on CPUs DeepSpeed builds an extension whose linker"
            " command cannot hold one: move the checkout"
        )
    clear(output)
    size = ["--num_frames", "9", "--height", "64", "--width", "64", "--fps", "16"]
    dataset, store, run_folder = output / "dataset", output / "latents", output / "run"
    held_out, held_out_store = output / "held_out", output / "held_out_latents"
    exported, samples = output / "exported", output / "samples"
    started = time.monotonic()
    step("1. render toy clips", tool("make_toy_dataset", "--output", dataset))
    step(
        "   and others that are not trained on",
        tool("make_toy_dataset", "--output", held_out, "--clips", HELD_OUT, "--seed", 1),
    )
    for title, clips, latents in (
        ("2. encode them to latents", dataset, store),
        ("   and the others", held_out, held_out_store),
    ):
        step(
            title,
            tool(
                *("encode_dataset", "--input", clips, "--output", latents),
                *("--codec", "dct", "--text_encoder", "debug", *size),
            ),
        )
    step(
        f"3. train the debug Wan on {ranks} rank{'s' if ranks > 1 else ''}",
        [
            *deepspeed(ranks),
            ROOT / "megawan/train.py",
            *("--deepspeed", ROOT / "ds_configs/zero3.json"),
            *("--model.variant", "debug", "--data.path", store, "--output", run_folder),
            *("--parallel.ulysses_degree", ulysses, "--micro_batch", GLOBAL_BATCH * ulysses // ranks),
            *("--model.recompute", "full", "--steps", options.steps, "--data.prompt_dropout", "0.1"),
            *("--optim.learning_rate", "3e-3", "--optim.beta2", "0.99"),
            *("--optim.schedule", "cosine", "--optim.warmup_steps", "20"),
            *("--metrics.log_every", "25", "--validation.path", held_out_store, "--validation.every", "250"),
        ],
    )
    step(
        "4. export to native Wan keys", tool("export_checkpoint", "--input", run_folder, "--output", exported)
    )
    step(
        "5. sample from captions",
        tool(
            *("sample", "--weights", exported, "--output", samples, "--dataset", dataset, "--untrained", 0),
            *("--captions", options.captions, "--codec", "dct", "--text_encoder", "debug", *size),
            *("--steps", 20, "--guidance", 3),
        ),
    )
    passed = step("6. measure the samples", tool("check_toy_samples", "--input", samples), fail=False)
    print(
        f"\nquickstart: {'done' if passed else 'the samples do not show enough of their captions'}"
        f" in {time.monotonic() - started:.0f} s\n"
        f"  clips       {dataset}\n  latents     {store}\n  checkpoint  {run_folder / 'checkpoints'}\n"
        f"  weights     {exported}\n  samples     {samples}\n"
        f"  picture     {samples / 'contact_sheet.png'}  (real | untrained | trained)\n"
        f"  curves      {shlex.join([bin_path('tensorboard'), '--logdir', str(run_folder / 'tensorboard')])}"
    )
    if not passed:
        sys.exit(1)


def clear(output: Path) -> None:
    """Empty the folder of an earlier quickstart. Raises UserError rather than touch anything else."""
    if output.exists() and not (output / MARK).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an earlier quickstart; give a new folder")
    try:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        (output / MARK).write_text(json.dumps({"made_by": PROG}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: {error}") from None


def layout() -> tuple[int, int]:
    """Return (ranks, Ulysses degree): two gloo ranks without GPUs, else a power of two of the GPUs, at most
    8."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = 2 if gpus == 0 else max(count for count in (1, 2, 4, 8) if count <= gpus)
    return ranks, min(ranks, 2)


def tool(name: str, *arguments: object) -> list[object]:
    """Return the command of one of our tools."""
    return [sys.executable, ROOT / f"tools/{name}.py", *arguments]


def deepspeed(ranks: int) -> list[object]:
    """Return DeepSpeed's launcher, as a module: bin/deepspeed breaks in a checkout whose path has a space."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", ranks]


def bin_path(name: str) -> str:
    """Return a command of this interpreter's environment, by name where it is on PATH."""
    return name if shutil.which(name) else str(Path(sys.executable).parent / name)


def step(title: str, command: Sequence[object], *, fail: bool = True) -> bool:
    """Run one command, shown as a person would type it; return whether it succeeded."""
    words = [str(word) for word in command]
    shown = [word.replace(f"{ROOT}{os.sep}", "") for word in words]
    if shown[1:3] == ["-m", "deepspeed.launcher.runner"]:
        shown[:3] = ["deepspeed"]
    elif shown[0] == sys.executable:
        shown[0] = "python"
    print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
    began = time.monotonic()
    # The environment's own bin first: DeepSpeed compiles its extension with the ninja that lies there.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    done = subprocess.run(words, env=environment, check=False)
    if done.returncode and fail:
        raise UserError(f"step {title!r} failed with exit code {done.returncode}; its own message is above")
    print(f"   ({time.monotonic() - began:.0f} s)", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    run(main, PROG)
