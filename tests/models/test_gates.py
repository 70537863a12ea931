"""The gate of a product that nobody keeps: its formula forward and backward, eager and as compiled."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megawan.models.gates import GATE_CODE, GateCode, gated_add, gated_linear
from megawan.models.precision import WIDENED_AT_ONCE, row_slices

TOKENS, IN, OUT, CLEAN = 20, 9, 6, 4


def drawn(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return x, h, weight, bias and gate; the gate's first number is 0."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((2, TOKENS, OUT), (2, TOKENS, IN), (OUT, IN), (OUT,), (2, rows, OUT))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[4][0, :, 0] = 0
    return tensors


def gradients(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def formula(rows: int, clean: int) -> Callable[..., Tensor]:
    row = (torch.arange(TOKENS) >= clean).long() * (rows - 1)
    return lambda x, h, weight, bias, gate: x + (h @ weight.t() + bias) * gate[:, row]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "clean"), [(1, 0), (2, CLEAN), (2, 0), (2, TOKENS)])
def test_a_gated_product_is_its_formula(rows: int, clean: int, compiled: bool, given: bool) -> None:
    """Also where a row has no tokens, and where a gate is closed: its gradient is not a quotient by it."""
    inputs = drawn(rows)
    product = inputs[1] @ inputs[2].t() + inputs[3] if given else None

    def ours(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return gated_linear(x, h, weight, bias, gate, clean, product=product)

    if compiled:
        ours = torch.compile(ours, backend="aot_eager", dynamic=False)
    found, wanted = gradients(ours, inputs), gradients(formula(rows, clean), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found[5][0, :, 0].abs().max() > 0.1


def test_a_weight_of_many_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager code takes the weight a few rows at a time."""
    whole = gradients(lambda *inputs: gated_linear(*inputs, 0), drawn(1))
    monkeypatch.setattr("megawan.models.precision.WIDENED_AT_ONCE", 4 * IN)
    sliced = gradients(lambda *inputs: gated_linear(*inputs, 0), drawn(1))
    torch.testing.assert_close(sliced, whole, rtol=1e-13, atol=1e-13)


def test_a_gpu_gets_fewer_and_longer_slices() -> None:
    """A launch takes as long as many numbers."""
    shape, rows = (5120, 13824), WIDENED_AT_ONCE // 13824
    assert [part.stop for part in row_slices(torch.empty(shape, device="meta"))][:2] == [1213, 2426]
    cached = row_slices(torch.empty(shape, dtype=torch.int8))
    assert cached[0] == slice(0, rows) and cached[-1].stop >= 5120 and len(cached) == -(-5120 // rows)


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_is_no_further_off_than_with_the_product_kept(
    compiled: bool, residual: torch.dtype
) -> None:
    """Against float64 on the same numbers; gates are float32 beside half-precision weights."""
    x, h, weight, bias, gate = drawn(2, torch.bfloat16)
    inputs = [x.to(residual), h, weight, bias, gate.float()]

    def ours(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return gated_linear(x, h, weight, bias, gate, CLEAN)

    def kept(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return gated_add(x, torch.nn.functional.linear(h, weight, bias), gate, CLEAN)

    if compiled:
        ours = torch.compile(ours, backend="aot_eager", dynamic=False)
    found, before = gradients(ours, inputs), gradients(kept, inputs)
    assert [y.dtype for y in found] == [y.dtype for y in before]
    exact = gradients(formula(2, CLEAN), [y.double() for y in inputs])
    # The same gradient arrives in both, drawn for the output's dtype.
    torch.testing.assert_close(found[:2], before[:2], rtol=0, atol=0)
    errors = [
        [float((y.double() - z).norm() / z.norm()) for y, z in zip(result[2:], exact[2:], strict=True)]
        for result in (found, before)
    ]
    assert max(errors[0]) < 2**-7
    assert all(a < 1.5 * b + 2**-9 for a, b in zip(*errors, strict=True)), errors


def test_what_nobody_reads_is_not_multiplied() -> None:
    whole = gradients(lambda *inputs: gated_linear(*inputs, 0), drawn(1))
    left_out = gradients(lambda *inputs: gated_linear(*inputs, 0, needed=False), drawn(1))
    assert all(torch.equal(a, b) for a, b in zip(left_out[1:], whole[1:], strict=True))
    with FlopCounterMode(display=False) as counted:
        gated_linear(*drawn(1), 0, needed=False)
    assert counted.get_total_flops() == 0


def test_compiled_code_runs_in_a_backward_pass_of_another_thread() -> None:
    """A GPU's backward pass has threads of its own, in which the backward code is compiled, while the forward
    code was compiled in the thread that called the model."""
    parts = GATE_CODE.forward, GATE_CODE.backward
    code = GateCode(*(torch.compile(part, backend="aot_eager", dynamic=False) for part in parts))
    inputs = [x.requires_grad_() for x in drawn(2)]
    out = gated_linear(*inputs, CLEAN, code=code)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(torch.autograd.grad, out, inputs, torch.ones_like(out)).result()
    wanted = torch.autograd.grad(formula(2, CLEAN)(*inputs), inputs, torch.ones_like(out))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
