"""Our training step beside others', at the same sizes, weights, dtype and recompute policy."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from megawan import cost
from megawan.benchmark import arms as build_arms
from megawan.benchmark.arms import OURS, Arm, Kind
from megawan.benchmark.flops import counted_flops
from megawan.benchmark.memory import peak_bytes, saved_bytes
from megawan.benchmark.problem import Problem, make_inputs
from megawan.benchmark.profiling import SelfTimes, fastest_self_times, rounds_of_self_times
from megawan.benchmark.report import Table
from megawan.benchmark.timing import Spread, interleaved, paired_ratio
from megawan.benchmark.traffic import compiled_bytes, moved_bytes
from megawan.hardware import peak_flops
from megawan.models.initial import initialise_
from megawan.models.wan import WanModel


def kinds(policies: Sequence[str], peers: Sequence[str], ways: Sequence[bool]) -> list[Kind]:
    """Return what to measure: ours with each policy, each peer with those of them that it has; each eager or
    compiled as `ways` says."""
    found = [Kind(OURS, policy, compiled) for compiled in ways for policy in policies]
    # With recompute, a peer has one policy to stand against all of ours.
    theirs = (["none"] if "none" in policies else []) + (["full"] if set(policies) - {"none"} else [])
    return found + [Kind(peer, policy, compiled) for compiled in ways for peer in peers for policy in theirs]


def measure(
    problem: Problem,
    dtype: torch.dtype,
    wanted: Sequence[Kind],
    *,
    device: torch.device,
    repetitions: int,
    warm_up: int,
    optimizer: bool,
    profiled: bool,
    tick: Callable[[], None],
    timed: Callable[[Table], object],
) -> Table:
    """Return the table of one problem in one dtype; `timed` is called with it when only memory, FLOPs and
    self times are missing."""
    source = source_model(problem, device, dtype)
    inputs = make_inputs(problem, device, dtype)
    what = "forward, loss, backward" + (", AdamW" if optimizer else "")
    short = str(dtype).removeprefix("torch.")
    table = Table(
        f"Step, {problem.name}, {short}", note=f"{problem.describe()}; {what}; median of {repetitions}."
    )
    arms = []
    for kind in wanted:
        arm = build_arms.build(kind, source, problem, inputs, optimizer)
        if _fits(arm):
            arms.append(arm)
        else:
            table.rows.append({"step": kind.label, "s": "out of memory"})
    seconds = interleaved(
        {arm.kind.label: arm.step for arm in arms},
        repetitions=repetitions,
        warm_up=warm_up,
        device=device,
        tick=tick,
    )
    for arm in arms:
        table.rows.append(_timed(arm, arms, seconds, problem, device))
    table.details.append({"seconds": seconds, "model_flops": problem.flops})
    if profiled:
        timed(table)
        rows = {row["step"]: row for row in table.rows}
        times = fastest_self_times({arm.kind.label: arm.step for arm in arms}, device)
        one, two = (_with_blocks(blocks, problem, dtype, device) for blocks in (1, 2))
        for arm in arms:
            outside_blocks = _bytes_outside_blocks(arm.kind, one, two)
            rows[arm.kind.label] |= _examined(
                arm, times[arm.kind.label], outside_blocks, problem, dtype, device
            )
        plain = [arm.kind for arm in arms if arm.kind.policy == "none"]
        for label, outside in _block_times_outside_products(plain, one, two, device).items():
            rows[label]["of it a block"] = outside
        for kind in plain:  # last, since it compiles anew
            moved = compiled_bytes(one(kind).step) if kind.compiled else _moved_by_a_block(kind, one, two)
            rows[kind.label]["vectors a block moves"] = moved / problem.vector(dtype)
    return table


def source_model(problem: Problem, device: torch.device, dtype: torch.dtype) -> WanModel:
    """Return the model whose weights every arm shares; the head is not 0 as it would be at first, or no
    gradient would pass it."""
    with torch.device("meta"):
        model = WanModel(problem.config).to(dtype)
    model.to_empty(device=device)
    initialise_(model, seed=0)
    with torch.no_grad():
        model.head.head.weight.fill_(0.01)
        model.head.head.weight[:, ::2] *= -1
    return model


def _timed(
    arm: Arm, arms: Sequence[Arm], seconds: dict[str, list[float]], problem: Problem, device: torch.device
) -> dict[str, Any]:
    own = seconds[arm.kind.label]
    spread = Spread.of(own)
    row: dict[str, Any] = {
        "step": arm.kind.label,
        "s": spread.median,
        "quartiles": f"{spread.low:.3f} to {spread.high:.3f}",
    }
    for compiled in (False, True):
        title = f"/ better {'compiled' if compiled else 'eager'} peer"
        rivals = [
            other.kind.label
            for other in arms
            if other.kind.framework != OURS
            and other.kind.compiled == compiled
            and (other.kind.policy == "none") == (arm.kind.policy == "none")
        ]
        if arm.kind.framework == OURS and rivals:
            best = min(rivals, key=lambda name: Spread.of(seconds[name]).median)
            ratio = paired_ratio(own, seconds[best])
            row[title] = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}; {best.split()[0]})"
    row["TFLOP/s"] = problem.flops / spread.median / 1e12
    if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device))):
        row["MFU"] = f"{cost.mfu(problem.flops, spread.median, 1, peak):.1%}"
    return row


def _fits(arm: Arm) -> bool:
    """Return whether a step of the arm fits the GPU's memory (on CPUs nothing says so)."""
    if not torch.cuda.is_available():
        return True
    try:
        arm.step()
    except torch.OutOfMemoryError:
        arm.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return False
    return True


