"""Write a training checkpoint as weights that Wan's own code, diffusers, DiffSynth and ComfyUI open.

python tools/export_checkpoint.py --input runs/my14b --output my14b --layout native
python tools/export_checkpoint.py --input runs/wan-a14b --output a14b --layout diffusers
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan import checkpoint
from megawan.cli import UserError, parse, run
from megawan.models.layouts import write_weights, written_bytes
from megawan.models.variants import Variant, get_variant
from megawan.sampling import find_step_folder

PROG = "tools/export_checkpoint.py"


@dataclass(frozen=True)
class Options:
    """What to export, and how."""

    input: Path
    """Run folder (its newest checkpoint is taken), one step folder, or the folder of an A14B job: the runs of
    both experts, high and low, become one model."""
    output: Path
    """New folder for the weights, config.json and model card."""
    layout: Literal["native", "diffusers", "comfyui"] = "native"
    """native also opens in DiffSynth and ComfyUI; diffusers is a transformer/ folder; comfyui prefixes the
    keys."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Numbers on disk; float32 keeps the masters exactly."""
    weights: Literal["master", "ema"] = "master"
    """The trained weights, or their moving average of a run with --ema.decay."""
    low_noise: Path | None = None
    """The low-noise expert's run, when --input is the high-noise expert of an A14B and lies elsewhere."""


def main(argv: Sequence[str]) -> None:
    """Export as `argv` says. Raises UserError naming file and cause; nothing is left half-written."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        high_run, low_run = experts(options.input, options.low_noise)
        saved = open_verified(high_run, options.weights)
        low = None if low_run is None else open_verified(low_run, options.weights)
        variant = get_variant(saved.manifest["variant"])
        wan = variant.config
        if low is not None:
            require_pair(variant, get_variant(low.manifest["variant"]), low.folder)
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        total = written_bytes(saved, dtype) + (written_bytes(low, dtype) if low is not None else 0)
        with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
            files = write_weights(
                saved,
                wan,
                options.output,
                options.layout,
                dtype,
                metadata(saved, argv),
                low_noise=low,
                tick=bar.update,
            )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    size = sum(file.stat().st_size for file in files)
    sources = [f"step {one.step} of {one.folder.parent.parent}" for one in (saved, low) if one is not None]
    print(
        f"exported {' and '.join(sources)} as {options.layout} {options.dtype}:"
        f" {len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB in {options.output}"
    )


def experts(given: Path, low_noise: Path | None) -> tuple[Path, Path | None]:
    """Return the runs to export: one, or the high- and the low-noise expert's. Raises ValueError when both
    are named twice."""
    inside = given / "high", given / "low"
    if find_step_folder(given) is not None or not any(run.is_dir() for run in inside):
        return given, low_noise
    if low_noise is not None:
        raise ValueError(f"--input {given} holds both experts, high and low; leave --low_noise out")
    return inside


def require_pair(high: Variant, low: Variant, folder: Path) -> None:
    """Raise ValueError unless the two are the high- and the low-noise expert of one A14B."""
    if high.expert != "high":
        raise ValueError(
            f"--low_noise {folder}: --input is {high.name}; only a high-noise expert of an A14B has a partner"
        )
    partner = high.name.removesuffix("high") + "low"
    if low.name != partner:
        raise ValueError(f"--low_noise {folder}: is {low.name}; the partner of {high.name} is {partner}")


def open_verified(path: Path, weights: checkpoint.Weights) -> checkpoint.StepWeights:
    """Return the checkpoint at `path` after checking its hashes. Raises ValueError or FileNotFoundError."""
    folder = find_step_folder(path)
    if folder is None:
        raise FileNotFoundError(
            f"{path}: no training checkpoint (a run folder, or a step folder with manifest.json)"
        )
    checkpoint.verify(folder)
    return checkpoint.StepWeights(folder, weights)


def metadata(saved: checkpoint.StepWeights, argv: Sequence[str]) -> dict[str, str]:
    """Return what the files' headers and the model card say about where the weights come from."""
    manifest = saved.manifest
    try:
        config = manifest["config"]
        base = config["model"]["init_from"] or f"random weights, seed {config['seed']}"
        variant, data = manifest["variant"], manifest["data"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{saved.folder}/manifest.json does not say what was trained: no {error}") from None
    return {
        "variant": str(variant),
        "base": str(base),
        "step": str(saved.step),
        "data": str(data),
        "command": shlex.join([PROG, *argv]),
        "commit": git_commit(),
    }


def git_commit() -> str:
    """Return the commit of this checkout, or "unknown" outside one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    run(main, PROG)
