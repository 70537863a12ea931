"""Recompute policies: no number changes; bytes kept, products repeated and bytes sent are counted."""

import dataclasses
import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megawan import cost
from megawan.models import recompute
from megawan.models.attention import MathAttention, PackageAttention, select_attention
from megawan.models.recompute import Keep, parse_recompute
from megawan.models.rope import RopeTables
from megawan.models.variants import WanConfig, get_variant
from megawan.models.wan import TokenLayout, WanBlock, WanModel
from megawan.parallel.context import ContextParallel
from megawan.parallel.kept import row_stand_in
from megawan.plan import model_shape
from tests.distributed import ROOT, run_distributed
from tests.models.activations import kept_bytes
from tests.models.peers import TINY, Inputs, random_inputs, random_model

replace = dataclasses.replace
CLIPPED = replace(TINY, model_type="i2v", in_dim=36, image_dim=32)
KINDS: dict[str, WanConfig] = {
    "t2v": TINY,
    "i2v": CLIPPED,
    "ti2v": replace(TINY, model_type="ti2v", in_dim=48, out_dim=48),
    "vace": replace(TINY, model_type="vace", num_layers=4, vace_layers=(0, 2), vace_in_dim=8),
}
MIXED = "full:1,attention:1,selective:1"
EVERY = (*recompute.POLICIES, MIXED, "attention:3,selective", "selective:2", "none:1,full")

# The proportions of Wan 1.3B, an eighth as wide; hidden vectors are bfloat16.
WIDE = WanConfig(dim=192, ffn_dim=1120, num_heads=3, num_layers=1)
VECTOR = 2 * WIDE.dim
LIMITS = {"none": 36.0, "selective": 16.0, "attention": 2.2, "full": 1.1}
LONG_LIMITS = {"none": 27.0, "selective": 15.0, "attention": 2.1, "full": 1.1}
"""From `cost.GATE_BY_WEIGHT_TOKENS`."""
LONG = (4, 32, 32)  # a latent of 1,024 tokens


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The bytes that are counted here hold no buffers of other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- no number changes ---


def gradients(
    config: WanConfig,
    policy: str,
    *,
    offload: bool = False,
    compiled: bool = False,
    latent: tuple[int, int, int] = (3, 6, 10),
) -> dict[str, Tensor]:
    """Return the output and the gradient of every parameter."""
    weights = random_model(config, seed=1).state_dict()
    model = WanModel(config, recompute=policy, offload=offload, compiled=compiled)
    model.load_state_dict(weights)
    clean = int(config.model_type == "ti2v")
    out = random_inputs(config, batch=2, latent=latent, seed=2, clean_frames=clean).ours(model)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return {"": out.detach(), **{name: gradient for name, gradient in found.items() if gradient is not None}}


