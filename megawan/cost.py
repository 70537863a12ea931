"""What a run costs, as arithmetic: parameters, FLOPs, memory and wire bytes of a Wan transformer.

Plain ints and floats, nothing imported: metrics, the plan and the benchmarks read the same formulas. A FLOP
is one multiplication or addition (a matrix product [m, k] x [k, n] has 2·m·k·n); only matrix products are
counted, as every published MFU does. Letters: N tokens of one video, T text tokens, d width, f feed-forward
width, h heads, L layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

CLIP_DIM = 1280  # width of the CLIP image tower of the I2V checkpoints
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a Wan transformer's cost depends on; the names are those of its config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_len: int = 512
    text_dim: int = 4096
    freq_dim: int = 256
    image_branch: bool = False  # CLIP tokens with their own keys and values (Wan2.1 I2V, FLF2V)
    image_tokens: int = 257
    image_positions: bool = False  # learned positions of the image tokens (FLF2V)
    patch_volume: int = 4  # latent elements of one channel in a token, (1, 2, 2)
    vace_layers: int = 0  # control blocks beside the main ones (VACE), with their own patch embedding
    vace_in_dim: int = 96


# ------------------------------------------------------------------------------------------------------ sizes


def block_parameters(shape: ModelShape) -> int:
    """Return the parameters of one transformer block: 8(d² + d) + 4d + 2d + 2df + f + d + 6d, plus the image
    keys."""
    d, f = shape.dim, shape.ffn_dim
    attention = 4 * (d * d + d) + 2 * d  # q, k, v, o and the norms of q and k
    image = 2 * (d * d + d) + d if shape.image_branch else 0
    return 2 * attention + 2 * d + (2 * d * f + f + d) + 6 * d + image


def parameters(shape: ModelShape) -> int:
    """Return the exact number of parameters of the whole transformer."""
    d = shape.dim
    patch = shape.in_dim * shape.patch_volume * d + d
    text = (shape.text_dim * d + d) + (d * d + d)
    time = (shape.freq_dim * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    columns = shape.out_dim * shape.patch_volume
    head = d * columns + columns + 2 * d
    image = 0
    if shape.image_branch:
        image = 2 * CLIP_DIM + (CLIP_DIM * CLIP_DIM + CLIP_DIM) + (CLIP_DIM * d + d) + 2 * d
    if shape.image_positions:
        image += shape.image_tokens * CLIP_DIM
    vace = 0
    if shape.vace_layers:  # each block has a projection out, the first one also a projection in
        vace = shape.vace_in_dim * shape.patch_volume * d + d + (shape.vace_layers + 1) * (d * d + d)
    blocks = shape.num_layers + shape.vace_layers
    return patch + text + time + head + image + vace + blocks * block_parameters(shape)


# ------------------------------------------------------------------------------------------------------ FLOPs


@dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one block for one video, by what recompute may or may not repeat."""

    linear: int  # every projection and the feed-forward
    self_attention: int
    cross_attention: int

    @property
    def total(self) -> int:
        """Forward FLOPs of the block."""
        return self.linear + self.self_attention + self.cross_attention


def block_flops(shape: ModelShape, tokens: int) -> BlockFlops:
    """Return the forward FLOPs of one block on one video of `tokens` tokens.

    linear = 2N·6d² (q, k, v, o of self-attention; q, o of cross-attention) + 4T·d² (its k, v) + 4N·d·f;
    self-attention = 4N²·d; cross-attention = 4N·T·d. An image branch adds its keys and values to the last
    two.
    """
    n, t, d, f = tokens, shape.text_len, shape.dim, shape.ffn_dim
    context = t + (shape.image_tokens if shape.image_branch else 0)
    linear = 12 * n * d * d + 4 * context * d * d + 4 * n * d * f
    return BlockFlops(linear, 4 * n * n * d, 4 * n * context * d)


