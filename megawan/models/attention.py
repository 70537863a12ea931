"""Attention kernels behind one signature: softmax(q·kᵀ/√K)·v on [B, L, N, K], no mask, no dropout.

`select_attention` picks one by name, or the fastest that fits, and raises before the run starts when the
wanted one does not fit the device, the dtype, the head width or the need for a log-sum-exp. Nothing falls
back later. Optional packages are imported only when their kernel is chosen.

Letters: B batch, L tokens (Lq queries, Lk keys), N heads, K head width.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float64, torch.float32, *HALF)
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Described:
    """What every kernel can say of itself in the start-up lines."""

    description: str

    def describe(self) -> str:
        """Return the name and what stands behind it, one line."""
        return self.description


@dataclass(frozen=True)
class MathAttention(_Described):
    """The formula written out: the reference, with Lq·Lk numbers a head in memory."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Lq, N, K]; products and softmax in float32 (float64 for float64)."""
        return self.forward_lse(q, k, v)[0]

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out [B, Lq, N, K], lse [B, N, Lq])."""
        scores = _scores(q, k)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        return torch.einsum("bnqk,bknd->bqnd", weights, _wide(v)).to(q.dtype), lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        """Return (dq, dk, dv) for these keys; out and lse may be those of a longer row of keys."""
        weights = (_scores(q, k) - lse.unsqueeze(-1)).exp()
        wide = _wide(dout)
        dv = torch.einsum("bnqk,bqnd->bknd", weights, wide)
        dweights = torch.einsum("bqnd,bknd->bnqk", wide, _wide(v))
        row = (wide * _wide(out)).sum(-1).transpose(1, 2).unsqueeze(-1)
        dscores = weights * (dweights - row) / math.sqrt(q.shape[-1])
        dq = torch.einsum("bnqk,bknd->bqnd", dscores, _wide(k))
        dk = torch.einsum("bnqk,bqnd->bknd", dscores, _wide(q))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@dataclass(frozen=True)
class OperatorAttention(_Described):
    """A fused kernel given as torch's forward and backward operators, both on [B, N, L, K].

    forward(q, k, v) -> (out, lse [B, N, Lq]); gradient(dout, q, k, v, out, lse) -> (dq, dk, dv).
    heads_apart: the dtypes whose k and v are first laid out one head after the other.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Triple]
    heads_apart: tuple[torch.dtype, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Lq, N, K]; keeps q, k, v, out and lse for the backward pass."""
        return _Attend.apply(q, k, v, self)  # type: ignore[no-any-return,no-untyped-call]

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out [B, Lq, N, K], lse [B, N, Lq])."""
        k, v = self.laid_out(k, v)
        out, lse = self.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2), lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        """Return (dq, dk, dv) for these keys; out and lse may be those of a longer row of keys."""
        k, v = self.laid_out(k, v)
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = self.gradient(dout, q, k, v, out, lse)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def laid_out(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return k and v [B, L, N, K] in the memory order that the operators are fastest on.

        Not q: the output takes its order, and the projection behind it would make and keep another copy.
        """
        if k.dtype not in self.heads_apart:
            return k, v
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        return k, v


@dataclass(frozen=True)
class TorchAttention(_Described):
    """torch's own choice among its fused CUDA kernels, never the formula."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Lq, N, K]; RuntimeError if torch has no fused kernel for the inputs."""
        fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        with sdpa_kernel(fused):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


@dataclass(frozen=True)
class PackageAttention(_Described):
    """`flash_attn_func` of a flash-attention package, which takes [B, L, N, K] as it is."""

    function: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Lq, N, K]."""
        result = self.function(q, k, v)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp
        return out


Kernel = MathAttention | OperatorAttention | TorchAttention | PackageAttention


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: OperatorAttention) -> Tensor:
        k, v = kernel.laid_out(k, v)
        out, lse = kernel.forward_lse(q, k, v)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dq, dk, dv = ctx.kernel.backward(dout, *ctx.saved_tensors)
        return dq, dk, dv, None


def _cpu_flash(description: str) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse

    def gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = operator(dout, q, k, v, out, lse, 0.0, False)
        return dq, dk, dv

    # Half-precision products of a head that lies strided between the others lose more than a copy costs: 6 %
    # of the attention at 2,048 tokens.
    return OperatorAttention(description, forward, gradient, heads_apart=HALF)


def _cuda_flash(description: str) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out, lse

    def gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        lengths, unused = (q.shape[2], k.shape[2]), _no_dropout_state(q)
        operator = torch.ops.aten._scaled_dot_product_flash_attention_backward
        dq, dk, dv = operator(dout, q, k, v, out, lse, None, None, *lengths, 0.0, False, unused, unused)
        return dq, dk, dv

    return OperatorAttention(description, forward, gradient)


def _cudnn(description: str) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        return out, lse.flatten(2)  # [B, N, Lq, 1]

    def gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        lengths, unused = (q.shape[2], k.shape[2]), _no_dropout_state(q)
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        dq, dk, dv = operator(
            dout, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, *lengths, 0.0, False
        )
        return dq, dk, dv

    return OperatorAttention(description, forward, gradient)


def _no_dropout_state(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)


@dataclass(frozen=True)
class Backend:
    """One kernel under its name and what it declares to support."""

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    has_lse: bool
    """Gives a log-sum-exp and takes it in the backward pass, which a ring needs."""
    build: Callable[[str], Kernel] | None = None
    """Makes the kernel from its description; None: it is `flash_attn_func` of `module`."""
    module: str | None = None
    install: str = ""
    head_multiple: int = 1
    head_limit: int | None = None
    gpus: tuple[int, ...] | None = None
    """Major compute capabilities that it runs on."""
    auto_gpus: tuple[int, ...] | None = None
    """Those on which `auto` may choose it, where that is fewer."""

    def objection(
        self, device_type: str, dtype: torch.dtype, head_dim: int, need_lse: bool, gpu: tuple[int, int] | None
    ) -> str | None:
        """Return why the kernel cannot be used, None if it can; gpu: the device's compute capability."""
        if device_type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {device_type}"
        if device_type == "cuda" and gpu is None:
            return "needs a CUDA device, and torch sees none"
        if gpu is not None and self.gpus is not None and gpu[0] not in self.gpus:
            legal = ", ".join(f"{major}.x" for major in self.gpus)
            return f"runs on GPUs of compute capability {legal}, not {gpu[0]}.{gpu[1]}"
        if dtype not in self.dtypes:
            return f"takes {' or '.join(map(_short, self.dtypes))}, not {_short(dtype)}"
        if head_dim % self.head_multiple or head_dim > (self.head_limit or head_dim):
            limit = f" up to {self.head_limit}" if self.head_limit else ""
            return f"takes head widths that are multiples of {self.head_multiple}{limit}, not {head_dim}"
        if need_lse and not self.has_lse:
            return "gives no log-sum-exp, which a ring and recompute attention or selective need"
        if self.module is not None and not _installed(self.module):
            return f"needs the Python module {self.module} ({self.install})"
        return None

    def kernel(self, description: str) -> Kernel:
        """Return the kernel; imports its package."""
        if self.build is not None:
            return self.build(description)
        return PackageAttention(description, importlib.import_module(str(self.module)).flash_attn_func)


