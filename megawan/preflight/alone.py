"""What each rank finds out by itself, before any process group: flags, layout, files, memory, attention."""

import dataclasses
from dataclasses import dataclass

import torch

from megawan import cost, ds_config, plan
from megawan.config import TrainConfig, to_dict
from megawan.data.latents import StoredSamples
from megawan.data.mixture import Mixture
from megawan.data.synthetic import SyntheticLatents
from megawan.dist import Environment, pick_device
from megawan.models.attention import Kernel, MathAttention
from megawan.models.variants import Variant, get_variant
from megawan.parallel.topology import Topology
from megawan.plan import Plan
from megawan.preflight.table import Checks

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of an attention kernel's output from the formula's, for values around 1."""


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU: bytes of its memory, and how many of them nobody uses."""

    name: str
    total: int
    free: int


def look(config: TrainConfig, place: Environment, world_size: int, checks: Checks) -> Plan | None:
    """Add this rank's rows to `checks`, always the same ones in the same order; return the plan of
    `world_size` ranks, or None where there is none."""
    checks.attempt(
        "flags",
        lambda: _checked(config),
        lambda found: f"output {found.output or 'runs/VARIANT-DATE-TIME'}, resume {found.checkpoint.resume}",
        "correct the flag; --help lists them",
        alike=lambda found: str(to_dict(found)),
    )
    device = checks.attempt(
        "device",
        lambda: pick_device(place.local_rank),
        lambda found: "a GPU for each rank" if found.type == "cuda" else "no GPU: ranks run on CPUs",
        "start one rank for each GPU, and look at CUDA_VISIBLE_DEVICES",
    )
    variant = checks.attempt(
        "model",
        lambda: get_variant(config.model.variant),
        lambda found: f"{found.name}, {cost.parameters(plan.model_shape(found.config)):,} parameters",
        "choose a --model.variant of the list",
    )
    if variant is None:
        for name in ("layout", "deepspeed file", "weights", "data", "inputs", "memory", "attention"):
            checks.skip(name, "not tried: needs the model")
        return None
    topology = checks.attempt(
        "layout",
        lambda: plan.lay_out(config, world_size)[1],
        _say_layout,
        "choose one of the legal layouts, or another number of ranks",
    )
    resolved = checks.attempt(
        "deepspeed file",
        lambda: plan.read_deepspeed(config, topology or Topology(world_size)),
        lambda found: f"{config.deepspeed}: ZeRO stage {found.zero_stage}, {found.precision}",
        "give one of ds_configs/, or correct the file",
    )
    weights = None
    if config.model.init_from is None:
        checks.skip("weights", f"random ones of seed {config.seed}")
    else:
        weights = checks.attempt(
            "weights",
            lambda: plan.open_start(config, variant).describe(),
            str,
            f"give --model.init_from the weights of {variant.name}, or the --model.variant of these weights",
        )
    data = checks.attempt(
        "data",
        lambda: plan.open_data(config, variant, place.rank),
        lambda found: found.describe(),
        "encode for this variant and size with tools/encode_dataset.py; tools/check_dataset.py looks closer",
        alike=lambda found: found.fingerprint,
    )
    for what, piece in (("layout", topology), ("DeepSpeed file", resolved), ("data", data)):
        if piece is None:
            for name in ("inputs", "memory", "attention"):
                checks.skip(name, f"not tried: needs the {what}")
            return None
    assert topology is not None and resolved is not None and data is not None
    gpu = _gpu(device) if device is not None and device.type == "cuda" else None
    return _judge(config, variant, topology, data, resolved, weights, gpu, checks)


def _checked(config: TrainConfig) -> TrainConfig:
    plan.check_options(config)
    return config