def forward_flops(shape: ModelShape, tokens: int) -> int:
    """Return the forward FLOPs of the whole transformer on one video of `tokens` tokens."""
    n, d = tokens, shape.dim
    patch = 2 * n * shape.in_dim * shape.patch_volume * d
    head = 2 * n * d * shape.out_dim * shape.patch_volume
    text = 2 * shape.text_len * (shape.text_dim * d + d * d)
    time = 2 * (shape.freq_dim * d + d * d + 6 * d * d)
    image = 2 * shape.image_tokens * (CLIP_DIM * CLIP_DIM + CLIP_DIM * d) if shape.image_branch else 0
    vace = 0
    if shape.vace_layers:
        vace = 2 * n * d * (shape.vace_in_dim * shape.patch_volume + (shape.vace_layers + 1) * d)
    blocks = shape.num_layers + shape.vace_layers
    return patch + head + text + time + image + vace + blocks * block_flops(shape, tokens).total


def train_flops(shape: ModelShape, tokens: int) -> int:
    """Return the model FLOPs of forward and backward on one video: 3 x forward. Recompute is not counted
    (MFU)."""
    return 3 * forward_flops(shape, tokens)


def recompute_flops(shape: ModelShape, tokens: int, policy: str, layers: int | None = None) -> int:
    """Return the FLOPs that activation recompute adds to `train_flops`, for one video.

    `policy` is a row of `POLICIES`; `layers` is how many blocks it applies to (all without it).
    Raises ValueError for an unknown policy or more layers than the model has.
    """
    block = block_flops(shape, tokens)
    repeated = {
        "none": 0,
        "selective": 0,  # norms, modulation, rotation and GELU only: no matrix product
        "attention": block.linear + block.cross_attention,
        "full": block.total,
    }
    return _layers(shape, layers) * repeated[_policy(policy)]