FLASH_SOURCE = "github.com/Dao-AILab/flash-attention"
# Fastest first: `auto` takes the first that fits. Names may repeat for different devices.
BACKENDS = (
    Backend(
        name="flash3",
        summary="flash-attention 3",
        devices=("cuda",),
        dtypes=HALF,
        has_lse=False,
        module="flash_attn_interface",
        install=f"built from the folder hopper of {FLASH_SOURCE}",
        head_multiple=8,
        head_limit=256,
        gpus=(9,),
    ),
    Backend(
        name="flash4",
        summary="flash-attention 4",
        devices=("cuda",),
        dtypes=HALF,
        has_lse=False,
        module="flash_attn.cute",
        install="pip install flash-attn-4",
        head_multiple=8,
        head_limit=128,
        gpus=(9, 10, 11),
    ),
    Backend(
        name="sdpa_cudnn",
        summary="torch's cuDNN attention",
        devices=("cuda",),
        dtypes=HALF,
        has_lse=True,
        build=_cudnn,
        head_multiple=8,
        head_limit=128,
        gpus=(8, 9, 10, 11, 12),
        auto_gpus=(9, 10, 11),
    ),
    Backend(
        name="flash2",
        summary="flash-attention 2",
        devices=("cuda",),
        dtypes=HALF,
        has_lse=False,
        module="flash_attn.flash_attn_interface",
        install="pip install flash-attn",
        head_multiple=8,
        head_limit=256,
        gpus=(8, 9, 10, 11, 12),
    ),
    Backend(
        name="sdpa_flash",
        summary="torch's flash-attention 2",
        devices=("cuda",),
        dtypes=HALF,
        has_lse=True,
        build=_cuda_flash,
        head_multiple=8,
        head_limit=256,
        gpus=(8, 9, 10, 11, 12),
    ),
    Backend(
        name="sdpa",
        summary="torch's choice of fused CUDA kernel",
        devices=("cuda",),
        dtypes=(torch.float32, *HALF),
        has_lse=False,
        build=TorchAttention,
    ),
    Backend(
        name="sdpa",
        summary="torch's flash attention for CPUs",
        devices=("cpu",),
        dtypes=FLOATING,
        has_lse=True,
        build=_cpu_flash,
    ),
    Backend(
        name="math",
        summary="the formula, a reference: slow, and memory grows with the square of the tokens",
        devices=("cpu", "cuda"),
        dtypes=FLOATING,
        has_lse=True,
        build=MathAttention,
    ),
)