@pytest.mark.parametrize(
    ("latent", "policies", "offloads"),
    [((3, 6, 10), EVERY[1:], (False, True)), (LONG, ("selective", "attention", MIXED), (False,))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_changes_a_bit(
    kind: str, latent: tuple[int, int, int], policies: tuple[str, ...], offloads: tuple[bool, ...]
) -> None:
    config = replace(KINDS[kind], num_layers=4)
    reference = gradients(config, "none", latent=latent)
    for policy in policies:
        for offload in offloads:
            found = gradients(config, policy, offload=offload, latent=latent)
            assert not [name for name in reference if not torch.equal(found[name], reference[name])], policy


def test_the_gates_of_a_long_video_take_the_same_gradients() -> None:
    """By the weights' gradients as by the products that a shorter video would keep."""
    config = replace(KINDS["ti2v"], num_layers=2)
    found = gradients(config, "none", latent=LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "GATE_BY_WEIGHT_TOKENS", 1025)
        reference = gradients(config, "none", latent=LONG)
    assert torch.equal(found[""], reference[""])
    assert any(not torch.equal(found[name], reference[name]) for name in reference)
    for name, wanted in reference.items():
        assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_compiled_blocks_agree_under_every_policy() -> None:
    config = replace(KINDS["ti2v"], num_layers=1)
    reference = gradients(config, "none")
    for policy in recompute.POLICIES:
        found = gradients(config, policy, compiled=True)
        for name, wanted in reference.items():
            assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (policy, name)


def test_a_compiled_linear_layer_has_torchs_gradients() -> None:
    layer = nn.Linear(7, 5).double()
    x, grad = torch.randn(2, 48, 7).double(), torch.randn(2, 48, 5).double()
    found = []
    for linear in (Keep().linear, torch.compile(Keep().linear, backend="aot_eager", dynamic=False)):
        tokens = x.clone().requires_grad_()
        y = linear(layer, tokens)
        found.append((y.detach(), *torch.autograd.grad(y, (tokens, layer.weight, layer.bias), grad)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_recomputes_again() -> None:
    for policy in ("full", "attention", "selective"):
        model = random_model(replace(TINY, num_layers=2), seed=1, recompute=policy)
        out = random_inputs(TINY, batch=1, latent=(1, 4, 4), seed=2).ours(model).square().sum()
        weight = model.blocks[0].self_attn.q.weight
        (first,) = torch.autograd.grad(out, weight, retain_graph=True)
        (second,) = torch.autograd.grad(out, weight)
        assert torch.equal(first, second) and first.abs().max() > 0


def test_nothing_is_kept_where_no_gradient_is_asked() -> None:
    model = random_model(TINY, seed=1, recompute="attention")
    with torch.no_grad():
        assert (
            kept_bytes(model, lambda: random_inputs(TINY, batch=1, latent=(1, 4, 4), seed=2).ours(model)) == 0
        )


# --- bytes kept ---


class OneBlock:
    """A bfloat16 block with a video of `tokens` tokens."""

    def __init__(self, config: WanConfig, policy: str, tokens: int) -> None:
        self.block = WanBlock(config).bfloat16()
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.02)
            parameter.grad = torch.zeros_like(parameter)
        kernel = select_attention("auto", "cpu", torch.bfloat16, head_dim=config.head_dim, need_lse=True)
        self.rope = RopeTables(config.head_dim).rows(
            (1, 1, tokens), 0, tokens, tokens, torch.device("cpu"), torch.float32
        )
        self.layout = TokenLayout(tokens, 0, self.rope, ContextParallel.single(), kernel)
        self.text = torch.randn(1, config.text_len, config.dim).bfloat16().requires_grad_()
        self.e0 = torch.randn(1, 1, 6, config.dim, requires_grad=True)
        self.x = torch.randn(1, tokens, config.dim).bfloat16().requires_grad_()
        self.recompute = parse_recompute(policy, 1)

    def forward(self) -> Tensor:
        out: Tensor = self.recompute.run(0, self.block, self.x, self.text, None, self.e0, self.layout)
        return out

    def counted(self) -> int:
        """Return what autograd's hooks and the slots hold after a forward pass."""
        tables = sum(table.untyped_storage().nbytes() for table in self.rope)
        return kept_bytes(self.block, self.forward) - (tables if self.recompute.policies == ("none",) else 0)

    def held(self) -> int:
        """Return what a forward pass allocates and does not free, its output included."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
            out = self.forward()
        del out
        return sum(allocated(allocations))

    def peak(self) -> int:
        """Return the most that a backward pass holds beyond what was held before it."""
        out = self.forward()
        gradient = torch.ones_like(out)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
            out.backward(gradient)
        return max(itertools.accumulate(allocated(allocations)))


def allocated(allocations: profile) -> list[int]:
    """Return the bytes of each allocation, negative for a release, in time's order.

    Without what is given back before another operator begins: nothing but the operator that took it can have
    used it, such as a product's scratch, whose size the library chooses by the processor.
    """
    assert allocations.profiler is not None and allocations.profiler.kineto_results is not None
    events = allocations.profiler.kineto_results.events()
    found, last = list[int](), 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        size = event.nbytes() if event.name() == "[memory]" else 0
        if size < 0 and size == -last:
            found.pop()
            size = 0
        elif size:
            found.append(size)
        last = size
    return found


@pytest.mark.parametrize("policy", recompute.POLICIES)
@pytest.mark.parametrize(("sizes", "limits"), [((64, 128), LIMITS), ((1024, 1088), LONG_LIMITS)])
def test_bytes_kept_for_a_token_and_layer(
    sizes: tuple[int, int], limits: dict[str, float], policy: str
) -> None:
    """The text's share is constant, so that the difference of two lengths is what a token costs."""
    few, many = (OneBlock(WIDE, policy, tokens) for tokens in sizes)
    token = (many.counted() - few.counted()) / 64
    assert token <= limits[policy] * VECTOR
    # The allocator counts the output and not the input, which are one vector each.
    held = many.held()
    assert (held - few.held()) / 64 == pytest.approx(token, rel=1e-3)
    formula = [cost.activation_bytes(model_shape(WIDE), tokens, policy) for tokens in sizes]
    assert token == pytest.approx((formula[1] - formula[0]) / 64, rel=5e-3)
    assert held == pytest.approx(formula[1], rel=0.02)


@pytest.mark.parametrize("policy", ["selective", "attention", "full"])
@pytest.mark.parametrize("sizes", [(256, 512), (1024, 1536)])
def test_bytes_at_work_in_a_recomputed_block(
    sizes: tuple[int, int], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula is an upper bound, and no more than a tenth above."""
    # The slices of a weight at its gate: nothing beside a real video, much beside these few tokens.
    monkeypatch.setattr("megawan.models.precision.WIDENED_AT_ONCE", 1 << 14)
    few, many = (OneBlock(WIDE, policy, tokens).peak() for tokens in sizes)
    formula = [
        cost.block_working_bytes(model_shape(WIDE), tokens, policy, bytes_per_element=2) for tokens in sizes
    ]
    assert 0.9 * (formula[1] - formula[0]) < many - few <= formula[1] - formula[0]


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_a_finished_block_leaves_nothing_behind(policy: str) -> None:
    """A deeper model's peak is higher by what the blocks keep, not by what they hold at work."""
    peaks = []
    for layers in (2, 6):
        config = WanConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=layers, text_dim=32, text_len=16)
        model = random_model(config, seed=1, recompute=policy)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for height in (32, 64):
            inputs = random_inputs(config, batch=1, latent=(4, height, 32), seed=1)
            gc.collect()  # of what others left, nothing is to be freed in between
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
                model(inputs.latents, inputs.timestep, inputs.text).sum().backward()
            peaks.append(max(itertools.accumulate(allocated(allocations))))
    shallow, deep = peaks[1] - peaks[0], peaks[3] - peaks[2]
    vectors = (deep - shallow) / (4 * 16 * 16 * 4) / (4 * 256)  # of each of 1,024 more tokens and 4 blocks
    assert vectors < LIMITS[policy] + 0.5


@pytest.mark.parametrize("name", ["debug", "debug-i2v", "debug-vace"])
def test_bytes_kept_by_the_other_models(name: str) -> None:
    """Image branch and control blocks too: what eight blocks keep more than four."""
    config = replace(get_variant(name).config, dim=384, ffn_dim=1024, num_heads=6)
    deep = replace(config, num_layers=8, vace_layers=(0, 2, 4, 6) if config.vace_layers else ())
    config = replace(deep, num_layers=4, vace_layers=deep.vace_layers[:2])
    inputs = random_inputs(deep, batch=1, latent=(3, 16, 16), seed=1)
    for policy in recompute.POLICIES:
        kept = []
        for each in (config, deep):
            model = WanModel(each, recompute=policy)
            kept.append(kept_bytes(model, lambda model=model: inputs.ours(model)))
        formula = cost.activation_bytes(model_shape(config), 192, policy, bytes_per_element=4)
        assert kept[1] - kept[0] == pytest.approx(formula, rel=0.02), policy


def test_offloaded_activations_are_what_a_policy_keeps() -> None:
    """On a CPU too the parked copies are other memory."""
    parked: list[Tensor] = []
    park = recompute.park

    def noted(x: Tensor) -> tuple[Tensor, torch.device]:
        held = park(x)
        assert held[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        parked.append(held[0])
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "park", noted)
        gradients(replace(TINY, num_layers=3), "attention", offload=True)
    # x, the attention's output and its log-sum-exp, of each block.
    assert [tuple(x.shape) for x in parked] == [(2, 45, 48), (2, 45, 2, 24), (2, 2, 45)] * 3


# --- products repeated ---


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def attention_backward_flops(dout: tuple[int, ...], q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(dout, q, k, v))


CPU_ATTENTION: dict[Any, Any] = {  # torch counts this kernel as nothing
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(config: WanConfig, policy: str, inputs: Inputs) -> tuple[int, int]:
    """Return the FLOPs of forward and of backward with whatever it recomputes."""
    model = random_model(config, seed=1, recompute=policy)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as forward:
        out = inputs.ours(model)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    ("name", "latent", "tokens"),
    [
        *((name, (3, 8, 6), 36) for name in ("debug", "debug-i2v", "debug-vace")),
        *((name, LONG, 1024) for name in ("debug", "debug-vace")),
    ],
)
def test_flops_of_every_policy(name: str, latent: tuple[int, int, int], tokens: int) -> None:
    config = get_variant(name).config
    inputs = random_inputs(config, batch=1, latent=latent, seed=1)
    shape = model_shape(config)
    backward = cost.backward_flops(shape, tokens)
    for policy in ("none", "selective", "attention", "full", "full:1", "attention:2"):
        kind, _, layers = policy.partition(":")
        found = count_flops(config, policy, inputs)
        repeated = cost.recompute_flops(shape, tokens, kind, int(layers) if layers else None)
        assert found[0] == cost.forward_flops(shape, tokens), policy
        assert found[1] == backward + repeated, policy


# --- over ranks ---


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_distributed("tests.models.recompute_workers:everything", 4, timeout=280)


def test_no_layout_changes_a_recomputed_number(four: list[dict[str, Any]]) -> None:
    for rank in four:
        cases = {name: errors for part in rank["parity"] for name, errors in part.items()}
        assert len(cases) == 4 * 2 * 3
        assert not [(name, errors) for name, errors in cases.items() if not max(errors) < 1e-11]


def test_bytes_on_the_wire_of_every_policy(four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert len(rank["wire"]) == 3 * 4 * 2
        for found in rank["wire"]:
            assert found["forward"] == found["forward_formula"] > 0, found["name"]
            assert found["backward"] == found["backward_formula"] > 0, found["name"]


def test_kernels_run_once_where_their_result_is_kept(four: list[dict[str, Any]]) -> None:
    """A block has a cross-attention kernel and as many self-attention kernels as its ring has blocks."""
    for rank in four:
        for found in rank["wire"]:
            policy, ring = found["name"].split()[0], int(found["name"].split()[2].strip(")"))
            repeated = {"none": 0, "selective": 0, "attention": 1, "full": 1 + ring}[policy]
            assert found["kernels"] == 1 + ring + repeated, found["name"]


def test_kept_bytes_divide_by_the_ranks(four: list[dict[str, Any]]) -> None:
    for rank in four:
        for found in rank["kept"]:
            assert found["here"] == pytest.approx(found["formula"], rel=0.02), found["name"]
            if found["policy"] in ("full", "attention"):
                assert found["here"] * 4 == pytest.approx(found["single"], rel=0.05), found["name"]


SHARDED = {
    f"{policy} {' '.join(more)}": ["--parallel.ulysses_degree", "2", "--model.recompute", policy, *more]
    for policy, more in (
        ("none", ()),
        ("full", ()),
        ("attention", ("--model.offload_activations",)),
        ("selective", ()),
        ("full:1,selective", ("--model.offload_activations",)),
        ("none", ("--model.compile",)),
        ("full", ("--model.compile",)),
        ("attention", ("--model.compile",)),
        ("selective", ("--model.compile", "--model.offload_activations")),
    )
}


LONG_VIDEO = ["--data.num_frames", "13", "--data.height", "256", "--data.width", "256"]  # 1,024 tokens
LONG_SHARDED = {
    name: ["--parallel.ulysses_degree", "2", *LONG_VIDEO, *more]
    for name, more in {
        "long, none": (),
        "long, selective": ("--model.recompute", "selective"),
        "long, attention, compiled": ("--model.recompute", "attention", "--model.compile"),
    }.items()
}


def crowded(stage: int, folder: Path) -> list[str]:
    """Return flags under which the time projection outgrows the bucket of gradients, as that of 14B does."""
    settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text("utf-8"))
    settings["zero_optimization"]["reduce_bucket_size"] = 80_000  # of 124,416
    (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    return ["--parallel.ulysses_degree", "2", "--deepspeed", str(folder / f"zero{stage}.json")]


def test_zero_trains_alike_under_every_policy_compiled_or_not(tmp_path: Path) -> None:
    """Those of a long video too, whose gates read the weights of layers that DeepSpeed gathers."""
    cases = {
        **SHARDED,
        **LONG_SHARDED,
        **{f"small bucket, stage {stage}": crowded(stage, tmp_path) for stage in (1, 2, 3)},
    }
    ranks = run_distributed(
        "tests.models.recompute_workers:sharded", 2, arguments={"cases": cases}, timeout=290
    )
    for rank in ranks:
        assert len(rank) == len(cases)
        for name, found in rank.items():
            losses, norms = rank["long, none" if name in LONG_SHARDED else "none "]
            assert losses[0] != losses[1] and min(norms) > 0
            assert found[0] == pytest.approx(losses, rel=1e-5), name
            assert found[1] == pytest.approx(norms, rel=1e-5), name


# --- errors ---


def test_the_stand_in_has_the_wanted_row_sums() -> None:
    dout = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    dout[0, 0], dout[1, 1] = 0, 1e-200
    row = torch.randn(2, 5, 3, 1, dtype=torch.float64) * dout.norm(dim=-1, keepdim=True)
    found = row_stand_in(dout, row)
    torch.testing.assert_close((dout * found).sum(-1, keepdim=True), row, rtol=1e-12, atol=1e-199)
    assert found.isfinite().all()


@pytest.mark.parametrize("policy", recompute.POLICIES)
def test_a_model_that_chooses_its_kernel_asks_for_what_its_policy_needs(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs the fastest kernel may have no log-sum-exp."""
    asked: list[bool] = []

    def noted(*words: Any, need_lse: bool = False, **more: Any) -> Any:
        asked.append(need_lse)
        return select_attention(*words, need_lse=need_lse, **more)

    monkeypatch.setattr("megawan.models.wan.select_attention", noted)
    model = random_model(TINY, seed=1, recompute=policy)
    random_inputs(TINY, batch=1, latent=(1, 4, 4), seed=2).ours(model)
    assert asked == [policy in ("attention", "selective")]
    model._kernel(torch.device("cpu"), torch.float32, ring=True)
    assert asked[-1]


@pytest.mark.parametrize("policy", ["attention", "selective"])
def test_a_kernel_without_log_sum_exp_is_refused(policy: str) -> None:
    math = MathAttention("math")
    model = WanModel(TINY, attention=PackageAttention("package", math), recompute=policy)
    with pytest.raises(ValueError, match="keeping an attention's result needs a kernel with forward_lse"):
        random_inputs(TINY, batch=1, latent=(1, 4, 4), seed=2).ours(model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "full:",
        "full:7",
        "full:-1",
        "full:1.0",
        "half",
        "full:²",
        "FULL",
        "full,none",
        "full:4,none:3",
        ",",
    ],
)
def test_an_unknown_policy_is_answered_with_the_legal_ones(text: str) -> None:
    with pytest.raises(ValueError, match="legal: none, selective, attention, full, each also as full:K"):
        parse_recompute(text, 6)


def test_policies_are_spread_in_order() -> None:
    assert parse_recompute("full:2,attention:1", 5).policies == ("full", "full", "attention", "none", "none")
    assert parse_recompute("full:2,selective", 4).split == [("full", 2), ("selective", 2)]
    assert parse_recompute("none:1,full", 3).ranges == [("none", 0, 1), ("full", 1, 3)]
    assert parse_recompute("full:0", 2).policies == ("none", "none")
    with pytest.raises(ValueError, match="offloading what is kept needs selective, attention or full"):
        parse_recompute("full:0", 2, offload=True)
    assert not parse_recompute("full", 2).needs_lse and parse_recompute("attention:1,full", 2).needs_lse
    assert Keep().cross_attention(torch.ones(1), torch.ones(1), torch.ones(1), lambda q, k, v: v).item() == 1
