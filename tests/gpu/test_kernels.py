"""Attention kernels on a real GPU against the formula in float64, whole and as a ring uses them."""

import pytest
import torch
from torch import Tensor

from megawan.models.attention import BACKENDS, Backend, MathAttention, choose_backend, select_attention
from megawan.parallel.kernel import AttentionKernel
from megawan.parallel.ring import merge
from megawan.rng import generator_at

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6, torch.float64: 1e-13}
"""Relative error by norm: a few roundings of each dtype."""
CUDA = [backend for backend in BACKENDS if "cuda" in backend.devices]
LENGTHS = {"self": (1000, 1000), "text": (300, 512), "images": (300, 257)}


def fitting(with_lse: bool) -> list[tuple[Backend, torch.dtype]]:
    """Return what this GPU and its packages have; the test of names below shows what that must be."""
    if not torch.cuda.is_available():
        return [(CUDA[-1], torch.float32)]  # fails in its fixture
    gpu = torch.cuda.get_device_capability()
    return [
        (backend, dtype)
        for backend in CUDA
        for dtype in backend.dtypes
        if backend.objection("cuda", dtype, 128, with_lse, gpu) is None
    ]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Backend) else str(value).removeprefix("torch.")


def tensors(dtype: torch.dtype, width: int, *lengths: int) -> list[Tensor]:
    return [
        torch.randn(2, length, 3, width, dtype=torch.float64, generator=generator_at(1, index)).to(
            "cuda", dtype
        )
        for index, length in enumerate(lengths)
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Return out, lse, dq, dk, dv in float64."""
    formula = MathAttention("")
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    out, lse = formula.forward_lse(q, k, v)
    return [out, lse, *formula.backward(dout, q, k, v, out, lse)]


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    distance = float((found.double() - wanted).norm() / wanted.norm())
    assert distance <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("backend", "dtype"), fitting(with_lse=False), ids=name_of)
def test_output_and_gradients(backend: Backend, dtype: torch.dtype, lengths: str, width: int) -> None:
    queries, keys = LENGTHS[lengths]
    q, k, v, dout = tensors(dtype, width, queries, keys, keys, queries)
    out, _, *grads = exact(q, k, v, dout)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    result = select_attention(backend.name, "cuda", dtype, head_dim=width)(*inputs)
    assert result.dtype == dtype
    check(result, out, dtype)
    for found, wanted in zip(torch.autograd.grad(result, inputs, dout), grads, strict=True):
        assert found.dtype == dtype
        check(found, wanted, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), fitting(with_lse=True), ids=name_of)
def test_parts_of_the_keys_add_up_to_all(backend: Backend, dtype: torch.dtype) -> None:
    """What a ring does: blocks of keys merged, and gradients from the whole row's result."""
    q, k, v, dout = tensors(dtype, 128, 700, 1000, 1000, 700)
    expected_out, expected_lse, *expected = exact(q, k, v, dout)
    kernel = select_attention(backend.name, "cuda", dtype, head_dim=128, need_lse=True)
    assert isinstance(kernel, AttentionKernel)
    parts = ((0, 400), (400, 1000))
    (first, first_lse), (second, second_lse) = (
        kernel.forward_lse(q, k[:, a:b].contiguous(), v[:, a:b].contiguous()) for a, b in parts
    )
    out, lse = merge(first.to(first_lse.dtype), first_lse, second, second_lse)
    check(out, expected_out, dtype)
    assert lse.dtype in (torch.float32, torch.float64)
    assert float((lse.double() - expected_lse).abs().max()) < 1e-4
    grads = [
        kernel.backward(dout, q, k[:, a:b].contiguous(), v[:, a:b].contiguous(), out.to(dtype), lse)
        for a, b in parts
    ]
    check(grads[0][0].double() + grads[1][0].double(), expected[0], dtype)
    for index in (1, 2):
        check(torch.cat([part[index] for part in grads], 1), expected[index], dtype)


@pytest.mark.gpu
def test_a_gpu_has_the_kernels_that_its_kind_should() -> None:
    """An empty list above would pass."""
    found = {backend.name for backend, dtype in fitting(with_lse=True) if dtype == torch.bfloat16}
    major = torch.cuda.get_device_capability()[0]
    assert found >= ({"math", "sdpa_flash", "sdpa_cudnn"} if major >= 8 else {"math"})
    best = choose_backend("auto", "cuda", torch.bfloat16, 128, True, torch.cuda.get_device_capability())
    assert best.name == ("sdpa_cudnn" if major in (9, 10, 11) else "sdpa_flash" if major >= 8 else "math")