def _with_blocks(
    blocks: int, problem: Problem, dtype: torch.dtype, device: torch.device
) -> Callable[[Kind], Arm]:
    """Return what builds an arm of the problem with that many blocks; they share weights and inputs."""
    cut = replace(problem, config=replace(problem.config, num_layers=blocks))
    inputs, source = make_inputs(cut, device, dtype), source_model(cut, device, dtype)
    return lambda kind: build_arms.build(kind, source, cut, inputs, optimizer=False)


def _bytes_outside_blocks(kind: Kind, one: Callable[[Kind], Arm], two: Callable[[Kind], Arm]) -> int:
    """Return what embeddings and head keep, from models of one and of two blocks; the same for compiled
    blocks as for eager ones, which build at once."""
    twins = [build(replace(kind, compiled=False)) for build in (one, two)]
    of_one, of_two = (saved_bytes(twin.model, twin.loss) for twin in twins)
    return 2 * of_one - of_two


def _moved_by_a_block(kind: Kind, one: Callable[[Kind], Arm], two: Callable[[Kind], Arm]) -> int:
    """Return what a second block adds to the bytes that a step moves outside products."""
    return moved_bytes(two(kind).step) - moved_bytes(one(kind).step)


def _block_times_outside_products(
    wanted: Sequence[Kind],
    one: Callable[[Kind], Arm],
    two: Callable[[Kind], Arm],
    device: torch.device,
    repetitions: int = 9,
) -> dict[str, float]:
    """Return each kind's self seconds outside products that a second block adds to a step of one block: the
    median of the differences within a round."""
    steps = dict[str, Callable[[], object]]()
    for blocks, build in enumerate((one, two), start=1):
        for kind in wanted:
            arm = build(kind)
            arm.step()  # compiles
            steps[f"{kind.label}, {blocks}"] = arm.step
    times = rounds_of_self_times(steps, device, repetitions)
    found = dict[str, float]()
    for kind in wanted:
        rounds = zip(times[f"{kind.label}, 1"], times[f"{kind.label}, 2"], strict=True)
        found[kind.label] = statistics.median(second.rest - first.rest for first, second in rounds)
    return found


def _examined(
    arm: Arm,
    times: SelfTimes,
    outside_blocks: int,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Return memory, FLOPs and self times as a row; outside_blocks: bytes that embeddings and head keep."""
    saved = saved_bytes(arm.model, arm.loss)
    of_blocks = saved - outside_blocks
    return {
        "saved MiB": saved / 2**20,
        "vectors a token and block": of_blocks / (problem.vector(dtype) * problem.config.num_layers),
        "peak MiB": peak_bytes(arm.step, device) / 2**20,
        "run GFLOP": "" if arm.kind.compiled else counted_flops(arm.step) / 1e9,
        "moved GiB outside products": "" if arm.kind.compiled else moved_bytes(arm.step) / 2**30,
        "self s of products": times.products,
        "self s outside products": times.rest,
        "most of it": ", ".join(f"{name} {value:.3f}" for name, value in times.longest[:3]),
    }
