"""What tools/plan.py prints for a person: the table of layouts, the one to take, and how to start it."""

import shlex
from dataclasses import dataclass

from megawan import cost
from megawan.planning import (
    PROGRAM_BYTES,
    Question,
    Row,
    best_by_layout,
    flags,
    mfu,
    node_host_bytes,
    pick,
    slurm_script,
)
from megawan.sizes import GIB, describe_memory

BEST = 8
"""Layouts that fit, in the short table."""
NEAR = 4
"""Layouts that do not fit, in the short table."""


@dataclass(frozen=True)
class Paths:
    """What the printed commands train on; None: synthetic latents, random weights."""

    data: str | None = None
    init: str | None = None


def report(question: Question, found: list[Row], paths: Paths, everything: bool) -> list[str]:
    """Return the lines."""
    chosen = pick(found)
    fitting = [row for row in found if row.fits]
    if everything:
        shown = found
    else:
        layouts = best_by_layout(found)
        shown = [row for row in layouts if row.fits][:BEST]
        if chosen is not None and chosen not in shown:
            shown = [*shown[: BEST - 1], chosen]
        # Of the others those that would be fastest, or, where none fits, those that need least.
        others = [row for row in layouts if not row.fits and row.zero_stage]
        if not fitting:
            others = sorted(
                (row for row in found if row.zero_stage), key=lambda row: (row.memory.total, row.typical)
            )
        shown += list({row.topology: row for row in reversed(others)}.values())[::-1][:NEAR]
    lines = [*_heading(question), ""]
    lines.append(f"{len(found)} ways are legal, {len(fitting)} fit; {len(shown)} shown" + _hint(everything))
    lines += _table(question, shown, chosen)
    if chosen is None:
        return [*lines, "", f"none fits: {_least(question, found)}"]
    return [*lines, "", *_picked(question, chosen), "", *_commands(question, chosen, paths)]


def _hint(everything: bool) -> str:
    return "" if everything else ", the best of each layout (--all: everything, --json: for machines)"


def _heading(question: Question) -> list[str]:
    gpu, shape = question.gpu, question.shape
    nodes = -(-question.gpus // question.gpus_per_node)
    name = question.pair or question.variant.name
    experts = ", each of two experts" if question.pair else ""
    half = f", {question.world_size} for each expert" if question.pair else ""
    place = f"{nodes} node{'s' if nodes > 1 else ''}"
    return [
        f"{name}: {cost.parameters(shape):,} parameters{experts}; {question.frames} x {question.height} x"
        f" {question.width} = {question.tokens:,} tokens a video",
        f"on {question.gpus} x {gpu.name} ({place}{half}): {question.gpu_memory_gib:g} GiB each, of which"
        f" {question.budget_gib:g} are planned for; {gpu.peak_flops / 1e12:,.0f} TFLOP/s, links"
        f" {gpu.intra_link / 1e9:,.4g} GB/s in a node's domain of {gpu.domain}, {gpu.inter_link / 1e9:,.3g}"
        " GB/s between",
        f"a video takes {cost.train_flops(shape, question.tokens) / 1e15:.3g} PFLOP, recompute not counted",
    ]


def _table(question: Question, shown: list[Row], chosen: Row | None) -> list[str]:
    """Return the rows in columns: GiB of a GPU, GB that it sends in a step."""
    header = (
        *("dp", "ring", "ulysses", "ZeRO", "recompute", "offload"),
        *("states", "gather", "activ", "bucket", "GPU GiB", "node GiB", "GB intra", "inter"),
        *("batch", "s/step", "MFU %", "max", ""),
    )
    cells = [header]
    for row in shown:
        memory = row.memory
        away = {"states": row.offload_optimizer, "activ": row.offload_activations}
        parts = (
            memory.states,
            memory.gathered,
            memory.kept + memory.working,
            memory.buckets,
            memory.total,
        )
        low, high = (100 * mfu(question, row, seconds.total) for seconds in (row.slow, row.fast))
        time = (
            f"{row.fast.total:.3g}-{row.slow.total:.3g}",
            f"{low:.0f}-{high:.0f}",
            f"{100 * row.mfu_ceiling:.0f}",
        )
        cells.append(
            (
                str(row.topology.dp_size),
                str(row.topology.ring_degree),
                str(row.topology.ulysses_degree),
                str(row.zero_stage),
                row.recompute,
                "+".join(name for name, on in away.items() if on) or "-",
                *(f"{part / GIB:,.1f}" for part in parts),
                f"{node_host_bytes(question, row.host) / GIB:,.0f}",
                f"{row.wire.intra / 1e9:,.1f}",
                f"{row.wire.inter / 1e9:,.1f}",
                str(row.global_batch),
                *(time if row.zero_stage else "???"),
                "<- picked" if row is chosen else row.why_not,
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(header) - 1)]
    left = {4, 5}
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, (*widths, 0), strict=True))
        ).rstrip()
        for line in cells
    ]


