"""What the forward promises beside parity: precision, layouts of tokens, one class of code for one rank and
many."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megawan.models.gates import gated_add
from megawan.models.initial import InitialWeights, initial_tensor, initialise_
from megawan.models.precision import WIDENED_AT_ONCE, WideLinear, modulated_norm
from megawan.models.variants import VARIANTS, WanConfig, get_variant
from megawan.models.wan import (
    WanModel,
    patchify,
    timestep_embedding,
    token_grid,
    unpatchify,
)
from tests.models.peers import TINY, Inputs, random_inputs, random_model

replace = dataclasses.replace
TI2V = replace(TINY, model_type="ti2v", in_dim=48, out_dim=48)
KINDS = {
    "t2v": TINY,
    "ti2v": TI2V,
    "flf2v": replace(TINY, model_type="flf2v", in_dim=36, image_dim=64, pos_embed_seq_len=514),
    "vace": replace(TINY, model_type="vace", num_layers=3, vace_layers=(0, 2), vace_in_dim=20),
}


def inputs_for(kind: str, batch: int = 2) -> Inputs:
    return random_inputs(KINDS[kind], batch=batch, latent=(3, 4, 6), seed=2, clean_frames=int(kind == "ti2v"))


class Produced(TorchDispatchMode):
    """Collects (dtype, numbers) of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[torch.dtype, int, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.tensors.append((leaf.dtype, leaf.numel(), str(func)))
        return out


# --- tokens ---


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_unpatchify_inverts_patchify(patch: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    tokens = patchify(x, patch)
    assert tokens.shape == (2, math.prod(token_grid(x.shape, patch)), 3 * math.prod(patch))
    assert torch.equal(unpatchify(tokens, token_grid(x.shape, patch), patch), x)


def test_tokens_run_over_frames_rows_columns_with_channels_fastest() -> None:
    x = torch.arange(5 * 2 * 4 * 6).view(1, 5, 2, 4, 6)
    tokens = patchify(x, (1, 2, 2))
    f, h, w, c, ph, pw = 1, 1, 2, 3, 1, 0
    assert tokens[0, (f * 2 + h) * 3 + w, (ph * 2 + pw) * 5 + c] == x[0, c, f, 2 * h + ph, 2 * w + pw]


@pytest.mark.parametrize("shape", [(1, 16, 3, 5, 6), (1, 16, 3, 4, 7), (1, 16, 0, 4, 4), (4, 4)])
def test_a_latent_that_the_patch_does_not_divide_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of the patch"):
        token_grid(shape, (1, 2, 2))


def test_timestep_sinusoid_values() -> None:
    out = timestep_embedding(torch.tensor([0.0, 1.0, 500.0, 1000.0]), 256)
    assert out.dtype == torch.float64
    assert out.sum(1).tolist() == pytest.approx([128.0, 138.0029943, 57.5470244, 50.964733], abs=1e-6)
    assert out[2, [0, 127, 128, 255]].tolist() == pytest.approx(
        [-0.8838493, 0.998556870, -0.4677718, 0.053704542], abs=1e-7
    )


# --- precision ---


@pytest.mark.parametrize("kind", KINDS)
def test_float64_agrees_with_float32_and_is_float64_throughout(kind: str) -> None:
    model, inputs = random_model(KINDS[kind], seed=1), inputs_for(kind)
    single = inputs.ours(model)
    with Produced() as produced:
        double = inputs.to(torch.float64).ours(model.double())
        double.mean().backward()
    assert (single - double).abs().max() < 5e-5
    narrow = {
        name for dtype, size, name in produced.tensors if dtype.is_floating_point and dtype != torch.float64
    }
    assert not narrow


def test_half_precision_keeps_its_islands_in_float32() -> None:
    model, inputs = random_model(TINY, seed=1), inputs_for("t2v", batch=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        reference = inputs.ours(model)
        model.bfloat16()
        out = inputs.ours(model)
        model.wide_residual = True
        wide = inputs.ours(model)
        # Timesteps that bfloat16 cannot tell apart (both round to 1000) stay apart.
        near = replace(inputs, timestep=torch.tensor([999.0])).ours(model)
        top = replace(inputs, timestep=torch.tensor([1000.0])).ours(model)
    assert out.dtype == wide.dtype == torch.float32
    assert (out - reference).abs().mean() < 0.03 * reference.abs().mean()
    assert (wide - reference).abs().mean() < (out - reference).abs().mean()
    assert (near - top).abs().mean() > 1e-3
    # No number of the output was rounded to bfloat16 on its way out.
    assert not torch.equal(out, out.bfloat16().float())


def test_gradients_in_half_precision_point_where_float32_points() -> None:
    model, inputs = random_model(TINY, seed=1), inputs_for("t2v")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    inputs.ours(model).square().mean().backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.bfloat16()
    inputs.ours(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16
        similarity = torch.cosine_similarity(parameter.grad.float().flatten(), exact[name].flatten(), dim=0)
        assert similarity > 0.99, name


def test_wide_linear_is_exact() -> None:
    layer = WideLinear(5, 7).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)),
        (x, layer.weight, layer.bias),
    )


def test_wide_linear_of_a_half_precision_weight_is_that_of_its_values() -> None:
    # Half-precision weights are taken a few rows at a time: five runs of them, the last one shorter.
    width, out_features = 1024, 4 * (WIDENED_AT_ONCE // 1024) + 7
    sliced = WideLinear(width, out_features).bfloat16()
    whole = WideLinear(width, out_features).double()
    whole.load_state_dict(sliced.state_dict())
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 3, width, generator=draw), torch.randn(2, 3, out_features, generator=draw)
    results = []
    for layer in (sliced, whole):
        kind = torch.promote_types(layer.weight.dtype, torch.float32)
        tokens = x.to(kind).clone().requires_grad_()
        y = layer(tokens)
        assert y.dtype == kind
        y.backward(dy.to(kind))
        results.append((y.detach(), tokens.grad, layer.weight.grad, layer.bias.grad))
    for found, exact, tolerance in zip(*results, (1e-4, 1e-4, 2**-8, 2**-8), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-4)


def test_wide_linear_keeps_no_wide_weight() -> None:
    kept: list[Tensor] = []
    half = WideLinear(5, 7).bfloat16()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = half(torch.ones(2, 5))
    assert out.dtype == torch.float32
    assert not [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.numel() == 35]
    out.sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("clean", [0, 2, 5])
def test_modulation_rows_are_selected_by_token(clean: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    shift, scale = (torch.randn(2, 2, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    row = (torch.arange(5) >= clean).long()
    norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(
        modulated_norm(x, shift, scale, 1e-6, clean, x.dtype), norm * (1 + scale[:, row]) + shift[:, row]
    )
    torch.testing.assert_close(gated_add(x, y, scale, clean), x + y * scale[:, row])


# --- TI2V ---


def test_ti2v_never_builds_modulation_per_token() -> None:
    config = replace(TI2V, dim=96, num_heads=4, ffn_dim=96, text_len=16)
    model = random_model(config, seed=1)
    inputs = random_inputs(config, batch=1, latent=(5, 8, 8), seed=2, clean_frames=1)
    tokens = 5 * 4 * 4
    with Produced() as produced:
        inputs.ours(model).mean().backward()
    weights = {parameter.numel() for parameter in model.parameters()}
    assert max(size for _, size, _ in produced.tensors if size not in weights) < tokens * 6 * config.dim


def test_clean_frames_at_time_zero_are_plain_time_zero() -> None:
    model, inputs = random_model(TI2V, seed=1).double(), inputs_for("ti2v").to(torch.float64)
    zero = replace(inputs, timestep=torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(
        zero.ours(model), replace(zero, clean_frames=0).ours(model), rtol=0, atol=1e-12
    )


def test_without_clean_frames_all_tokens_have_the_time() -> None:
    model, inputs = random_model(TI2V, seed=1).double(), inputs_for("ti2v").to(torch.float64)
    plain = replace(inputs, clean_frames=0)
    # All frames but none of them noisy: the row of t is used by no token, and vice versa.
    all_clean = replace(inputs, clean_frames=3, timestep=torch.full((2,), 700.0, dtype=torch.float64))
    at_zero = replace(plain, timestep=torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(all_clean.ours(model), at_zero.ours(model), rtol=0, atol=1e-12)
    assert (plain.ours(model) - inputs.ours(model)).abs().max() > 1e-2


# --- several ranks ---


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bink,bjnk->bnij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bnij,bjnk->bink", weights, v)


class Recorder:
    """An attention kernel that keeps the keys and values it was given, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.append((k, v))
        return softmax_attention(q, k, v)


class OneOfMany:
    """A rank of a context-parallel group, whose peers' keys and values come from a recorded whole run."""

    def __init__(self, rank: int, size: int, recorded: list[tuple[Tensor, Tensor]]) -> None:
        self.rank, self.size, self.ulysses_size, self.ring_size = rank, size, size, 1
        self.recorded = iter(recorded)

    def local_length(self, length: int) -> int:
        return -(-length // self.size)

    def local_range(self, length: int) -> tuple[int, int]:
        local = self.local_length(length)
        return min(self.rank * local, length), min((self.rank + 1) * local, length)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        start, stop = self.local_range(x.shape[dim])
        part = x.narrow(dim, start, stop - start)
        return nn.functional.pad(part, (0, 0, 0, self.local_length(x.shape[dim]) - (stop - start)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: object, length: int) -> Tensor:
        start, stop = self.local_range(length)
        whole_k, whole_v = next(pair for pair in self.recorded if pair[0].shape[1] == length)
        valid = stop - start
        torch.testing.assert_close(k[:, :valid], whole_k[:, start:stop], rtol=0, atol=1e-12)
        torch.testing.assert_close(v[:, :valid], whole_v[:, start:stop], rtol=0, atol=1e-12)
        return softmax_attention(q, whole_k, whole_v)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gives_its_tokens_of_the_whole(kind: str, size: int) -> None:
    model, inputs = random_model(KINDS[kind], seed=1).double(), inputs_for(kind).to(torch.float64)
    recorder = Recorder()
    extra = {
        "clean_frames": inputs.clean_frames,
        "clip": inputs.clip,
        "condition": inputs.condition,
        "vace": inputs.vace,
    }
    with torch.no_grad():
        model.attention = recorder
        whole = model(inputs.latents, inputs.timestep, inputs.text, **extra)
        model.attention = None
        length = whole.shape[1]
        for rank in range(size):
            context = OneOfMany(rank, size, recorder.calls)
            part = model(inputs.latents, inputs.timestep, inputs.text, context=context, **extra)
            start, stop = context.local_range(length)
            assert part.shape[1] == context.local_length(length)
            torch.testing.assert_close(part[:, : stop - start], whole[:, start:stop], rtol=0, atol=1e-12)


# --- recompute ---


# --- initial values ---


def test_initial_values_have_wans_distributions() -> None:
    config = get_variant("debug-vace").config
    weights = InitialWeights(replace(config, image_dim=32, pos_embed_seq_len=514), seed=3)
    for key in weights.keys():
        value, (layer, last) = weights.load(key), key.rsplit(".", 2)[-2:]
        assert value.dtype == weights.dtype(key) and value.shape == weights.shape(key)
        if last in ("bias", "emb_pos") or layer in ("before_proj", "after_proj") or key == "head.head.weight":
            assert (value == 0).all(), key
        elif value.ndim == 1:
            assert (value == 1).all(), key
        elif last == "modulation":
            assert float(value.std() * math.sqrt(config.dim)) == pytest.approx(1, abs=0.15), key
        elif key.startswith(("text_embedding", "time_embedding")):
            assert float(value.std()) == pytest.approx(0.02, rel=0.05), key
        else:
            bound = math.sqrt(6 / (value.shape[0] + value[0].numel()))
            assert value.abs().max() <= bound and float(value.std()) == pytest.approx(
                bound / math.sqrt(3), rel=0.05
            ), key


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    config = get_variant("debug").config
    one = initial_tensor("blocks.0.ffn.0.weight", (576, 144), config, 0)
    assert torch.equal(one, initial_tensor("blocks.0.ffn.0.weight", (576, 144), config, 0))
    for name, seed in (("blocks.1.ffn.0.weight", 0), ("blocks.0.ffn.0.weight", 1)):
        assert not torch.equal(one, initial_tensor(name, (576, 144), config, seed))
    model, weights = WanModel(config), InitialWeights(config, 5)
    initialise_(model, 5)
    assert all(torch.equal(tensor, weights.load(name)) for name, tensor in model.state_dict().items())


# --- inputs that do not fit ---


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t2v", {"latents": torch.zeros(2, 16, 4, 6)}, r"must be \[B, C, T, H, W\]"),
        ("t2v", {"latents": torch.zeros(2, 8, 3, 4, 6)}, "8 channels and the condition 0: .* in_dim 16"),
        ("t2v", {"latents": torch.zeros(2, 16, 3, 5, 6)}, "multiples of the patch"),
        ("t2v", {"timestep": torch.zeros(1)}, r"timestep must be \[2\]"),
        ("t2v", {"timestep": torch.zeros(2, 18)}, r"timestep must be \[2\]"),
        ("t2v", {"text": torch.zeros(2, 512, 31)}, r"text must be \[2, S <= 512, 32\], not \(2, 512, 31\)"),
        ("t2v", {"text": torch.zeros(1, 512, 32)}, "text must be"),
        ("t2v", {"text": torch.zeros(2, 513, 32)}, "text must be"),
        ("t2v", {"clip": torch.zeros(2, 257, 64)}, "has no image branch"),
        ("t2v", {"vace": torch.zeros(2, 96, 3, 4, 6)}, "takes no vace input"),
        ("t2v", {"condition": torch.zeros(2, 20, 3, 4, 6)}, "in_dim 16"),
        ("ti2v", {"clean_frames": 4}, "clean_frames 4"),
        ("ti2v", {"clean_frames": -1}, "clean_frames -1"),
        ("flf2v", {"clip": None}, "needs clip features"),
        ("flf2v", {"clip": torch.zeros(2, 257, 64)}, r"clip must be \[2, 514, 64\], not \[2, 257, 64\]"),
        ("flf2v", {"condition": torch.zeros(2, 20, 1, 4, 6)}, "must share B, T, H, W"),
        ("flf2v", {"condition": None}, "16 channels and the condition 0: .* in_dim 36"),
        ("vace", {"vace": None}, "needs a vace input"),
        ("vace", {"vace": torch.zeros(2, 20, 3, 4, 4)}, r"vace must be \[2, 20, 3, 4, 6\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(kind: str, changes: dict, message: str) -> None:
    model = WanModel(KINDS[kind])
    with pytest.raises(ValueError, match=message):
        replace(inputs_for(kind), **changes).ours(model)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("debug")])
def test_a_debug_variant_takes_a_training_step(name: str) -> None:
    config: WanConfig = get_variant(name).config
    model = WanModel(config, recompute="full:3")
    initialise_(model, 0)
    inputs = random_inputs(
        config, batch=1, latent=(2, 4, 4), seed=1, clean_frames=int(config.model_type == "ti2v")
    )
    out = inputs.ours(model)
    assert out.shape == inputs.latents.shape and (out == 0).all()  # the head starts at zero
    (out - inputs.latents).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.head.head.weight.grad.abs().max() > 0
