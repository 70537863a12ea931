"""Every legal way to train a variant on so many GPUs, with what it costs: memory, bytes, time.

Memory, FLOPs and bytes are exact formulas (cost.py); the time is a model of them, given as a range. Fast:
each kernel at the best published share of the GPU's peak, links near their data sheet, ZeRO and ring hidden
behind computation. Slow: older kernels, nothing fused, links at half, little hidden. The shares were
published for H100; other GPUs are taken to reach the same of their own peaks. Imports no torch, which alone
would take longer than the answer.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megawan import cost, ds_config
from megawan.hardware import GB, Gpu
from megawan.models.variants import VARIANTS, Variant, get_variant
from megawan.parallel.topology import Topology, divisors, legal_ulysses
from megawan.sizes import GIB, RESERVE, clip_tokens, memory_layout, model_shape, require_trainable

PACKAGE = Path(__file__).resolve().parent
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
"""DeepSpeed files of ds_configs/ that are tried."""
PAIRS = ("t2v-A14B", "i2v-A14B")
"""Two experts of one size, trained side by side by one submission, each on half of the GPUs."""
PROGRAM_BYTES = 5 * GIB
"""Host memory of one rank's interpreter, libraries and CUDA context, rounded up."""


@dataclass(frozen=True)
class Rates:
    """What share of the data sheet a step reaches."""

    gemm: float
    attention_forward: float
    attention_backward: float
    memory: float  # of the bandwidth of GPU memory
    passes: float  # how often more than a fused kernel the elementwise operations go over memory
    intra: float
    inter: float
    collective: float  # of all network cards of a node together, for a collective over many nodes
    host: float
    host_memory: float  # bytes a second of a node's memory, for an optimizer on the CPU
    hidden: float  # of ZeRO's traffic that may hide behind computation
    ring_hidden: float
    ring_kernel: float  # of the attention rates, where a ring cuts keys and values into blocks
    overhead: float  # launches, Python, uneven ranks


# H100: matrix products 700 of 989 TFLOP/s; attention 690 forward and 595 backward (flash-attention 3), 375
# and 333 (flash-attention 2), full mask, head width 128, 32k tokens; in rings 0.83 to 0.9 of that. The rest
# of SLOW is a guess on the safe side.
FAST = Rates(0.708, 0.698, 0.602, 0.9, 1.0, 0.8, 0.9, 0.9, 0.8, 200 * GB, 1.0, 1.0, 0.9, 0.0)
SLOW = Rates(0.55, 0.379, 0.337, 0.7, 4.0, 0.55, 0.5, 0.4, 0.4, 40 * GB, 0.7, 0.0, 0.83, 0.1)


@dataclass(frozen=True)
class Question:
    """What is to be trained, on what. `gpus` is the whole submission; a pair of experts halves it."""

    variant: Variant
    frames: int
    height: int
    width: int
    gpus: int
    gpu: Gpu
    gpu_memory_gib: float
    gpus_per_node: int
    host_memory_gib: float | None = None  # of a node
    global_batch: int | None = None
    micro_batch: int = 1
    pair: str | None = None  # t2v-A14B, i2v-A14B: both experts

    @property
    def world_size(self) -> int:
        """Ranks of one training."""
        return self.gpus // 2 if self.pair else self.gpus

    @property
    def budget_gib(self) -> float:
        """GiB of a GPU that may be planned for, as --model.memory_budget_gb takes it."""
        return round(self.gpu_memory_gib * (1 - RESERVE), 3)

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node's host memory."""
        return min(self.world_size, self.gpus_per_node)

    @cached_property
    def shape(self) -> cost.ModelShape:
        """The variant's sizes."""
        return model_shape(self.variant.config)

    @cached_property
    def tokens(self) -> int:
        """Tokens of one video."""
        return clip_tokens(self.variant, self.frames, self.height, self.width)


@dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends in an optimizer step, by purpose and by link (the busiest rank of its
    group)."""

    ulysses_intra: int
    ulysses_inter: int
    ring_intra: int
    ring_inter: int
    zero_intra: int
    zero_inter: int

    @property
    def intra(self) -> int:
        """Over NVLink or what stands for it."""
        return self.ulysses_intra + self.ring_intra + self.zero_intra

    @property
    def inter(self) -> int:
        """Over the network."""
        return self.ulysses_inter + self.ring_inter + self.zero_inter


@dataclass(frozen=True)
class Seconds:
    """One optimizer step at one set of rates, in seconds; ring and ZeRO only as far as they do not hide."""

    products: float  # matrix products and attention, recompute included
    elementwise: float
    ulysses: float
    ring: float
    zero: float
    offload: float
    optimizer: float
    overhead: float

    @property
    def total(self) -> float:
        """The step."""
        return (
            self.products
            + self.elementwise
            + self.ulysses
            + self.ring
            + self.zero
            + self.offload
            + self.optimizer
            + self.overhead
        )


@dataclass(frozen=True)
class Row:
    """One legal layout and what it costs."""

    topology: Topology
    deepspeed: str
    zero_stage: int
    offload_optimizer: bool
    recompute: str
    offload_activations: bool
    micro_batch: int
    accumulation: int
    memory: cost.RankMemory
    host: cost.HostMemory
    model_flops: int  # of a step over all ranks, recompute not counted
    recompute_flops: int
    wire: Wire
    fast: Seconds
    slow: Seconds
    mfu_ceiling: float
    why_not: str  # empty where it fits

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.why_not

    @property
    def global_batch(self) -> int:
        """Videos of an optimizer step."""
        return self.micro_batch * self.accumulation * self.topology.dp_size

    @property
    def typical(self) -> float:
        """Seconds a video that rows are compared by: the geometric mean of the range."""
        return math.sqrt(self.fast.total * self.slow.total) / self.global_batch


def ask(
    name: str,
    frames: int,
    height: int,
    width: int,
    gpus: int,
    gpu: Gpu,
    *,
    gpu_memory_gib: float | None = None,
    gpus_per_node: int | None = None,
    host_memory_gib: float | None = None,
    global_batch: int | None = None,
    micro_batch: int = 1,
) -> Question:
    """Return the question, checked. Raises ValueError naming what was given, what is legal and the nearest
    legal value."""
    pair = next((each for each in PAIRS if each.lower() == name.lower()), None)
    if pair is None and name.lower() not in (each.lower() for each in VARIANTS):
        raise ValueError(f"unknown --variant {name!r}; legal: {', '.join((*VARIANTS, *PAIRS))}")
    variant = get_variant(f"{pair}-high" if pair else name)
    require_trainable(variant)
    for flag, value in (
        ("gpus", gpus),
        ("gpu_memory", gpu_memory_gib),
        ("gpus_per_node", gpus_per_node),
        ("host_memory", host_memory_gib),
        ("global_batch", global_batch),
        ("micro_batch", micro_batch),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value} must be above 0")
    if frames == 1 and variant.task == "flf2v":
        raise ValueError(f"--frames 1: {variant.name} is given the first and the last frame; nearest: 5")
    node = gpus_per_node or gpu.gpus_per_node
    if gpu.domain == gpu.gpus_per_node:
        gpu = replace(gpu, domain=node)
    parts = 2 if pair else 1
    whole = node * parts
    if gpus % parts or (gpus > node or pair) and gpus % whole:
        near = " or ".join(str(n) for n in (gpus // whole * whole, gpus // whole * whole + whole) if n)
        each = "each of the two experts takes whole nodes" if pair else "more than one node takes whole nodes"
        raise ValueError(
            f"--gpus {gpus}: {each} of {node} GPUs (--gpus_per_node); nearest: {near}"
            + (f"; or plan one expert, --variant {pair}-high" if pair else "")
        )
    question = Question(
        variant,
        frames,
        height,
        width,
        gpus,
        gpu,
        gpu.memory_gib if gpu_memory_gib is None else gpu_memory_gib,
        node,
        host_memory_gib,
        global_batch,
        micro_batch,
        pair,
    )
    if question.tokens and global_batch is not None and global_batch % micro_batch:
        below = max(1, global_batch // micro_batch) * micro_batch
        raise ValueError(
            f"--global_batch {global_batch} is no multiple of --micro_batch {micro_batch}; nearest: {below}"
        )
    return question


def rows(question: Question) -> list[Row]:
    """Return every legal layout, what fits before what does not, the fastest first."""
    found = list(_rows(question))
    return sorted(found, key=lambda row: (not row.fits, row.typical, row.memory.total))


def pick(found: list[Row]) -> Row | None:
    """Return the row to run, None if none fits: of those within 2 % of the fastest, which no estimate here
    tells apart, one without offload, without ring, with the most memory to spare."""
    fitting = [row for row in found if row.fits]
    if not fitting:
        return None
    return min(
        (row for row in fitting if row.typical <= 1.02 * fitting[0].typical),
        key=lambda row: (
            row.offload_optimizer or row.offload_activations,
            row.topology.ring_degree > 1,
            row.memory.total,
        ),
    )


def best_by_layout(found: list[Row]) -> list[Row]:
    """Return of each (dp, ring, Ulysses, DeepSpeed file) the first row that fits, else its first row."""
    chosen: dict[tuple[Topology, str], Row] = {}
    for row in found:
        chosen.setdefault((row.topology, row.deepspeed), row)
    return list(chosen.values())


def _rows(question: Question) -> Iterator[Row]:
    world, heads = question.world_size, question.variant.config.num_heads
    files = {name: _zero_section(name) for name in CONFIGS}
    for ulysses in legal_ulysses(world, heads):
        for ring in divisors(world // ulysses):
            topology = Topology(world, ulysses, ring)
            groups = topology.dp_size * question.micro_batch
            asked = question.global_batch
            problem = ""
            if asked is not None and asked % groups:
                problem = f"global batch {asked} is no multiple of dp {topology.dp_size}"
                problem += f" x micro_batch {question.micro_batch}" if question.micro_batch > 1 else ""
            accumulation = 1 if asked is None else max(1, asked // groups)
            traffic = _context_traffic(question, topology)
            for name, zero in files.items():
                for away in (False, True):
                    yield from _policies(question, topology, name, zero, away, accumulation, problem, traffic)


def _zero_section(name: str) -> Mapping[str, Any]:
    file = ds_config.find(f"ds_configs/{name}.json", PACKAGE)
    section: Mapping[str, Any] = ds_config.read(file).get("zero_optimization", {})
    return section


def _policies(
    question: Question,
    topology: Topology,
    name: str,
    zero: Mapping[str, Any],
    away: bool,
    accumulation: int,
    problem: str,
    traffic: "_Traffic",
) -> Iterator[Row]:
    """Yield a layout's rows: each policy for all blocks, and the mixture that fits with the least
    recompute."""
    layout = memory_layout(
        zero,
        "bf16" if zero.get("stage", 0) else "fp32",
        topology.world_size,
        topology.ulysses_degree,
        topology.ring_degree,
        question.micro_batch,
        away,
    )
    budget, layers = int(question.budget_gib * GIB), question.shape.num_layers
    splits: dict[str, tuple[tuple[str, int], ...]] = {
        policy: ((policy, layers),) for policy in cost.POLICIES if policy != "none" or not away
    }
    mixed = cost.cheapest_recompute(question.shape, question.tokens, budget, layout)
    if mixed is not None and (mixed.text != "none" or not away):
        splits.setdefault(mixed.text, mixed.split)
    for text, split in splits.items():
        yield _costed(
            question, topology, layout, f"ds_configs/{name}.json", text, split, accumulation, problem, traffic
        )


def _what_lacks(
    question: Question, layout: cost.Layout, memory: cost.RankMemory, host: cost.HostMemory
) -> str:
    if layout.zero_stage == 0:
        return "ZeRO 0 trains in fp32 only, without tensor cores"
    if memory.total > int(question.budget_gib * GIB):
        parts = {
            "model states": memory.states,
            "kept activations": memory.kept,
            "one block at work": memory.working,
            "gathered weights and buckets": memory.buffers,
            "the optimizer's update": memory.updating,
        }
        largest = max(parts, key=lambda part: parts[part])
        return (
            f"GPU: needs {memory.total / GIB:.3g} of {question.budget_gib:g} GiB, most for {largest}"
            f" ({parts[largest] / GIB:.3g})"
        )
    node = node_host_bytes(question, host)
    if question.host_memory_gib is not None and node > question.host_memory_gib * GIB:
        return f"host: a node needs {node / GIB:,.0f} of {question.host_memory_gib:g} GiB"
    return ""


def node_host_bytes(question: Question, host: cost.HostMemory) -> int:
    """Return the host memory of a node's ranks, their programs included."""
    return question.ranks_per_node * (host.total + PROGRAM_BYTES)


