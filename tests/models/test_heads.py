"""The operations between matrix products are their formulas, forward and backward, eager and as compiled."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megawan.models import wan
from megawan.models.attention import select_attention
from megawan.models.gates import gated_add
from megawan.models.heads import RMSNorm, zero_sum
from megawan.models.precision import LayerNorm, TanhGELU, modulated_norm, token_sums
from megawan.models.recompute import Keep
from megawan.models.rope import RopeTables, rotate
from megawan.models.wan import CrossAttention

HEADS, WIDTH, TOKENS, EPS = 3, 8, 10, 1e-6
Rope = tuple[Tensor, Tensor]


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def rope_of(dtype: torch.dtype) -> Rope:
    return RopeTables(WIDTH).rows((2, 1, 5), 0, TOKENS, TOKENS, torch.device("cpu"), dtype)


def formula(x: Tensor, weight: Tensor, rope: Rope | None) -> Tensor:
    y = (x * weight / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).unflatten(-1, (HEADS, WIDTH))
    return y if rope is None else rotate(y, *rope)


def gradients(f: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_norm_and_rotation_are_the_formula(rotated: bool, compiled: bool) -> None:
    x, weight, grad = drawn((2, TOKENS, HEADS * WIDTH), (HEADS * WIDTH,), (2, HEADS, TOKENS, WIDTH))
    norm, rope = RMSNorm(HEADS * WIDTH, EPS).double(), rope_of(torch.float64) if rotated else None

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x, HEADS, rope))

    if compiled:  # takes other formulas; aot_eager runs them as they are
        ours = torch.compile(ours, backend="aot_eager", dynamic=False)
    grad = grad.transpose(1, 2)  # as attention gives it, heads outside
    wanted = gradients(lambda x, weight: formula(x, weight, rope), [x, weight], grad)
    strided = grad.movedim(-1, 0).contiguous().movedim(0, -1)
    odd = torch.cat((grad, grad[..., :1]), dim=-1)[..., :-1]
    for layout in (grad, strided, odd):
        found = gradients(ours, [x, weight], layout)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_modulation_and_gate_are_the_formulas(rows: int, compiled: bool) -> None:
    dim, clean = 6, 4
    x, y, grad, shift, scale = drawn(*[(2, TOKENS, dim)] * 3, *[(2, rows, dim)] * 2)
    row = (torch.arange(TOKENS) >= clean).long() * (rows - 1)

    def ours(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return gated_add(y, modulated_norm(x, shift, scale, EPS, clean, x.dtype), shift, clean)

    def wanted(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
        return y + (norm * (1 + scale[:, row]) + shift[:, row]) * shift[:, row]

    if compiled:
        ours = torch.compile(ours, backend="aot_eager", dynamic=False)
    inputs = [x, y, shift, scale]
    torch.testing.assert_close(
        gradients(ours, inputs, grad), gradients(wanted, inputs, grad), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("weights", "tokens", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 2**-6),
        (torch.bfloat16, torch.float32, 2**-6),
    ],
)
def test_the_affine_norm_is_its_formula(
    weights: torch.dtype, tokens: torch.dtype, tolerance: float, compiled: bool
) -> None:
    """Under half-precision weights beside a residual stream of either width."""
    dim = 6
    weight, shift, grad = drawn((dim,), (dim,), (2, TOKENS, dim), dtype=weights)
    (x,) = drawn((2, TOKENS, dim), dtype=tokens)
    norm = LayerNorm(dim, EPS)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    def wanted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt() * weight + bias

    if compiled:
        ours = torch.compile(ours, backend="aot_eager", dynamic=False)
    found = gradients(ours, [x, weight, shift], grad)
    assert [y.dtype for y in found] == [weights, tokens, weights, weights]
    exact = gradients(wanted, [y.double() for y in (x, weight, shift)], grad.double())
    torch.testing.assert_close([y.double() for y in found], exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [0, 1, 17, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_are_summed_in_stages_and_rounded_once(dtype: torch.dtype, length: int) -> None:
    """Whole numbers, whose sums are exact before that rounding."""
    x = torch.randint(-250, 250, (2, length, 5), generator=torch.Generator().manual_seed(length)).to(dtype)
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    found = torch.compile(token_sums, backend=note, dynamic=False)(x)
    assert found.dtype == dtype
    assert torch.equal(found, x.double().sum(1).to(dtype)) and torch.equal(token_sums(x), found)
    sums = sum(node.target == "sum" for node in graphs[0].graph.nodes)
    assert sums == (2 if length in (0, 48) else 1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-7)])
def test_gelu_is_its_tanh_form(dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    """Also far from 0, where one form of it would overflow and the other cancel."""
    activation: Callable[..., Tensor] = TanhGELU()
    if compiled:
        activation = torch.compile(activation, backend="aot_eager", dynamic=False)
    x = torch.cat((torch.linspace(-12, 12, 2001), torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4]))).to(dtype)
    (grad,) = drawn((2006,), dtype=dtype)

    def wanted(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    found = gradients(activation, [x], grad)
    assert {tensor.dtype for tensor in found} == {dtype}
    exact = gradients(wanted, [x.double()], grad.double())
    torch.testing.assert_close([y.double() for y in found], exact, rtol=tolerance, atol=tolerance)


def test_half_precision_is_rounded_once() -> None:
    """float32 arithmetic on the same numbers, rounded at the end: at most one unit in the last place away,
    where the two sums stand on either side of a boundary."""
    half = torch.bfloat16
    x, grad = drawn((1, TOKENS, HEADS * WIDTH), (1, TOKENS, HEADS * WIDTH), dtype=half)
    shift, scale = drawn((1, 1, HEADS * WIDTH), (1, 1, HEADS * WIDTH), dtype=torch.float32)
    norm, rope = RMSNorm(HEADS * WIDTH, EPS), rope_of(torch.float32)
    for f, dtype in (
        (lambda x, s, t: modulated_norm(x, s, t, EPS, 0, x.dtype), torch.float32),
        (lambda x, s, t: gated_add(x, x, s + t, 0), torch.float32),
        (lambda x, s, t: norm(x, HEADS, rope).flatten(-2) + 0 * (s + t).to(x.dtype), torch.float32),
    ):
        found = gradients(f, [x, shift, scale], grad)
        wanted = gradients(f, [x.to(dtype), shift, scale], grad.to(dtype))
        assert found[0].dtype == found[1].dtype == half
        torch.testing.assert_close(found[0].float(), wanted[0].to(half).float(), rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(found[1].float(), wanted[1].to(half).float(), rtol=2**-6, atol=2**-7)
        torch.testing.assert_close(found[2:], wanted[2:], rtol=2**-7, atol=2**-5)


def test_gradients_of_an_attentions_keys_sum_to_zero() -> None:
    k, grad = drawn((2, 7, HEADS, WIDTH), (2, 7, HEADS, WIDTH), dtype=torch.float32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = grad.to(dtype)
        same, found = gradients(zero_sum, [k.to(dtype)], rounded)
        assert torch.equal(same, k.to(dtype)) and found.dtype == dtype
        wanted = rounded.double() - rounded.double().mean(1, keepdim=True)
        torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_bias_before_the_keys_norm_does_not_collect_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is what is left of terms that all but cancel. Without `zero_sum` it is 3 times as far from
    float64's."""

    def error(seed: int) -> float:
        """Return the relative error of the gradients of the key's biases in float32, geometric mean."""
        generator = torch.Generator().manual_seed(seed)
        whole = CrossAttention(96, 4, EPS, image=True)
        with torch.no_grad():
            for parameter in whole.parameters():
                scale = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                if parameter.ndim == 1:
                    parameter.mul_(0.05).add_(1.0)
        sizes = ((2, 45, 96), (2, 40, 96), (2, 60, 96), (2, 45, 96))
        inputs = [torch.randn(size, generator=generator) for size in sizes]
        found: list[list[Tensor]] = []
        for dtype in (torch.float64, torch.float32):
            module = CrossAttention(96, 4, EPS, image=True).to(dtype)
            module.load_state_dict(whole.state_dict())
            x, text, image, grad = (value.to(dtype) for value in inputs)
            kernel = select_attention("auto", "cpu", dtype, head_dim=24)
            biases = [module.k.bias, module.k_img.bias]
            found.append(list(torch.autograd.grad(module(x, text, image, kernel, Keep()), biases, grad)))
        exact, single = found
        both = [float((s - e).norm() / e.norm()) for s, e in zip(single, exact, strict=True)]
        return math.sqrt(both[0] * both[1])

    ours = [error(seed) for seed in range(12)]
    monkeypatch.setattr(wan, "zero_sum", lambda k: k)
    without = [error(seed) for seed in range(12)]
    assert math.prod(a / b for a, b in zip(ours, without, strict=True)) ** (1 / 12) < 0.5
