"""Attention kernels and the elementwise operations between matrix products, each alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megawan.benchmark.report import Table
from megawan.benchmark.timing import Spread, interleaved, paired_ratio
from megawan.benchmark.traffic import compiled_bytes, moved_bytes
from megawan.hardware import peak_flops
from megawan.models.attention import BACKENDS, select_attention
from megawan.models.gates import gated_add
from megawan.models.heads import RMSNorm
from megawan.models.precision import TanhGELU, modulated_norm
from megawan.models.rope import RopeTables

EPS = 1e-6
# (tokens, heads) of 128: 1.3B on one GPU, a rank of 14B at cp 8, both at 480p; 14B at 720p.
GPU_ATTENTION = ((32_760, 12), (32_760, 5), (75_600, 5))
CPU_ATTENTION = ((2_048, 12),)
GPU_WIDTHS = ((32_760, 1536), (4_680, 5120))
CPU_WIDTHS = ((4_096, 1536),)
AT_LEAST = {"cuda": 0.2, "cpu": 0.0}
"""Seconds of one product or attention in a row, see `timing.interleaved`."""


def attention(device: torch.device, dtype: torch.dtype, repetitions: int, warm_up: int) -> list[Table]:
    """Return a table for each shape: every kernel that runs here, forward alone and with backward."""
    tables = []
    for tokens, heads in GPU_ATTENTION if device.type == "cuda" else CPU_ATTENTION:
        q, k, v = (torch.randn(1, tokens, heads, 128, device=device, dtype=dtype) for _ in range(3))
        for x in (q, k, v):
            x.requires_grad_()
        calls: dict[str, Callable[[], object]] = {}
        table = Table(
            f"Attention, {tokens} tokens x {heads} heads of 128, {str(dtype).removeprefix('torch.')}",
            note="TFLOP/s of 2 products forward and, as every published table counts, 5 backward.",
        )
        for name in dict.fromkeys(backend.name for backend in BACKENDS):
            if name == "math" and device.type == "cuda":
                continue  # tokens x tokens numbers a head do not fit
            try:
                kernel = select_attention(name, device.type, dtype, head_dim=128)
            except ValueError as error:
                table.details.append({"kernel": name, "left out": str(error)})
                continue
            calls[f"{name} forward"] = _forward(kernel, q, k, v)
            calls[f"{name} both"] = _both(kernel, q, k, v)
        at_least = AT_LEAST[device.type]
        seconds = interleaved(
            calls, repetitions=repetitions, warm_up=warm_up, device=device, at_least=at_least
        )
        forward_flops = 4 * tokens * tokens * heads * 128
        for name in {name.rpartition(" ")[0]: None for name in calls}:
            forward = Spread.of(seconds[f"{name} forward"]).median
            backward = Spread.of(seconds[f"{name} both"]).median - forward
            table.rows.append(
                {
                    "kernel": name,
                    "forward ms": 1e3 * forward,
                    "backward ms": 1e3 * backward,
                    "forward TFLOP/s": forward_flops / forward / 1e12,
                    "backward TFLOP/s": 2.5 * forward_flops / backward / 1e12,
                }
            )
        tables.append(table)
    return tables


def _forward(kernel: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            kernel(*inputs)

    return call


def _both(kernel: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    dout = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(kernel(*inputs), inputs, dout)


def elementwise(device: torch.device, dtype: torch.dtype, repetitions: int, warm_up: int) -> list[Table]:
    """Return a table for each width: our operations, eager and compiled, against the formulas written out
    with autograd, forward and backward, in milliseconds and in passes over one hidden vector a token (time of
    a copy = 2 passes)."""
    tables = []
    for tokens, dim in GPU_WIDTHS if device.type == "cuda" else CPU_WIDTHS:
        x, y = (torch.randn(1, tokens, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        row = torch.randn(1, 1, dim, device=device, requires_grad=True)
        other = torch.randn(1, 1, dim, device=device, requires_grad=True)
        norm = RMSNorm(dim, EPS).to(device, dtype)
        rope = RopeTables(128).rows((1, 1, tokens), 0, tokens, tokens, device, torch.float32)
        wide = torch.randn(1, tokens, 4 * dim, device=device, dtype=dtype, requires_grad=True)

        def normed(a: Tensor) -> Tensor:
            return norm(a, a.shape[-1] // 128, rope)  # noqa: B023

        def formula_norm(a: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            out = torch.layer_norm(a.float(), (dim,), eps=EPS) * (1 + scale) + shift  # noqa: B023
            return out.to(a.dtype)

        def formula_rope(a: Tensor) -> Tensor:
            b = torch.rms_norm(a, (dim,), norm.weight, EPS).unflatten(-1, (-1, 64, 2))  # noqa: B023
            turned = torch.view_as_complex(b.double().contiguous())
            table = torch.complex(*(t.double() for t in rope))  # noqa: B023
            return torch.view_as_real(turned * table).flatten(-2).to(a.dtype)

        ops: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
            "norm + modulate": (
                lambda a, s, t: modulated_norm(a, s, t, EPS, 0, a.dtype),
                formula_norm,
                (x, row, other),
            ),
            "gate + residual": (
                lambda a, b, g: gated_add(a, b, g, 0),
                lambda a, b, g: (a.float() + b * g).to(a.dtype),
                (x, y, row),
            ),
            "RMSNorm + RoPE": (normed, formula_rope, (x,)),
            "GELU": (TanhGELU(), _gelu, (wide,)),
        }
        calls: dict[str, Callable[[], object]] = {"copy": lambda: x.detach().clone()}  # noqa: B023
        for name, (ours, formula, inputs) in ops.items():
            calls[f"{name}: formula"] = _there_and_back(formula, inputs)
            calls[f"{name}: ours"] = _there_and_back(ours, inputs)
            calls[f"{name}: ours compiled"] = _there_and_back(torch.compile(ours, dynamic=False), inputs)
        seconds = interleaved(calls, repetitions=repetitions, warm_up=warm_up, device=device)
        copy = Spread.of(seconds["copy"]).median
        table = Table(
            f"Between the products, both ways, {tokens} tokens x {dim}, {str(dtype).removeprefix('torch.')}",
            note=f"A pass is half the time of a copy of tokens x {dim} ({1e3 * copy:.2f} ms).",
        )
        vector = tokens * dim * dtype.itemsize
        for name in ops:
            base = seconds[f"{name}: formula"]
            for way in ("formula", "ours", "ours compiled"):
                own = seconds[f"{name}: {way}"]
                moved = compiled_bytes if "compiled" in way else moved_bytes
                table.rows.append(
                    {
                        "operation": f"{name}: {way}",
                        "ms": 1e3 * Spread.of(own).median,
                        "passes by time": 2 * Spread.of(own).median / copy,
                        "passes by bytes": moved(calls[f"{name}: {way}"]) / vector,
                        "/ formula": paired_ratio(own, base).median,
                    }
                )
        tables.append(table)
    return tables


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _there_and_back(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    dout = torch.randn_like(f(*inputs))
    return lambda: torch.autograd.grad(f(*inputs), inputs, dout)


def products(device: torch.device, dtype: torch.dtype, repetitions: int, warm_up: int) -> Table:
    """Return what the matrix products of a block reach alone: the roof under every step."""
    table = Table(f"Matrix products alone, {str(dtype).removeprefix('torch.')}")
    sizes = ((32_760, 1536, 8960), (32_760, 3072, 14336), (4_680, 5120, 13824))
    at_least = AT_LEAST[device.type]
    for rows, inner, columns in (
        sizes if device.type == "cuda" else ((2_048, 1536, 8960), (2_048, 1536, 1536))
    ):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(columns, inner, device=device, dtype=dtype)
        call = {"product": lambda: torch.nn.functional.linear(a, b)}  # noqa: B023
        seconds = interleaved(
            call, repetitions=repetitions, warm_up=warm_up, device=device, at_least=at_least
        )["product"]
        rate = 2 * math.prod((rows, inner, columns)) / Spread.of(seconds).median
        row = {"rows x inner x columns": f"{rows} x {inner} x {columns}", "TFLOP/s": rate / 1e12}
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        table.rows.append(row | ({"of peak": f"{rate / peak:.1%}"} if peak else {}))
    return table