# ------------------------------------------------------------------------------------------------------ bytes


@dataclass(frozen=True)
class _Traffic:
    """Where a layout's neighbours sit: shares of what is sent that leave the domain."""

    ulysses_inter: float
    ring_inter: float


def _context_traffic(question: Question, topology: Topology) -> _Traffic:
    """Return the shares of the busiest rank; groups repeat after the least common multiple of group and
    domain."""
    domain, ulysses, ring = question.gpu.domain, topology.ulysses_degree, topology.ring_degree
    period = min(topology.world_size, math.lcm(topology.cp_size, domain))
    away = 0
    if ulysses > 1 and domain % ulysses:
        for start in range(0, period, ulysses):
            places = [rank // domain for rank in range(start, start + ulysses)]
            away = max(away, ulysses - min(places.count(place) for place in places))
    outside = ring > 1 and any(
        (start + step * ulysses) // domain != (start + (step + 1) % ring * ulysses) // domain
        for group in range(0, period, topology.cp_size)
        for start in range(group, group + ulysses)  # the first of each ring
        for step in range(ring)
    )
    return _Traffic(away / (ulysses - 1) if away else 0.0, float(outside))


def _zero_wire(question: Question, topology: Topology, stage: int, accumulation: int) -> tuple[int, int]:
    """Return ZeRO's bytes a rank and step, inside the domain and over its network link: each byte enters a
    domain once, through the cards of all its GPUs together."""
    world, domain = topology.world_size, question.gpu.domain
    gather, reduce = cost.zero_bytes(cost.parameters(question.shape), world, stage, accumulation)
    sent = gather + reduce
    if world <= domain:
        return sent, 0
    inter = sent * (world - domain) // (world - 1) // domain
    return sent - inter, inter


# ------------------------------------------------------------------------------------------------------- time


def _costed(
    question: Question,
    topology: Topology,
    layout: cost.Layout,
    file: str,
    text: str,
    split: tuple[tuple[str, int], ...],
    accumulation: int,
    problem: str,
    traffic: _Traffic,
) -> Row:
    """Return the row; `problem` is what already speaks against the layout."""
    shape, tokens = question.shape, question.tokens
    videos = question.micro_batch * accumulation  # of one rank in a step
    ulysses, ring, repeated, repeated_linear = _blocks_sent(shape, tokens, topology, split)
    zero_intra, zero_inter = _zero_wire(question, topology, layout.zero_stage, accumulation)
    wire = Wire(
        ulysses_intra=int(videos * ulysses * (1 - traffic.ulysses_inter)),
        ulysses_inter=int(videos * ulysses * traffic.ulysses_inter),
        ring_intra=0 if traffic.ring_inter else videos * ring,
        ring_inter=videos * ring if traffic.ring_inter else 0,
        zero_intra=zero_intra,
        zero_inter=zero_inter,
    )
    work = _work(question, topology, split, videos, repeated, repeated_linear)
    memory = cost.rank_memory(shape, tokens, split, layout)
    host = cost.host_memory(shape, tokens, split, layout)
    parked = host.activations * accumulation
    fast, slow = (
        _seconds(question, topology, layout, wire, work, parked, _rates(question.gpu, rates))
        for rates in (FAST, SLOW)
    )
    model_flops = cost.train_flops(shape, tokens) * videos * topology.dp_size
    return Row(
        topology,
        file,
        layout.zero_stage,
        layout.offload_optimizer,
        text,
        layout.offload_activations,
        question.micro_batch,
        accumulation,
        memory,
        host,
        model_flops,
        repeated * videos * topology.dp_size,
        wire,
        fast,
        slow,
        cost.mfu(model_flops, fast.products, topology.world_size, question.gpu.peak_flops),
        problem or _what_lacks(question, layout, memory, host),
    )


def _rates(gpu: Gpu, rates: Rates) -> Rates:
    """Return the rates with the shares of the peak that were given for this very GPU."""
    side = 1 if rates is FAST else 0
    return replace(rates, **{name: pair[side] for name, pair in gpu.shares.items()})


def _blocks_sent(
    shape: cost.ModelShape, tokens: int, topology: Topology, split: tuple[tuple[str, int], ...]
) -> tuple[int, int, int, int]:
    """Return the bytes a rank sends to Ulysses' and to the ring's neighbours for one video, and the FLOPs of
    recompute, all and those outside of attention."""
    u, r, layers = topology.ulysses_degree, topology.ring_degree, shape.num_layers
    ulysses = 2 * layers * cost.ulysses_bytes(shape, tokens, u, r)
    ring = layers * (cost.ring_bytes(shape, tokens, u, r) + cost.ring_backward_bytes(shape, tokens, u, r))
    block, flops, linear = cost.block_flops(shape, tokens), 0, 0
    for policy, count in split:
        again = cost.recompute_bytes(shape, tokens, policy, u, r)
        around = cost.ring_bytes(shape, tokens, u, r) if policy == "full" else 0
        ulysses += count * (again - around)
        ring += count * around
        here = cost.recompute_flops(shape, tokens, policy, count)
        attention = {"attention": block.cross_attention, "full": block.total - block.linear}.get(policy, 0)
        flops += here
        linear += here - count * attention
    return ulysses, ring, flops, linear


@dataclass(frozen=True)
class _Work:
    """What one rank computes in a step."""

    linear: float  # FLOPs
    attention_forward: float
    attention_backward: float
    elementwise: float  # bytes of fused kernels


def _work(
    question: Question,
    topology: Topology,
    split: tuple[tuple[str, int], ...],
    videos: int,
    repeated: int,
    repeated_linear: int,
) -> _Work:
    """Return the work; a rank's share is what it holds, padding included.

    Elementwise: norms with modulation, the norms and rotation of q and k, GELU, gates and residuals of a
    block read and write 21 + 2f/d vectors a token when fused; backward twice that.
    """
    shape, tokens = question.shape, question.tokens
    local = cost.local_tokens(tokens, topology.cp_size)
    share = videos * local / tokens
    block = cost.block_flops(shape, tokens)
    attention = shape.num_layers * (block.self_attention + block.cross_attention)
    linear = cost.forward_flops(shape, tokens) - attention
    linear_back = cost.backward_flops(shape, tokens) - attention * 5 // 2
    recomputed = sum(count for policy, count in split if policy != "none")
    vectors = 21 + 2 * shape.ffn_dim / shape.dim
    passes = 3 * shape.num_layers + recomputed
    return _Work(
        share * (linear + linear_back + repeated_linear),
        share * (attention + repeated - repeated_linear),
        share * attention * 5 / 2,
        videos * local * shape.dim * 2 * vectors * passes,
    )


def _seconds(
    question: Question,
    topology: Topology,
    layout: cost.Layout,
    wire: Wire,
    work: _Work,
    parked: int,
    rates: Rates,
) -> Seconds:
    """Return a step at these rates. Ulysses is never hidden: its exchanges wait for each other."""
    gpu = question.gpu
    intra, inter = gpu.intra_link * rates.intra, gpu.inter_link * rates.inter
    attention = (
        work.attention_forward / rates.attention_forward + work.attention_backward / rates.attention_backward
    ) / (gpu.peak_flops * (rates.ring_kernel if topology.ring_degree > 1 else 1.0))
    products = work.linear / (rates.gemm * gpu.peak_flops) + attention
    elementwise = work.elementwise * rates.passes / (gpu.memory_bandwidth * rates.memory)
    ulysses = max(wire.ulysses_intra / intra, wire.ulysses_inter / inter)
    ring = wire.ring_intra / intra + wire.ring_inter / inter
    zero = max(wire.zero_intra / intra, wire.zero_inter / (gpu.inter_link * rates.collective))
    share = cost.parameters(question.shape) / (topology.world_size if layout.zero_stage else 1)
    optimizer = 28 * share / (gpu.memory_bandwidth * rates.memory)  # states read and written once
    offload = 2 * parked / (gpu.host_link * rates.host)
    if layout.offload_optimizer:
        optimizer = 28 * share * question.ranks_per_node / rates.host_memory
        offload += 4 * share / (gpu.host_link * rates.host)  # gradients there, weights back
    busy = products + elementwise
    exposed = max(zero - rates.hidden * busy, (1 - rates.hidden) * zero)
    return Seconds(
        products,
        elementwise,
        ulysses,
        max(0.0, ring - rates.ring_hidden * attention),
        max(0.0, exposed),
        offload,
        optimizer,
        rates.overhead * busy,
    )


# -------------------------------------------------------------------------------------------------- to run it


def flags(question: Question, row: Row, expert: str | None = None) -> list[str]:
    """Return the words for train.py that run this row, of one expert of a pair."""
    name = f"{question.pair}-{expert}" if question.pair and expert else question.variant.name
    words = [] if question.pair and expert is None else ["--model.variant", name]
    words += ["--deepspeed", row.deepspeed, "--precision", "bf16"]
    words += ["--parallel.ulysses_degree", str(row.topology.ulysses_degree)]
    words += ["--parallel.ring_degree", str(row.topology.ring_degree)]
    words += ["--model.recompute", row.recompute]
    words += ["--model.offload_activations"] if row.offload_activations else []
    words += ["--model.memory_budget_gb", f"{question.budget_gib:g}"]
    words += ["--micro_batch", str(row.micro_batch), "--accumulation", str(row.accumulation)]
    words += ["--data.num_frames", str(question.frames)]
    return words + ["--data.height", str(question.height), "--data.width", str(question.width)]


def slurm_script(question: Question) -> str:
    """Return the script of slurm/ that trains models of this size."""
    if question.pair:
        return "slurm/train_a14b.sh"
    size = {3072: "5b", 5120: "14b"}.get(question.variant.config.dim, "1.3b")
    return f"slurm/train_{size}.sh"


def as_json(question: Question, found: list[Row]) -> str:
    """Return all rows for machines: bytes, FLOPs, seconds, the flags of each, and which is picked."""
    picked = pick(found)

    def row_dict(row: Row) -> dict[str, Any]:
        return {
            "fits": row.fits,
            "why_not": row.why_not,
            "dp": row.topology.dp_size,
            "ulysses": row.topology.ulysses_degree,
            "ring": row.topology.ring_degree,
            "zero": row.zero_stage,
            "deepspeed": row.deepspeed,
            "recompute": row.recompute,
            "offload_optimizer": row.offload_optimizer,
            "offload_activations": row.offload_activations,
            "micro_batch": row.micro_batch,
            "accumulation": row.accumulation,
            "global_batch": row.global_batch,
            "gpu_bytes": {**vars(row.memory), "total": row.memory.total},
            "host_bytes_per_node": node_host_bytes(question, row.host),
            "model_flops": row.model_flops,
            "recompute_flops": row.recompute_flops,
            "wire_bytes": vars(row.wire),
            "step_seconds": [row.fast.total, row.slow.total],
            "fast_seconds": vars(row.fast),
            "slow_seconds": vars(row.slow),
            "mfu": [mfu(question, row, seconds) for seconds in (row.slow.total, row.fast.total)],
            "mfu_ceiling": row.mfu_ceiling,
            "flags": flags(question, row),
        }

    return json.dumps(
        {
            "variant": question.pair or question.variant.name,
            "parameters": cost.parameters(question.shape),
            "tokens": question.tokens,
            "gpus": question.gpus,
            "world_size": question.world_size,
            "gpu": vars(question.gpu) | {"shares": dict(question.gpu.shares)},
            "budget_gib": question.budget_gib,
            "slurm_script": slurm_script(question),
            "picked": None if picked is None else found.index(picked),
            "rows": [row_dict(row) for row in found],
        },
        indent=1,
    )


def mfu(question: Question, row: Row, seconds: float) -> float:
    """Return the model FLOPs utilisation of a step that takes so long."""
    return cost.mfu(row.model_flops, seconds, question.world_size, question.gpu.peak_flops)
