"""Know before you queue: every legal layout of a training, its memory, bytes and time, and how to run it.

    python tools/plan.py --variant t2v-14B --frames 81 --height 480 --width 832 --gpus 8 --gpu-memory 80

Answers on any machine, without a GPU and without torch. docs/planning.md says how to read it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from megawan import cli, planning
from megawan.hardware import find_gpu, read_gpus
from megawan.planning_report import Paths, report

PROG = "tools/plan.py"


@dataclass(frozen=True)
class PlanOptions:
    """What is to be trained, on what."""

    variant: str
    """Which Wan: a name of megawan/models/variants.py, or t2v-A14B, i2v-A14B for both experts in one job."""
    frames: int
    """Frames of a clip (4n+1)."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    gpus: int = 8
    """GPUs of the whole job; more than a node has in whole nodes."""
    gpu: str = "h100"
    """a100-40, a100-80, h100, h200, b200, gb200, rtx4090, rtx5090, mi300x, or one of --hardware."""
    gpu_memory: float | None = None
    """GiB of a GPU (default: as the GPU has); nine tenths are planned for."""
    gpus_per_node: int | None = None
    """Default: as the GPU is usually built in (8; gb200: 4)."""
    host_memory: float | None = None
    """GiB of a node's own memory; default: not limited."""
    global_batch: int | None = None
    """Videos of an optimizer step; layouts that cannot make it are marked. Default: one micro-batch a
    group."""
    micro_batch: int = 1
    """Videos that a group holds at a time."""
    hardware: Path | None = None
    """JSON file of more GPUs; docs/planning.md has an example."""
    data: str | None = None
    """Latent store for the printed commands (default: synthetic latents)."""
    init: str | None = None
    """Weights for the printed commands (default: random)."""
    all: bool = False
    """Print every legal way instead of the best of each layout."""
    json: bool = False
    """Print everything as JSON, for machines."""
    check: bool = False
    """Train a few steps of this clip on the GPU of this machine and compare its memory with the plan's."""
    recompute: str | None = None
    """With --check: this policy instead of the one that the plan picks."""


def main(argv: Sequence[str]) -> None:
    """Print the plan that `argv` asks for. Raises cli.UserError for what is not legal."""
    options = cli.parse(PlanOptions, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    if options.recompute is not None and not options.check:
        raise cli.UserError("--recompute is for --check; a plan lists every policy")
    try:
        if options.check:
            from megawan.memory_check import check  # torch, and later DeepSpeed

            for line in check(
                options.variant, options.frames, options.height, options.width, options.recompute
            ):
                print(line, flush=True)
            return
        question = planning.ask(
            options.variant,
            options.frames,
            options.height,
            options.width,
            options.gpus,
            find_gpu(options.gpu, read_gpus(options.hardware) if options.hardware else {}),
            gpu_memory_gib=options.gpu_memory,
            gpus_per_node=options.gpus_per_node,
            host_memory_gib=options.host_memory,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
        )
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    found = planning.rows(question)
    if options.json:
        print(planning.as_json(question, found))
    else:
        print("\n".join(report(question, found, Paths(options.data, options.init), options.all)))


if __name__ == "__main__":
    cli.run(main, PROG)
