"""Kernels agree with the formula, forward and backward; what does not fit is refused before it runs."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megawan.models.attention import (
    BACKENDS,
    MathAttention,
    OperatorAttention,
    choose_backend,
    select_attention,
)
from megawan.parallel.kernel import AttentionKernel
from megawan.rng import generator_at

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
LEGAL_DTYPES = {"float64": 1e-13, "float32": 5e-6, "bfloat16": 3e-2, "float16": 4e-3}


def tensors(dtype: torch.dtype, *lengths: int) -> list[Tensor]:
    return [
        torch.randn(2, length, 3, 16, dtype=torch.float64, generator=generator_at(1, index)).to(dtype)
        for index, length in enumerate(lengths)
    ]


def backend(name: str, device_type: str) -> AttentionKernel:
    found = next(each for each in BACKENDS if each.name == name and device_type in each.devices).kernel(name)
    assert isinstance(found, AttentionKernel)
    return found


@pytest.mark.parametrize("dtype", LEGAL_DTYPES)
@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_cpu_kernels_equal_the_formula_in_float64(name: str, dtype: str) -> None:
    kind, tolerance = getattr(torch, dtype), LEGAL_DTYPES[dtype]
    q, k, v, dout = tensors(kind, 7, 11, 11, 7)
    wide = [x.double().clone().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bqnd,bknd->bnqk", wide[0], wide[1]) / 4
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), wide[2])
    expected_grads = torch.autograd.grad(expected, wide, dout.double())

    kernel = select_attention(name, "cpu", kind, head_dim=16, need_lse=True)
    assert isinstance(kernel, AttentionKernel)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = kernel(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert found.dtype == kind
        assert (found.double() - wanted).abs().max() < tolerance

    same, lse = kernel.forward_lse(q, k, v)
    assert torch.equal(same, out) and lse.dtype == torch.promote_types(kind, torch.float32)
    assert (lse.double() - scores.logsumexp(-1)).abs().max() < max(
        tolerance, 1e-6 if dtype != "float64" else 0
    )


@pytest.mark.parametrize(("dtype", "copied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_half_precision_keys_are_laid_out_once_on_a_cpu(dtype: torch.dtype, copied: bool) -> None:
    """The backward pass finds them as the forward pass left them; wider ones and queries stay as they are."""
    kernel = backend("sdpa", "cpu")
    assert isinstance(kernel, OperatorAttention)
    given = [x.requires_grad_() for x in tensors(dtype, 7, 11, 11)]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = kernel(*given)
    q, *keys = saved[:3]
    assert q.data_ptr() == given[0].data_ptr() and out.is_contiguous()
    for found, wanted in zip(keys, given[1:], strict=True):
        assert torch.equal(found, wanted)
        assert found.transpose(1, 2).is_contiguous() == copied
        assert (found.data_ptr() != wanted.data_ptr()) == copied
    assert [x.data_ptr() for x in kernel.laid_out(*keys)] == [x.data_ptr() for x in keys]


@pytest.mark.parametrize("name", ["sdpa", "math"])
def test_gradients_of_parts_of_the_keys_sum_to_the_whole(name: str) -> None:
    """What a ring relies on: out and lse of all keys, the backward pass one block of keys at a time."""
    kernel = backend(name, "cpu")
    q, k, v, dout = tensors(torch.float64, 7, 11, 11, 7)
    out, lse = kernel.forward_lse(q, k, v)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse.contiguous())
    parts = [kernel.backward(dout, q, k[:, a:b], v[:, a:b], out, lse) for a, b in ((0, 4), (4, 11))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), dk, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 1), dv, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_flash"])
def test_cuda_operators_take_our_arguments(name: str) -> None:
    """Shapes and dtypes only, by torch's own rules for its operators: no kernel runs without a GPU."""
    kernel = backend(name, "cuda")
    q, k, v, dout = (x.to("meta") for x in tensors(torch.bfloat16, 8, 5, 5, 8))
    out, lse = kernel.forward_lse(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (2, 3, 8) and lse.dtype == torch.float32
    for found, like in zip(kernel.backward(dout, q, k, v, out, lse), (q, k, v), strict=True):
        assert found.shape == like.shape and found.dtype == like.dtype


@pytest.mark.parametrize("returns", ["out", "(out, None)"])
def test_a_flash_package_is_imported_when_chosen_and_called_on_our_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns: str
) -> None:
    code = f"def flash_attn_func(q, k, v):\n    out = q + k + v\n    return {returns}\n"
    (tmp_path / "flash_attn_interface.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    chosen = choose_backend("auto", "cuda", torch.bfloat16, 128, False, HOPPER)
    assert chosen.name == "flash3" and "flash_attn_interface" not in sys.modules
    q, k, v = tensors(torch.float32, 4, 4, 4)
    assert torch.equal(chosen.kernel("flash3")(q, k, v), q + k + v)
    assert choose_backend("auto", "cuda", torch.bfloat16, 128, True, HOPPER).name == "sdpa_cudnn"
    monkeypatch.delitem(sys.modules, "flash_attn_interface")


@pytest.mark.parametrize(
    ("gpu", "dtype", "need_lse", "name"),
    [
        (HOPPER, "bfloat16", False, "sdpa_cudnn"),
        (HOPPER, "bfloat16", True, "sdpa_cudnn"),
        (AMPERE, "bfloat16", False, "sdpa_flash"),
        (AMPERE, "bfloat16", True, "sdpa_flash"),
        (TURING, "float16", False, "sdpa"),
        (HOPPER, "float32", False, "sdpa"),
        (HOPPER, "float32", True, "math"),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int], dtype: str, need_lse: bool, name: str
) -> None:
    monkeypatch.setattr("megawan.models.attention._installed", lambda module: False)
    assert choose_backend("auto", "cuda", getattr(torch, dtype), 128, need_lse, gpu).name == name


def test_a_kernel_says_what_it_is() -> None:
    auto = select_attention("auto", "cpu", torch.float32, head_dim=16, need_lse=True)
    assert auto.describe() == "sdpa (auto): torch's flash attention for CPUs"
    assert (
        select_attention("math", "cpu", torch.float32, head_dim=16).describe().startswith("math: the formula")
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ("flash9", "cpu", torch.float32, 12, False, None),
            "attention 'flash9' is unknown; known: auto, flash3, flash4, sdpa_cudnn, flash2, sdpa_flash,"
            " sdpa, math; legal for float32 on cpu, head width 12: auto, sdpa, math",
        ),
        (
            ("flash3", "cpu", torch.float32, 12, False, HOPPER),
            "attention 'flash3' runs on cuda, not on cpu;"
            " legal for float32 on cpu, head width 12: auto, sdpa, math",
        ),
        (
            ("sdpa_cudnn", "cuda", torch.float32, 128, True, HOPPER),
            "attention 'sdpa_cudnn' takes bfloat16 or float16, not float32;"
            " legal for float32 on cuda, head width 128, with log-sum-exp: auto, math",
        ),
        (
            ("sdpa", "cuda", torch.bfloat16, 128, True, HOPPER),
            "attention 'sdpa' gives no log-sum-exp, which a ring and recompute attention or selective need;"
            " legal for bfloat16 on cuda, head width 128, with log-sum-exp: auto, sdpa_cudnn, sdpa_flash,"
            " math",
        ),
        (
            ("sdpa_cudnn", "cuda", torch.bfloat16, 192, False, HOPPER),
            "attention 'sdpa_cudnn' takes head widths that are multiples of 8 up to 128, not 192;"
            " legal for bfloat16 on cuda, head width 192: auto, sdpa_flash, sdpa, math",
        ),
        (
            ("flash3", "cuda", torch.bfloat16, 128, False, AMPERE),
            "attention 'flash3' runs on GPUs of compute capability 9.x, not 8.0;"
            " legal for bfloat16 on cuda, head width 128: auto, sdpa_cudnn, sdpa_flash, sdpa, math",
        ),
        (
            ("flash4", "cuda", torch.bfloat16, 128, False, HOPPER),
            "attention 'flash4' needs the Python module flash_attn.cute (pip install flash-attn-4);"
            " legal for bfloat16 on cuda, head width 128: auto, sdpa_cudnn, sdpa_flash, sdpa, math",
        ),
        (
            ("auto", "cuda", torch.bfloat16, 128, False, None),
            "attention 'auto' finds no kernel that fits; legal for bfloat16 on cuda, head width 128: none",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    monkeypatch: pytest.MonkeyPatch,
    wanted: tuple[str, str, torch.dtype, int, bool, tuple[int, int] | None],
    message: str,
) -> None:
    monkeypatch.setattr("megawan.models.attention._installed", lambda module: False)
    with pytest.raises(ValueError) as caught:
        choose_backend(*wanted)
    assert str(caught.value) == message


def test_a_missing_parent_package_is_not_an_error() -> None:
    with pytest.raises(ValueError, match="needs the Python module flash_attn.cute"):
        choose_backend("flash4", "cuda", torch.bfloat16, 128, False, HOPPER)


def test_the_written_backward_of_the_formula_is_its_gradient() -> None:
    """Its own backward, which the ring uses, is autograd's gradient of its own forward."""
    kernel = MathAttention("math")
    q, k, v, dout = tensors(torch.float64, 5, 6, 6, 5)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = kernel.forward_lse(*inputs)
    for found, wanted in zip(
        kernel.backward(dout, q, k, v, out.detach(), lse.detach()),
        torch.autograd.grad(out, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