def _least(question: Question, found: list[Row]) -> str:
    """Return what the layout that needs least would need, and what else to try."""
    least = min(found, key=lambda row: (row.zero_stage == 0, row.memory.total))
    if least.memory.total <= question.budget_gib * GIB:
        return f"{least.why_not}; change --global_batch, --micro_batch or the host's memory"
    return (
        f"the least is {least.memory.total / GIB:.3g} GiB a GPU, with Ulysses"
        f" {least.topology.ulysses_degree}, ring {least.topology.ring_degree}, ZeRO {least.zero_stage},"
        f" recompute {least.recompute}, and {question.budget_gib:g} may be planned for; more GPUs, a smaller"
        " clip or larger GPUs"
    )


def _picked(question: Question, row: Row) -> list[str]:
    """Return what the picked row costs, part by part."""
    repeated = row.recompute_flops / row.model_flops
    seconds = zip(vars(row.fast).items(), vars(row.slow).values(), strict=True)
    parts = ", ".join(f"{name} {low:.2g}-{high:.2g}" for (name, low), high in seconds if high > 5e-4)
    wire = ", ".join(
        f"{name.replace('_', ' ')} {sent / 1e9:.3g}" for name, sent in vars(row.wire).items() if sent
    )
    host, ranks = row.host, question.ranks_per_node
    memory = describe_memory(row.memory).replace(" GiB a rank", "")
    return [
        f"picked: dp {row.topology.dp_size} x ring {row.topology.ring_degree} x ulysses"
        f" {row.topology.ulysses_degree}, {row.deepspeed}, recompute {row.recompute}; global batch"
        f" {row.global_batch} = micro_batch {row.micro_batch} x accumulation {row.accumulation} x dp"
        f" {row.topology.dp_size}" + (", of each expert" if question.pair else ""),
        f"  GiB of a GPU: {memory}",
        f"  FLOPs of a step: {row.model_flops / 1e15:,.3g} P, and {repeated:.1%} of that again for recompute",
        f"  GB that a GPU sends in a step: {wire or 'none'}",
        f"  seconds of a step, fast to slow: {parts}",
        f"  host memory of a node: {node_host_bytes(question, host) / GIB:,.0f} GiB = {ranks} x (offloaded"
        f" states {host.states / GIB:.3g} + activations {host.activations / GIB:.3g} + a checkpoint being"
        f" written {host.saving / GIB:.3g} + program {PROGRAM_BYTES / GIB:g})",
        f"  MFU at most {row.mfu_ceiling:.0%}: kernels at their best published share of the peak, and nothing"
        " else takes time",
    ]


def _commands(question: Question, row: Row, paths: Paths) -> list[str]:
    """Return the commands that run a row."""
    nodes = -(-question.gpus // question.gpus_per_node)
    experts = ["high", "low"] if question.pair else [None]
    given = ["--data.path", paths.data] if paths.data else []
    lines = ["check it anywhere:"]
    for expert in experts:
        words = shlex.join([*flags(question, row, expert), *given, *_start(paths, expert)])
        lines.append(f"  WORLD_SIZE={question.world_size} python -m megawan.train --dry-run {words}")
    lines.append(f"run it on {'these machines' if nodes > 1 else 'this machine'}:")
    for expert in experts:
        words = shlex.join([*flags(question, row, expert), *given, *_start(paths, expert)])
        if question.world_size > question.gpus_per_node:
            hosts = f"{expert or 'hosts'}.txt"
            lines.append(f"  HOSTFILE={hosts} bash launchers/train_multinode.sh {words}")
        else:
            lines.append(f"  NUM_GPUS={question.world_size} bash launchers/train.sh {words}")
    data = shlex.quote(paths.data or "synthetic")
    init = shlex.quote(paths.init or "random")
    task = f"MEGAWAN_TASK={question.pair[:3]} " if question.pair else ""
    ranks = min(question.gpus, question.gpus_per_node)
    lines += [
        "run it under Slurm (these options win over the script's #SBATCH lines):",
        f"  {task}MEGAWAN_DATA={data} MEGAWAN_INIT={init} sbatch --nodes={nodes} --gpus-per-node={ranks}"
        f" {slurm_script(question)} {shlex.join(flags(question, row))}",
    ]
    if not (paths.data and paths.init):
        lines.append(
            "this trains random weights on synthetic latents: --data STORE --init WEIGHTS put yours in"
        )
    return lines


def _start(paths: Paths, expert: str | None) -> list[str]:
    if paths.init is None:
        return []
    return ["--model.init_from", f"{paths.init.rstrip('/')}/{expert}_noise_model" if expert else paths.init]
