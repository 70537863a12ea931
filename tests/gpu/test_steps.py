"""A model's steps on a real GPU: the numbers of the CPU, whatever is recomputed or compiled."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megawan import cost
from megawan.models.attention import select_attention
from megawan.models.recompute import POLICIES
from megawan.models.variants import get_variant
from megawan.models.wan import WanModel
from tests.models.peers import random_model
from tests.models.test_gpu_formulas import distance, results
from tests.models.test_wan import KINDS, inputs_for

pytestmark = pytest.mark.gpu


def on_gpu(kind: str, source: WanModel, policy: str, compiled: bool, name: str) -> dict[str, Tensor]:
    """Return the velocity and the gradient of every parameter, on the CPU."""
    dtype = source.patch_embedding.weight.dtype
    width = KINDS[kind].head_dim
    need_lse = policy in ("selective", "attention")
    kernel = select_attention(name, "cuda", dtype, head_dim=width, need_lse=need_lse)
    model = WanModel(KINDS[kind], attention=kernel, recompute=policy, compiled=compiled).to("cuda", dtype)
    model.load_state_dict(source.state_dict())
    found = results(model, inputs_for(kind).to(dtype, "cuda"))
    return {name: value.cpu() for name, value in found.items()}


def check_in_double(kind: str, policy: str, compiled: bool) -> None:
    """Compare a GPU's velocity and gradients with the CPU's, of the same float64 model."""
    source = random_model(KINDS[kind], seed=1).double()
    expected = results(source, inputs_for(kind).to(torch.float64))
    found = on_gpu(kind, source, policy, compiled, "math")
    shapes, wanted = ({name: (x.shape, x.dtype) for name, x in each.items()} for each in (found, expected))
    assert shapes == wanted
    errors = {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in expected.items()}
    assert not {name: error for name, error in errors.items() if not error <= 1e-11}


@pytest.mark.parametrize("gate", [1, 10**9], ids=["gate by weight", "gate by product"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_double_a_gpus_step_is_a_cpus(
    kind: str, policy: str, gate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "GATE_BY_WEIGHT_TOKENS", gate)
    check_in_double(kind, policy, compiled=False)


@pytest.mark.parametrize(("kind", "policy"), [("t2v", "none"), ("ti2v", "selective"), ("vace", "attention")])
@pytest.mark.timeout(600)
def test_in_double_a_compiled_step_is_a_cpus(kind: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "GATE_BY_WEIGHT_TOKENS", 1)
    check_in_double(kind, policy, compiled=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", ["none", "selective"])
@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
@pytest.mark.timeout(600)
def test_in_half_precision_a_gpu_loses_no_more_than_a_cpu(
    kind: str, policy: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 arithmetic over the same bfloat16 weights is the truth. Fused attention rounds its weights."""
    monkeypatch.setattr(cost, "GATE_BY_WEIGHT_TOKENS", 1)
    half = random_model(KINDS[kind], seed=1).bfloat16()
    truth = WanModel(KINDS[kind]).double()
    truth.load_state_dict(half.state_dict())
    exact = results(truth, inputs_for(kind).to(torch.float64))
    cpu = results(half, inputs_for(kind).to(torch.bfloat16))
    gpu = on_gpu(kind, half, policy, compiled, "auto")
    assert {name: value.dtype for name, value in gpu.items()} == {k: v.dtype for k, v in cpu.items()}
    errors = {name: (distance(gpu, exact, name), distance(cpu, exact, name)) for name in gpu}
    assert not {name: both for name, both in errors.items() if both[0] > 1.5 * both[1] + 0.002}


def requested() -> int:
    """Return the bytes that live tensors asked for; `memory_allocated` adds up to 1 MiB to each, the rest of
    the cached block that it was given."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_keeps_what_the_plan_counts(policy: str) -> None:
    """Bytes that a GPU holds between forward and backward, a block, against cost.py's vectors."""
    config = get_variant("t2v-1.3B").config
    tokens = 8 * 16 * 16

    def held(layers: int) -> int:
        kernel = select_attention("auto", "cuda", torch.bfloat16, head_dim=config.head_dim, need_lse=True)
        model = WanModel(replace(config, num_layers=layers), attention=kernel, recompute=policy).to(
            "cuda", torch.bfloat16
        )
        x = torch.randn(1, 16, 8, 32, 32, device="cuda", dtype=torch.bfloat16)
        text = torch.randn(1, 512, config.text_dim, device="cuda", dtype=torch.bfloat16)
        gc.collect()
        model(x, torch.tensor([500.0], device="cuda"), text).sum().backward()  # workspaces
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = requested()
        out = model(x, torch.tensor([500.0], device="cuda"), text)
        torch.cuda.synchronize()
        kept = requested() - before
        del out
        return kept

    block = (held(4) - held(2)) / 2
    vectors = block / (2 * config.dim * tokens)
    limits = {"none": 28.5, "selective": 16.5, "attention": 2.4, "full": 1.3}
    assert limits[policy] - 1.5 < vectors <= limits[policy]