# ----------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the model states on one rank."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters (with 16-bit weights) and both Adam moments

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    params: int, world_size: int, zero_stage: int, precision: str = "bf16", gradient_bytes: int | None = None
) -> StateBytes:
    """Return the model states of one rank for `params` parameters trained with Adam.

    ZeRO shards the optimizer over the world from stage 1, gradients from stage 2, weights at stage 3.
    `precision` is "bf16" (2-byte weights and gradients, fp32 masters: 16 bytes a parameter) or "fp32" (the
    weights are the masters: also 16); `gradient_bytes` overrides the size of a gradient element. Raises
    ValueError for anything else.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r} has no state sizes; legal: bf16, fp32")
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO stage {zero_stage} does not exist; legal: 0, 1, 2, 3")
    if world_size < 1:
        raise ValueError(f"world_size {world_size} must be 1 or more")
    weight = 2 if precision == "bf16" else 4
    gradient = weight if gradient_bytes is None else gradient_bytes
    master = 4 if precision == "bf16" else 0
    shard = -(-params // world_size)
    return StateBytes(
        weights=weight * (shard if zero_stage == 3 else params),
        gradients=gradient * (shard if zero_stage >= 2 else params),
        optimizer=(master + 4 * ADAM_MOMENTS) * (shard if zero_stage >= 1 else params),
    )


def model_state_bytes_per_rank(params: int, world_size: int, zero_stage: int, precision: str = "bf16") -> int:
    """Return the total of `model_states`."""
    return model_states(params, world_size, zero_stage, precision).total


POLICIES = ("none", "selective", "attention", "full")
"""What a block keeps for backward: everything; the outputs of linears and attentions; its input and the
output of self-attention; its input."""


def activation_bytes(
    shape: ModelShape, tokens: int, policy: str, *, cp_size: int = 1, bytes_per_element: int = 2
) -> int:
    """Return the bytes that all blocks together keep for backward, for one video on one rank of `cp_size`.

    In units of one hidden vector a token: full 1; attention 2 + its log-sum-exp; selective 10 + f/d, none
    (every elementwise chain fused) 17 + 2f/d, both with two log-sum-exps (fp32, one a head). An eager block
    keeps about 1.7 times "none". What lives only inside one block at a time is `block_working_bytes`.
    """
    d, f = shape.dim, shape.ffn_dim
    elements = {"full": d, "attention": 2 * d, "selective": 10 * d + f, "none": 17 * d + 2 * f}[
        _policy(policy)
    ]
    logsumexps = {"full": 0, "attention": 1, "selective": 2, "none": 2}[policy]
    token = elements * bytes_per_element + 4 * shape.num_heads * logsumexps
    return shape.num_layers * local_tokens(tokens, cp_size) * token


def block_working_bytes(
    shape: ModelShape, tokens: int, *, cp_size: int = 1, bytes_per_element: int = 2
) -> int:
    """Return the bytes alive while one recomputed block is in backward: what `none` keeps for one block."""
    every = activation_bytes(shape, tokens, "none", cp_size=cp_size, bytes_per_element=bytes_per_element)
    return every // shape.num_layers


def local_tokens(tokens: int, cp_size: int) -> int:
    """Return ceil(tokens / cp_size), what one rank of a context-parallel group holds."""
    if tokens < 1 or cp_size < 1:
        raise ValueError(f"tokens {tokens} and cp_size {cp_size} must be 1 or more")
    return -(-tokens // cp_size)


# ------------------------------------------------------------------------------------------------------- wire


def ulysses_bytes(
    shape: ModelShape, tokens: int, ulysses_degree: int, ring_degree: int = 1, *, bytes_per_element: int = 2
) -> int:
    """Return the bytes one rank sends in one block's forward: q, k, v and the output, (U − 1)/U of each local
    shard.

    Constant in the number of tokens when the degree grows with them. The backward sends the same again.
    """
    local = local_tokens(tokens, ulysses_degree * ring_degree) * shape.dim * bytes_per_element
    return 4 * local * (ulysses_degree - 1) // ulysses_degree


def ring_bytes(
    shape: ModelShape, tokens: int, ulysses_degree: int, ring_degree: int, *, bytes_per_element: int = 2
) -> int:
    """Return the bytes one rank sends in one block's forward: its keys and values, ring_degree − 1 times.

    After the head exchange of Ulysses a rank has N/R tokens of d/U columns, as many elements as before it. At
    equal degree P a ring sends P/2 times what Ulysses does. Its backward sends about twice as much again,
    because the gradients of keys and values travel too.
    """
    local = local_tokens(tokens, ulysses_degree * ring_degree) * shape.dim * bytes_per_element
    return 2 * local * (ring_degree - 1)


def gather_bytes(params: int, world_size: int, bytes_per_element: int = 2) -> int:
    """Return the bytes one rank receives when ZeRO-3 gathers (or sends when it reduce-scatters) `params`
    parameters."""
    return params * bytes_per_element * (world_size - 1) // world_size


# ------------------------------------------------------------------------------------------------- throughput

# Dense bf16 FLOP/s with fp32 accumulation, no sparsity, from the makers' data sheets. The first row that
# occurs in a device's name as whole words counts, so the longer names come first.
GPU_PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        "GB300": 2500e12,
        "GB200": 2500e12,
        "B300": 2250e12,
        "B200": 2250e12,
        "GH200": 989e12,
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "H800": 989e12,
        "H20": 148e12,
        "A100": 312e12,
        "A800": 312e12,
        "A40": 150e12,
        "A30": 165e12,
        "A10": 125e12,
        "RTX 6000 Ada": 364e12,
        "RTX A6000": 155e12,
        "RTX 5090": 209e12,
        "RTX 4090": 165e12,
        "L40S": 362e12,
        "L40": 181e12,
        "L4": 121e12,
        "MI355X": 2500e12,
        "MI325X": 1307e12,
        "MI300X": 1307e12,
    }
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device from its name (`torch.cuda.get_device_name()`), None if not
    known."""
    return next(
        (peak for name, peak in GPU_PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )


def mfu(model_flops: float, seconds: float, gpus: int, peak: float) -> float:
    """Return the share of the peak that `model_flops` (recompute not counted) in `seconds` on `gpus` devices
    is, 0 to 1."""
    if not (seconds > 0 and gpus > 0 and peak > 0):
        raise ValueError(f"seconds {seconds}, gpus {gpus} and peak {peak} must all be above 0")
    return model_flops / (seconds * gpus * peak)


def _policy(policy: str) -> str:
    if policy not in POLICIES:
        raise ValueError(f"recompute policy {policy!r} is unknown; legal: {', '.join(POLICIES)}")
    return policy


def _layers(shape: ModelShape, layers: int | None) -> int:
    if layers is None:
        return shape.num_layers
    if not 0 <= layers <= shape.num_layers:
        raise ValueError(f"{layers} recomputed layers; the model has {shape.num_layers}")
    return layers