def select_attention(
    name: str, device_type: str, dtype: torch.dtype, *, head_dim: int, need_lse: bool = False
) -> Kernel:
    """Return the kernel `name`, or for "auto" the fastest that fits; `describe()` says which it is.

    need_lse: a ring will merge blocks, or a recomputation will find the result. Raises ValueError when the
    kernel does not fit, naming those that do.
    """
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    backend = choose_backend(name, device_type, dtype, head_dim, need_lse, gpu)
    return backend.kernel(f"{backend.name}{' (auto)' if name == 'auto' else ''}: {backend.summary}")


def choose_backend(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    need_lse: bool,
    gpu: tuple[int, int] | None,
) -> Backend:
    """Return the backend that `select_attention` builds; gpu: the CUDA device's compute capability, if any.

    Raises ValueError as that does.
    """
    needs = (device_type, dtype, head_dim, need_lse, gpu if device_type == "cuda" else None)
    refused = [(backend, backend.objection(*needs)) for backend in BACKENDS]
    legal = [backend for backend, objection in refused if objection is None]
    if name == "auto":
        for backend in legal:
            if gpu is None or backend.auto_gpus is None or gpu[0] in backend.auto_gpus:
                return backend
    for backend in legal:
        if backend.name == name:
            return backend
    wants = (
        f"{_short(dtype)} on {device_type}, head width {head_dim}{', with log-sum-exp' if need_lse else ''}"
    )
    names = ", ".join(["auto", *(backend.name for backend in legal)]) if legal else "none"
    known = [(backend, objection) for backend, objection in refused if backend.name == name]
    if not known and name != "auto":
        every = ", ".join(dict.fromkeys(["auto", *(backend.name for backend in BACKENDS)]))
        raise ValueError(f"attention {name!r} is unknown; known: {every}; legal for {wants}: {names}")
    # Where a name has a kernel for each device, the one for this device knows what is wrong.
    known.sort(key=lambda entry: device_type not in entry[0].devices)
    reason = known[0][1] if known else "finds no kernel that fits"
    raise ValueError(f"attention {name!r} {reason}; legal for {wants}: {names}")


def _installed(module: str) -> bool:
    """Return whether `module` can be found; a parent that is missing or broken counts as not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q·kᵀ/√K [B, N, Lq, Lk]."""
    return torch.einsum("bqnd,bknd->bnqk", _wide(q), _wide(k)) / math.sqrt(q.shape[-1])


def _wide(x: Tensor) -> Tensor:
    wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
