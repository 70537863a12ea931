"""The cost formulas against the published checkpoints and the arithmetic printed for them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megawan import cost
from megawan.cost import Layout, ModelShape
from megawan.models.variants import VARIANTS, get_variant
from megawan.models.wan import WanModel
from megawan.plan import model_shape

T2V_1_3B = ModelShape(1536, 8960, 12, 30, 16, 16)
TI2V_5B = ModelShape(3072, 14336, 24, 30, 48, 48)
T2V_14B = ModelShape(5120, 13824, 40, 40, 16, 16)
I2V_14B = ModelShape(5120, 13824, 40, 40, 36, 16, image_branch=True)
FLF2V_14B = ModelShape(5120, 13824, 40, 40, 36, 16, image_branch=True, image_tokens=514, image_positions=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = get_variant(name).config
    with torch.device("meta"):
        model = WanModel(config)
    assert cost.parameters(model_shape(config)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["debug", "debug-i2v", "debug-vace"])
def test_linear_flops_are_those_of_the_model(name: str) -> None:
    config = get_variant(name).config
    model, grid = WanModel(config), (3, 8, 6)
    latents = torch.zeros(1, config.out_dim, *grid)
    condition_channels = config.in_dim - config.out_dim
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            latents,
            torch.tensor([500.0]),
            torch.zeros(1, config.text_len, config.text_dim),
            clip=torch.zeros(1, 257, 1280) if config.has_clip else None,
            condition=torch.zeros(1, condition_channels, *grid) if condition_channels else None,
            vace=torch.zeros(1, config.vace_in_dim, *grid) if config.vace_layers else None,
        )
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in counted.items() if "attention" not in str(operation))
    shape, tokens = model_shape(config), 3 * 8 * 6 // 4
    block = cost.block_flops(shape, tokens)
    attention = (shape.num_layers + shape.vace_layers) * (block.self_attention + block.cross_attention)
    assert linear == cost.forward_flops(shape, tokens) - attention


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        (T2V_1_3B, 1_418_996_800),
        (TI2V_5B, 4_999_787_712),
        (T2V_14B, 14_288_491_584),
        (ModelShape(5120, 13824, 40, 40, 36, 16), 14_288_901_184),  # I2V-A14B, one expert
        (I2V_14B, 16_394_878_784),
        (FLF2V_14B, 16_395_536_704),
        (ModelShape(1536, 8960, 12, 30, 36, 16, image_branch=True), 1_564_428_608),
        (ModelShape(1536, 8960, 12, 30, 48, 16, image_branch=True), 1_564_502_336),
        (ModelShape(1536, 8960, 12, 30, 16, 16, vace_layers=15), 2_153_972_032),
        (ModelShape(5120, 13824, 40, 40, 16, 16, vace_layers=8), 17_337_592_896),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(shape: ModelShape, total: int) -> None:
    assert cost.parameters(shape) == total


@pytest.mark.parametrize(
    ("shape", "block"),
    [(T2V_1_3B, 46_440_704), (TI2V_5B, 163_656_704), (T2V_14B, 351_394_304), (I2V_14B, 403_838_464)],
)
def test_block_parameters(shape: ModelShape, block: int) -> None:
    assert cost.block_parameters(shape) == block


# Petaflops of one sample, and what a FLOP counter finds in the linear and convolution layers of the forward.
@pytest.mark.parametrize(
    ("shape", "tokens", "attention_share", "forward", "train", "full", "linear_only"),
    [
        (T2V_1_3B, 32_760, 0.710, 0.283, 0.85, 1.13, 0.93),
        (T2V_1_3B, 75_600, 0.849, 1.250, 3.75, 5.00, 3.94),
        (TI2V_5B, 27_280, 0.541, 0.517, 1.55, 2.07, 1.79),
        (T2V_14B, 20_280, 0.415, 0.832, 2.50, 3.33, 2.98),
        (T2V_14B, 32_760, 0.532, 1.678, 5.04, 6.71, 5.82),
        (T2V_14B, 37_440, 0.565, 2.061, 6.18, 8.25, 7.08),
        (T2V_14B, 75_600, 0.723, 6.523, 19.57, 26.09, 21.38),
    ],
)
def test_step_flops(
    shape: ModelShape,
    tokens: int,
    attention_share: float,
    forward: float,
    train: float,
    full: float,
    linear_only: float,
) -> None:
    flops = cost.forward_flops(shape, tokens)
    block = cost.block_flops(shape, tokens)
    attention = shape.num_layers * (block.self_attention + block.cross_attention)
    step = cost.train_flops(shape, tokens)
    assert attention / flops == pytest.approx(attention_share, abs=5e-4)
    assert flops / 1e15 == pytest.approx(forward, abs=5.1e-4)
    assert step / 1e15 == pytest.approx(train, abs=5.1e-3)
    ended = 2 * tokens * shape.dim * shape.ffn_dim * shape.num_layers  # the last products, not repeated
    repeated = cost.recompute_flops(shape, tokens, "full") + ended
    assert (step + repeated) / 1e15 == pytest.approx(full, abs=5.1e-3)
    assert (step + shape.num_layers * block.linear) / 1e15 == pytest.approx(linear_only, abs=5.1e-3)


@pytest.mark.parametrize(
    ("shape", "tokens", "petaflops"),
    [
        (T2V_1_3B, 32_760, 0.0821),
        (TI2V_5B, 27_280, 0.2375),
        (T2V_14B, 32_760, 0.7854),
        (T2V_14B, 75_600, 1.8097),
    ],
)
def test_linear_flops_are_what_a_flop_counter_finds(shape: ModelShape, tokens: int, petaflops: float) -> None:
    block = cost.block_flops(shape, tokens)
    linear = cost.forward_flops(shape, tokens) - shape.num_layers * (
        block.self_attention + block.cross_attention
    )
    assert linear / 1e15 == pytest.approx(petaflops, abs=5.1e-5)


def test_recompute_grows_with_what_is_not_kept() -> None:
    extra = [cost.recompute_flops(T2V_14B, 32_760, policy) for policy in cost.POLICIES]
    kept = [cost.activation_bytes(T2V_14B, 32_760, policy) for policy in cost.POLICIES]
    assert extra == sorted(extra) and extra[:2] == [0, 0] and extra[2] < extra[3]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert cost.recompute_flops(T2V_14B, 32_760, "full", layers=8) * 5 == extra[3]


def test_image_tokens_add_keys_and_values_but_no_queries() -> None:
    plain = cost.block_flops(ModelShape(5120, 13824, 40, 40, 36, 16), 20_280)
    image = cost.block_flops(I2V_14B, 20_280)
    assert image.self_attention == plain.self_attention
    assert image.linear - plain.linear == 4 * 257 * 5120**2
    assert image.cross_attention - plain.cross_attention == 4 * 20_280 * 257 * 5120


@pytest.mark.parametrize(
    ("shape", "tokens", "none", "selective", "attention", "full"),
    [
        (T2V_1_3B, 32_760, 80.6, 44.9, 6.1, 3.0),
        (TI2V_5B, 27_280, 122.5, 68.9, 10.1, 5.0),
        (T2V_14B, 32_760, 274.2, 157.4, 27.0, 13.4),
        (T2V_14B, 75_600, 632.8, 363.3, 62.4, 31.0),
    ],
)
def test_activation_gigabytes(
    shape: ModelShape, tokens: int, none: float, selective: float, attention: float, full: float
) -> None:
    video = replace(shape, text_len=0)
    kept = [cost.activation_bytes(video, tokens, policy) / 1e9 for policy in cost.POLICIES]
    assert kept == pytest.approx([none, selective, attention, full], abs=0.051)


def test_a_short_video_keeps_the_gated_products() -> None:
    """And multiplies the last one again."""
    shape, few = replace(T2V_14B, text_len=0, num_layers=1), cost.GATE_BY_WEIGHT_TOKENS - 1
    for policy, vectors in (("none", 2), ("selective", 1), ("attention", 0), ("full", 0)):
        token = cost.activation_bytes(shape, few, policy) // few
        assert token - cost.activation_bytes(shape, few + 1, policy) // (few + 1) == vectors * 2 * shape.dim
    repeated = [cost.recompute_flops(shape, tokens, "full") / tokens for tokens in (few, few + 1)]
    again, attention = 2 * shape.dim * shape.ffn_dim, 4 * shape.dim  # a token's, the latter for each token
    assert repeated[0] - repeated[1] == pytest.approx(again - attention)


def test_activations_divide_by_the_context_parallel_size() -> None:
    whole = cost.activation_bytes(T2V_14B, 32_760, "full")
    assert cost.activation_bytes(T2V_14B, 32_760, "full", cp_size=8) * 8 == whole
    # 32,760 is not a multiple of 16: eight tokens of padding
    assert (
        cost.activation_bytes(T2V_14B, 32_760, "full", cp_size=16) * 16
        == whole + 8 * (5120 * 2) * T2V_14B.num_layers
    )


def test_what_text_and_ulysses_add_to_the_kept_activations() -> None:
    vector, tokens = 2 * T2V_14B.dim * T2V_14B.num_layers, 32_760
    for policy, text, sent in (("none", 3, 1), ("selective", 2, 2), ("attention", 0, 0), ("full", 0, 0)):
        whole = cost.activation_bytes(T2V_14B, tokens, policy)
        assert (
            whole - cost.activation_bytes(replace(T2V_14B, text_len=0), tokens, policy) == text * 512 * vector
        )
        ring = cost.activation_bytes(T2V_14B, tokens, policy, cp_size=8)
        ulysses = cost.activation_bytes(T2V_14B, tokens, policy, cp_size=8, ulysses_degree=8)
        assert ulysses - ring == sent * (tokens // 8) * vector
        # Divided by the ranks, but for the text; Ulysses keeps what it received beside what it sent.
        assert ring * 8 == pytest.approx(whole, rel=0.05 if policy != "selective" else 0.08)
    for policy in ("none", "attention", "full"):
        here = cost.activation_bytes(T2V_1_3B, tokens, policy, cp_size=8, ulysses_degree=4)
        assert here * 8 == pytest.approx(cost.activation_bytes(T2V_1_3B, tokens, policy), rel=0.05)


def test_a_block_at_work_holds_the_rest_of_itself_and_its_gradients() -> None:
    for policy in cost.POLICIES:
        one = replace(T2V_14B, num_layers=1)
        rest = cost.activation_bytes(one, 1_000, "none") - cost.activation_bytes(one, 1_000, policy)
        assert cost.block_working_bytes(T2V_14B, 1_000, policy) == rest + 2_000 * (3 * 5_120 + 13_824)


@pytest.mark.parametrize(("shape", "gigabytes"), [(T2V_1_3B, 22.7), (TI2V_5B, 80.0), (T2V_14B, 228.6)])
def test_model_states_are_sixteen_bytes_a_parameter(shape: ModelShape, gigabytes: float) -> None:
    params = cost.parameters(shape)
    assert cost.model_state_bytes_per_rank(params, 1, 0) == 16 * params
    assert cost.model_state_bytes_per_rank(params, 1, 3) / 1e9 == pytest.approx(gigabytes, abs=0.051)
    assert cost.model_state_bytes_per_rank(params, 1, 0, "fp32") == 16 * params
    assert cost.model_state_bytes_per_rank(params, 1, 3, "fp32") == 20 * params  # counted: test_zero_bytes.py
    assert cost.model_states(params, 1, 3, gradient_bytes=4).total == 18 * params


def test_each_zero_stage_shards_one_thing_more() -> None:
    params = 8_000
    stages = [cost.model_states(params, 8, stage) for stage in range(4)]
    assert [stage.optimizer for stage in stages] == [12 * params, 12 * 1_000, 12 * 1_000, 12 * 1_000]
    assert [stage.gradients for stage in stages] == [2 * params, 2 * params, 2 * 1_000, 2 * 1_000]
    assert [stage.weights for stage in stages] == [2 * params, 2 * params, 2 * params, 2 * 1_000]
    per_gpu = [
        cost.model_state_bytes_per_rank(cost.parameters(T2V_14B), world, 3) / 1e9 for world in (8, 16, 32)
    ]
    assert per_gpu == pytest.approx([28.6, 14.3, 7.1], abs=0.051)


@pytest.mark.parametrize(
    ("shape", "tokens", "ulysses", "ring", "gather"),
    [
        (T2V_14B, 32_760, 147, 587, 615),
        (T2V_14B, 75_600, 339, 1355, 615),
        (TI2V_5B, 27_280, 73, None, 286),
        (T2V_1_3B, 32_760, 44, None, 81),
    ],
)
def test_megabytes_on_the_wire_of_eight(
    shape: ModelShape, tokens: int, ulysses: int, ring: int | None, gather: int
) -> None:
    assert round(cost.ulysses_bytes(shape, tokens, 8) / 1e6) == ulysses
    if ring is not None:
        assert round(cost.ring_bytes(shape, tokens, 1, 8) / 1e6) == ring
    assert round(cost.gather_bytes(cost.block_parameters(shape), 8) / 1e6) == gather


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_ring_sends_half_its_degree_times_ulysses(degree: int) -> None:
    ulysses = cost.ulysses_bytes(T2V_14B, 32_760, degree)
    assert cost.ring_bytes(T2V_14B, 32_760, 1, degree) * 2 == ulysses * degree


@pytest.mark.parametrize("policy", cost.POLICIES)
def test_what_a_policy_sends_again(policy: str) -> None:
    forward = cost.ulysses_bytes(T2V_14B, 32_768, 8)
    rows = 32_768 // 8 * 40 * 4 * 7 // 8
    assert cost.recompute_bytes(T2V_14B, 32_768, policy, 1) == 0
    extra = {"none": 0, "selective": rows, "attention": forward * 3 // 4 + rows, "full": forward}
    assert cost.recompute_bytes(T2V_14B, 32_768, policy, 8) == extra[policy]
    ring = cost.ring_bytes(T2V_14B, 32_768, 1, 8)
    assert cost.recompute_bytes(T2V_14B, 32_768, policy, 1, 8) == (ring if policy == "full" else 0)


def rank_total(split: list[tuple[str, int]], tokens: int, layout: Layout) -> int:
    return cost.rank_memory(T2V_14B, tokens, split, layout).total


@pytest.mark.parametrize("tokens", [32_760, 75_600])
@pytest.mark.parametrize("gigabytes", [50, 55, 60, 66, 72, 80, 120])
def test_the_cheapest_recompute_is_that_of_an_exhaustive_search(tokens: int, gigabytes: int) -> None:
    layout, budget = Layout(8, ulysses_degree=8), gigabytes << 30
    every = [
        [(heavy, layers), (light, 40 - layers)]
        for heavy in cost.POLICIES
        for light in cost.POLICIES
        for layers in range(41)
    ]
    fitting = [split for split in every if rank_total(split, tokens, layout) <= budget]
    least = min(
        sum(cost.recompute_flops(T2V_14B, tokens, policy, layers) for policy, layers in split)
        for split in fitting
    )
    choice = cost.cheapest_recompute(T2V_14B, tokens, budget, layout)
    assert choice is not None and choice.flops == least and choice.memory.total <= budget
    if len({policy for policy, layers in choice.split if layers}) > 1:  # one block less would not fit
        (heavy, layers), (light, others) = choice.split
        assert rank_total([(heavy, layers - 1), (light, others + 1)], tokens, layout) > budget


def test_nothing_fits_a_small_budget() -> None:
    assert cost.cheapest_recompute(T2V_14B, 75_600, 30 << 30, Layout(8, ulysses_degree=8)) is None


def test_what_is_offloaded_leaves_the_device() -> None:
    layout = Layout(8, ulysses_degree=8)
    here = cost.rank_memory(T2V_14B, 75_600, [("attention", 40)], layout)
    away = cost.rank_memory(T2V_14B, 75_600, [("attention", 40)], replace(layout, offload_activations=True))
    ends = cost.end_bytes(T2V_14B, 75_600, cp_size=8)
    assert (away.kept - ends) * 40 == here.kept - ends and away.working == here.working
    states = cost.rank_memory(T2V_14B, 75_600, [("full", 40)], replace(layout, offload_optimizer=True))
    assert here.states - states.states == 14 * -(-cost.parameters(T2V_14B) // 8)
    both = replace(layout, offload_optimizer=True, offload_weights=True)
    assert cost.rank_memory(T2V_14B, 75_600, [("full", 40)], both).states == 0


def test_one_rank_sends_nothing() -> None:
    assert cost.ulysses_bytes(T2V_14B, 1_000, 1) == cost.ring_bytes(T2V_14B, 1_000, 1, 1) == 0
    assert cost.gather_bytes(1_000, 1) == 0


def test_mfu_of_a_published_run() -> None:
    # Wan 14B at 37,440 tokens on 128 H100: 325.77 TFLOP/s a GPU was printed as 32.9 %.
    assert cost.mfu(325.77e12 * 128 * 2.0, 2.0, 128, 989e12) == pytest.approx(0.329, abs=5e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cost.activation_bytes(T2V_14B, 1_000, "some"),
        lambda: cost.recompute_flops(T2V_14B, 1_000, "some"),
        lambda: cost.recompute_flops(T2V_14B, 1_000, "full", layers=41),
        lambda: cost.rank_memory(T2V_14B, 1_000, [("full", 39)], Layout(1)),
        lambda: cost.model_states(1, 1, 4),
        lambda: cost.model_states(1, 0, 3),
        lambda: cost.model_states(1, 1, 3, "fp8"),
        lambda: cost.local_tokens(0, 1),
        lambda: cost.mfu(1.0, 0.0, 1, 1.0),
    ],
)
def test_impossible_questions_are_refused(call) -> None:
    with pytest.raises(ValueError, match="legal|must|has"):
        call()
