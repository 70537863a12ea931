"""What a GPU would run, without one: its formulas on a CPU's numbers, its shapes and dtypes on no numbers.

Uncompiled, `precision.on_cpu` alone decides which formulas a block takes.
"""

import pytest
import torch
from torch import Tensor

from megawan import cost
from megawan.models import heads, precision
from megawan.models.attention import BACKENDS
from megawan.models.recompute import POLICIES
from megawan.models.wan import WanModel
from tests.models.peers import Inputs, random_model
from tests.models.test_wan import KINDS, inputs_for


@pytest.fixture(params=[False, True], ids=["gate by product", "gate by weight"], autouse=True)
def gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "GATE_BY_WEIGHT_TOKENS", 1 if request.param else 10**9)


def results(model: WanModel, inputs: Inputs) -> dict[str, Tensor]:
    """Return the velocity and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    out = inputs.ours(model)
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(out.device)
    (out - target).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    return {"": out.detach(), **grads}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (precision, heads):
        monkeypatch.setattr(module, "on_cpu", lambda x: False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_formulas_are_a_cpus_in_double(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(KINDS[kind], seed=1).double()
    inputs = inputs_for(kind).to(torch.float64)
    expected = results(model, inputs)
    on_a_gpu(monkeypatch)
    for name, value in results(model, inputs).items():
        bound = 1e-12 * float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=0, atol=bound, msg=name or "velocity")


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_formulas_lose_no_more_in_half_precision_than_a_cpus(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a bfloat16 model are the truth; float64 arithmetic over them gives what to reach."""
    half = random_model(KINDS[kind], seed=1).bfloat16()
    inputs = inputs_for(kind).to(torch.bfloat16)
    truth = WanModel(KINDS[kind]).double()
    truth.load_state_dict(half.state_dict())
    exact = results(truth, inputs.to(torch.float64))
    cpu = results(half, inputs)
    on_a_gpu(monkeypatch)
    gpu = results(half, inputs)
    for name in gpu:
        assert gpu[name].dtype == cpu[name].dtype
        assert distance(gpu, exact, name) <= 1.2 * distance(cpu, exact, name) + 0.001, name


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> float:
    """Return the relative error of a result."""
    return float((found[name].double() - exact[name]).norm() / exact[name].norm())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_off_the_cpu_leaves_nothing_on_it(kind: str, policy: str) -> None:
    """torch mixes the meta device with the CPU as little as CUDA, and has its CUDA operators' rules there."""
    kernel = next(each for each in BACKENDS if each.name == "sdpa_cudnn").kernel("")
    with torch.device("meta"):
        model = WanModel(KINDS[kind], attention=kernel, recompute=policy).bfloat16()
    found = results(model, inputs_for(kind).to(torch.bfloat16, "meta"))
    parameters = dict(model.named_parameters())
    assert found.pop("").dtype == torch.float32
    for name, grad in found.items():
        like = parameters[name]
        assert (grad.device.type, grad.dtype, grad.shape) == ("meta", torch.bfloat16, like.shape), name