def _judge(
    config: TrainConfig,
    variant: Variant,
    topology: Topology,
    data: StoredSamples | Mixture | SyntheticLatents,
    resolved: ds_config.Resolved,
    weights: str | None,
    gpu: Gpu | None,
    checks: Checks,
) -> Plan | None:
    """Add the rows of what the pieces come to together."""

    def put_together(recompute: str) -> Plan:
        steps = plan.count_steps(config, topology, len(data))
        return plan.put_together(config, variant, topology, data, resolved, steps, recompute, weights)

    # Whatever memory says below, the other rows need some plan; auto begins at what needs least.
    asked = config.model.recompute
    made = checks.attempt(
        "inputs",
        lambda: _with_inputs(put_together("full" if asked == plan.AUTO else asked)),
        lambda found: f"{found.steps} steps of {found.global_batch} videos; {found.flow.describe()}",
        "correct --optim.*, --flow.*, --validation.*, --sample.*, or encode what the variant takes",
    )
    if made is None:
        checks.skip("memory", "not tried: needs the inputs")
        checks.skip("attention", "not tried: needs the inputs")
        return None
    tokens = plan.longest_video(data, variant)
    if gpu is None and config.model.memory_budget_gb is None:
        checks.skip(
            "memory",
            f"no GPU to compare with (--model.memory_budget_gb does); {plan.describe_memory(made.memory)}",
        )
    else:
        chosen = checks.attempt(
            "memory",
            lambda: require_memory(
                put_together(
                    plan.choose_recompute(budgeted(config, gpu), variant, topology, resolved, tokens)
                ),
                gpu,
            ),
            lambda found: f"recompute {found.recompute}; {plan.describe_memory(found.memory)}",
            "more ranks a video (--parallel.*), more recompute (docs/recompute.md), a higher ZeRO stage",
        )
        made = chosen or made
    kind = "cpu" if gpu is None else "cuda"
    checks.attempt(
        "attention",
        lambda: try_kernel(made.select_attention(kind), made, kind),
        lambda kernel: kernel.describe(),
        "--model.attention auto takes one that is there",
    )
    return made


def _with_inputs(made: Plan) -> Plan:
    plan.require_inputs(made)
    return made


def _say_layout(layout: Topology) -> str:
    return (
        f"{layout.world_size} ranks = dp {layout.dp_size} x ring {layout.ring_degree} x ulysses"
        f" {layout.ulysses_degree}"
    )


def _gpu(device: torch.device) -> Gpu:
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(torch.cuda.get_device_name(device), total, free)


def budgeted(config: TrainConfig, gpu: Gpu | None) -> TrainConfig:
    """Return the run with its GPU's memory as the budget, where it names none: training itself asks only for
    recompute auto."""
    if gpu is None or config.model.memory_budget_gb is not None:
        return config
    budget = gpu.total * (1 - plan.RESERVE) / plan.GIB
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory_budget_gb=budget))


def require_memory(made: Plan, gpu: Gpu | None) -> Plan:
    """Return the plan. Raises ValueError when something else holds so much of the GPU that it cannot fit."""
    if gpu is not None and made.memory.total > gpu.free:
        raise ValueError(
            f"{plan.describe_memory(made.memory)}, but of the {gpu.total / plan.GIB:.3g} GiB of this"
            f" {gpu.name} only {gpu.free / plan.GIB:.3g} are free; nvidia-smi shows who holds the rest"
        )
    return made


def try_kernel(kernel: Kernel, made: Plan, device: str) -> Kernel:
    """Return the kernel after one forward and backward pass of a few tokens. Raises RuntimeError when it does
    not run here, or gives other numbers than the formula."""
    wan = made.variant.config
    dtype = torch.bfloat16 if made.deepspeed.precision == "bf16" else torch.float32
    shape = (1, 64, wan.num_heads, wan.dim // wan.num_heads)
    # Any values do, as long as they are of both signs and differ between heads and tokens.
    grid = torch.arange(shape[1] * shape[2] * shape[3], device=device, dtype=torch.float32)
    q, k, v = (torch.sin(grid * step).view(shape).to(dtype).requires_grad_() for step in (1.1, 1.7, 2.3))
    out = kernel(q, k, v)
    out.sum().backward()
    difference = float((out - MathAttention("")(q, k, v)).detach().abs().max())
    if not difference < TOLERANCE[dtype] or v.grad is None or not bool(v.grad.isfinite().all()):
        raise RuntimeError(f"{kernel.describe()}: differs from the formula by {difference:.2g}")
    return kernel
