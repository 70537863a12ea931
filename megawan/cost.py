"""What a run costs, as arithmetic: parameters, FLOPs, memory and wire bytes of a Wan transformer.

Plain ints and floats, nothing imported: metrics, the plan and the benchmarks read the same formulas. A FLOP
is one multiplication or addition (a matrix product [m, k] x [k, n] has 2·m·k·n); only matrix products are
counted, as every published MFU does. Letters: N tokens of one video, T text tokens, d width, f feed-forward
width, h heads, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

CLIP_DIM = 1280  # width of the CLIP image tower of the I2V checkpoints
ADAM_MOMENTS = 2
GATE_BY_WEIGHT_TOKENS = 1024
"""From this many tokens of a video a block's two gates take their gradient from the gradient of the weight
before them: `none` keeps neither product, `selective` not the last, and no recomputation multiplies the last
again. Three passes over that weight are cheaper than the product of as many tokens."""


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


def backward_flops(shape: ModelShape, tokens: int) -> int:
    """Return the FLOPs that a backward pass runs on one video, recompute not counted.

    Twice the forward for products; an attention kernel rebuilds its scores, 5 products for 2. The first
    layers' inputs (latents, text features, times) need no gradient. `train_flops` is the model's own need,
    without the rebuilt scores.
    """
    n, d = tokens, shape.dim
    block = block_flops(shape, tokens)
    attention = (shape.num_layers + shape.vace_layers) * (block.self_attention + block.cross_attention)
    no_gradient = 2 * n * shape.in_dim * shape.patch_volume * d
    no_gradient += 2 * shape.text_len * shape.text_dim * d + 2 * shape.freq_dim * d
    if shape.vace_layers:
        no_gradient += 2 * n * shape.vace_in_dim * shape.patch_volume * d
    return 2 * forward_flops(shape, tokens) + attention // 2 - no_gradient


def recompute_flops(shape: ModelShape, tokens: int, policy: str, layers: int | None = None) -> int:
    """Return the FLOPs that activation recompute adds to forward and backward, for one video.

    `policy` is a row of `POLICIES`; `layers` is how many blocks it applies to, from the first (all without
    it). Raises ValueError for an unknown policy or more layers than the model has.
    """
    block = block_flops(shape, tokens)
    repeated = {
        "none": 0,
        "selective": 0,  # norms, modulation, rotation and GELU only: no matrix product
        "attention": block.linear + block.cross_attention,
        "full": block.total,
    }[_policy(policy)]
    blocks, main = _blocks(shape, layers), shape.num_layers if layers is None else layers
    if not repeated or not blocks:
        return 0
    # The first control block's projection in is repeated; no block's projection out, its last product.
    control = 2 * tokens * shape.dim**2 if shape.vace_layers else 0
    ended = main * 2 * tokens * shape.dim * shape.ffn_dim if tokens >= GATE_BY_WEIGHT_TOKENS else 0
    return blocks * repeated + control - ended


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
    `precision` is "bf16" (2-byte weights and gradients, fp32 masters: 16 bytes a parameter) or "fp32": 16
    without ZeRO, where the weights are the masters, and 20 with it, because DeepSpeed keeps masters of its
    own beside fp32 weights. `gradient_bytes` overrides the size of a gradient element. Raises ValueError for
    anything else.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r} has no state sizes; legal: bf16, fp32")
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO stage {zero_stage} does not exist; legal: 0, 1, 2, 3")
    if world_size < 1:
        raise ValueError(f"world_size {world_size} must be 1 or more")
    weight = 2 if precision == "bf16" else 4
    gradient = weight if gradient_bytes is None else gradient_bytes
    master = 0 if precision == "fp32" and zero_stage == 0 else 4
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
    shape: ModelShape,
    tokens: int,
    policy: str,
    *,
    cp_size: int = 1,
    ulysses_degree: int = 1,
    layers: int | None = None,
    bytes_per_element: int = 2,
) -> int:
    """Return the bytes that blocks keep for backward, for one video on one rank of `cp_size`.

    layers: how many blocks, from the first (all without it). In hidden vectors a token: full 1; attention 2;
    selective 10 + f/d, none 17 + 2f/d, from `GATE_BY_WEIGHT_TOKENS` one and two less; each log-sum-exp (one
    in attention, two in the last two) adds 4 bytes a head, and in none the norms 36 bytes. With Ulysses, none
    also keeps the output in both layouts (1) and selective q and k as they were sent and received, v as
    received (2 more). Text, which every rank has whole, and an image branch add their keys and values. What
    lives only inside one block at a time is `block_working_bytes`.
    """
    d, f, sent = shape.dim, shape.ffn_dim, ulysses_degree > 1
    image, by_weight = shape.image_branch, tokens >= GATE_BY_WEIGHT_TOKENS
    vectors = {
        "full": d,
        "attention": 2 * d,
        "selective": (10 - by_weight + 2 * sent + image) * d + f,
        "none": (17 - 2 * by_weight + sent + 2 * image) * d + 2 * f,
    }[_policy(policy)]
    logsumexps = {"full": 0, "attention": 1, "selective": 2 + image, "none": 2 + image}[policy]
    norms = {"full": 0, "attention": 0, "selective": 0, "none": 9}[policy]  # 3 means, 6 scales
    context = shape.text_len + (shape.image_tokens if image else 0)
    keys = {"full": 0, "attention": 0, "selective": 2, "none": 3}[policy] * context * d
    token = vectors * bytes_per_element + 4 * (shape.num_heads * logsumexps + norms)
    return _blocks(shape, layers) * (local_tokens(tokens, cp_size) * token + keys * bytes_per_element)


def end_bytes(shape: ModelShape, tokens: int, *, cp_size: int = 1, bytes_per_element: int = 2) -> int:
    """Return the bytes that what stands before and behind the blocks keeps for backward, for one video.

    The patches; of text, CLIP tokens and time every layer's input; the head's input, its modulated norm in
    float32 and that norm's two statistics a token.
    """
    d, size = shape.dim, bytes_per_element
    token = shape.in_dim * shape.patch_volume * size + d * (size + 4) + 8
    text = shape.text_len * (shape.text_dim + 3 * d) * size
    image = shape.image_tokens * (4 * CLIP_DIM + 2 * d) * size if shape.image_branch else 0
    time = (shape.freq_dim + 12 * d) * 4
    return local_tokens(tokens, cp_size) * token + text + image + time


def block_working_bytes(
    shape: ModelShape,
    tokens: int,
    policy: str = "full",
    *,
    cp_size: int = 1,
    ulysses_degree: int = 1,
    bytes_per_element: int = 2,
) -> int:
    """Return the bytes alive while one block is in backward, beyond what the policy keeps of it.

    The rest of what `none` keeps, and the gradients at the widest place: 3 + f/d vectors.
    """
    none, kept = (
        activation_bytes(
            replace(shape, num_layers=1, vace_layers=0),
            tokens,
            each,
            cp_size=cp_size,
            ulysses_degree=ulysses_degree,
            bytes_per_element=bytes_per_element,
        )
        for each in ("none", policy)
    )
    gradients = local_tokens(tokens, cp_size) * (3 * shape.dim + shape.ffn_dim) * bytes_per_element
    return none - kept + gradients


@dataclass(frozen=True)
class Layout:
    """What one rank's memory depends on beside the model and the video."""

    world_size: int
    ulysses_degree: int = 1
    ring_degree: int = 1
    zero_stage: int = 3
    precision: str = "bf16"
    micro_batch: int = 1
    bucket: int = 100_000_000  # elements of DeepSpeed's reduce_bucket_size
    sub_group: int = 1_000_000_000  # elements that stage 3 updates at a time
    offload_optimizer: bool = False  # masters, moments and gradients in CPU memory
    offload_weights: bool = False
    offload_activations: bool = False  # what recomputed blocks keep, in CPU memory

    @property
    def cp_size(self) -> int:
        """Ranks that share one video."""
        return self.ulysses_degree * self.ring_degree

    @property
    def bytes_per_element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of device memory of one rank at the peak of a step, by what they are for."""

    states: int  # this rank's weights, gradients and optimizer states
    kept: int  # what blocks, embeddings and head keep for backward
    working: int  # one block in backward
    gathered: int  # ZeRO-3: two blocks' weights and one block's gradients before they are reduced
    buckets: int  # of communication
    updating: int  # gradients once more and in float32, while the optimizer works on them

    @property
    def buffers(self) -> int:
        """What is gathered and the buckets."""
        return self.gathered + self.buckets

    @property
    def backward(self) -> int:
        """What a backward pass needs beside states and buckets; it is gone when the optimizer updates."""
        return self.kept + self.working + self.gathered

    @property
    def total(self) -> int:
        """The peak: at the last micro-batch's backward pass or in the update."""
        return self.states + self.buckets + max(self.backward, self.updating)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory that one rank takes, beside the program and its data."""

    states: int  # offloaded masters, moments, gradients, weights
    activations: int  # offloaded
    saving: int  # the copy of masters and moments that is written to disk while training goes on

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.activations + self.saving


def rank_memory(
    shape: ModelShape, tokens: int, split: Sequence[tuple[str, int]], layout: Layout
) -> RankMemory:
    """Return the memory of one rank; `split` says policy by policy how many layers follow it.

    An estimate from what was counted, without CUDA's own needs (context, NCCL, fragmentation). Raises
    ValueError for unknown policies or other than num_layers layers.
    """
    if sum(layers for _, layers in split) != shape.num_layers:
        raise ValueError(f"{list(split)} must name {shape.num_layers} layers")
    size = layout.bytes_per_element
    kept, working = 0, 0
    for policy, layers, here in _kept_by_policy(shape, tokens, split, layout):
        offloaded = layout.offload_activations and policy != "none"
        kept += here // layers if offloaded else here
        working = max(working, block_working_bytes(shape, tokens, policy, **_spread(layout)))
    ends = end_bytes(shape, tokens, cp_size=layout.cp_size, bytes_per_element=size)
    states = model_states(parameters(shape), layout.world_size, layout.zero_stage, layout.precision)
    block = block_parameters(shape) * size
    return RankMemory(
        states=(0 if layout.offload_weights else states.weights)
        + (0 if layout.offload_optimizer else states.gradients + states.optimizer),
        kept=layout.micro_batch * (kept + ends),
        working=layout.micro_batch * working,
        gathered=3 * block if layout.zero_stage == 3 else 0,
        buckets=2 * layout.bucket * size,
        updating=_updating(shape, layout),
    )


def _updating(shape: ModelShape, layout: Layout) -> int:
    """Return the bytes that an update takes for a moment: DeepSpeed joins the gradients and widens them."""
    if layout.zero_stage == 0 or layout.offload_optimizer:
        return 0
    share, size = -(-parameters(shape) // layout.world_size), layout.bytes_per_element
    if layout.zero_stage < 3:
        return share * (size + 4)
    return min(share, layout.sub_group) * (size + 4 if size < 4 else 4)  # float32 gradients are not copied


def host_memory(
    shape: ModelShape, tokens: int, split: Sequence[tuple[str, int]], layout: Layout
) -> HostMemory:
    """Return the host memory of one rank for what is offloaded and for saving.

    DeepSpeed's offloaded optimizer holds masters, both moments, the gradients as they arrive and in float32
    for the update: 18 bytes a parameter of the rank's share with 16-bit weights, 20 with float32 ones.
    """
    size = layout.bytes_per_element
    share = -(-parameters(shape) // layout.world_size)
    states = share * (4 + 4 * ADAM_MOMENTS + 4 + size) if layout.offload_optimizer else 0
    states += share * size if layout.offload_weights else 0
    parked = sum(
        here for policy, _, here in _kept_by_policy(shape, tokens, split, layout) if policy != "none"
    )
    return HostMemory(
        states,
        layout.micro_batch * parked if layout.offload_activations else 0,
        (4 + 4 * ADAM_MOMENTS) * share,
    )


def _kept_by_policy(
    shape: ModelShape, tokens: int, split: Sequence[tuple[str, int]], layout: Layout
) -> list[tuple[str, int, int]]:
    """Return (policy, layers, bytes that they keep of one video) for each part of `split` that has layers."""
    found, first = [], 0
    for policy, layers in split:
        if layers:
            until = activation_bytes(shape, tokens, policy, layers=first + layers, **_spread(layout))
            before = activation_bytes(shape, tokens, policy, layers=first, **_spread(layout))
            found.append((policy, layers, until - before))
        first += layers
    return found


def _spread(layout: Layout) -> dict[str, int]:
    return {
        "cp_size": layout.cp_size,
        "ulysses_degree": layout.ulysses_degree,
        "bytes_per_element": layout.bytes_per_element,
    }


@dataclass(frozen=True)
class Choice:
    """A way to recompute, with its price and the memory it leaves a rank with."""

    split: tuple[tuple[str, int], ...]
    flops: int  # recomputed for one video
    memory: RankMemory

    @property
    def text(self) -> str:
        """The flag's value, such as attention:24,selective."""
        used = [(policy, layers) for policy, layers in self.split if layers]
        last = used[-1][0]
        parts = [f"{policy}:{layers}" for policy, layers in used[:-1]]
        return ",".join(parts if last == "none" and parts else [*parts, last])


def cheapest_recompute(shape: ModelShape, tokens: int, budget: int, layout: Layout) -> Choice | None:
    """Return the policies that recompute the fewest FLOPs within `budget` bytes a rank, None if none fits.

    The first K blocks follow one policy, the others a lighter one. Where no product is recomputed either way,
    the fewest blocks recompute anything.
    """
    best: tuple[tuple[int, int], Choice] | None = None
    for heavy in range(1, len(POLICIES)):
        for light in range(heavy):
            pair = (POLICIES[heavy], POLICIES[light])
            found = _fewest_layers(shape, tokens, pair, budget, layout)
            if found is None:
                continue
            layers, memory = found
            flops = recompute_flops(shape, tokens, pair[0], layers)
            flops += recompute_flops(shape, tokens, pair[1])
            flops -= recompute_flops(shape, tokens, pair[1], layers)
            key = (flops, -memory.kept)
            if best is None or key < best[0]:
                best = key, Choice(_split(pair, layers, shape.num_layers), flops, memory)
    return None if best is None else best[1]


def _fewest_layers(
    shape: ModelShape, tokens: int, pair: tuple[str, str], budget: int, layout: Layout
) -> tuple[int, RankMemory] | None:
    """Return how many blocks at least must follow the heavier policy of `pair`, and the memory then."""

    def memory(layers: int) -> RankMemory:
        return rank_memory(shape, tokens, _split(pair, layers, shape.num_layers), layout)

    # Memory falls from 1 to the last but one; at both ends only one of the policies works on a block.
    for first, last in ((0, 0), (1, shape.num_layers - 1), (shape.num_layers, shape.num_layers)):
        if last < first or memory(last).total > budget:
            continue
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if memory(middle).total <= budget else (middle + 1, last)
        return last, memory(last)
    return None


def _split(pair: tuple[str, str], layers: int, of: int) -> tuple[tuple[str, int], ...]:
    return (pair[0], layers), (pair[1], of - layers)


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
    equal degree P a ring sends P/2 times what Ulysses does. Where the ranks do not divide the tokens this
    counts padding, which a ring does not send.
    """
    local = local_tokens(tokens, ulysses_degree * ring_degree) * shape.dim * bytes_per_element
    return 2 * local * (ring_degree - 1)


def ring_backward_bytes(
    shape: ModelShape, tokens: int, ulysses_degree: int, ring_degree: int, *, bytes_per_element: int = 2
) -> int:
    """Return the bytes one rank sends in one block's backward: keys and values again and their gradients in
    float32 (or wider elements as they are), each ring_degree − 1 times."""
    return sum(
        ring_bytes(shape, tokens, ulysses_degree, ring_degree, bytes_per_element=size)
        for size in (bytes_per_element, max(4, bytes_per_element))
    )


def recompute_bytes(
    shape: ModelShape,
    tokens: int,
    policy: str,
    ulysses_degree: int,
    ring_degree: int = 1,
    *,
    bytes_per_element: int = 2,
) -> int:
    """Return the bytes one rank sends for one block because the policy recomputes it.

    full: the forward's again. attention: nothing to a ring; to Ulysses q, k and v once more, since what came
    from other ranks is not kept, and a float32 number a token and head. selective: only those numbers.
    """
    local = local_tokens(tokens, ulysses_degree * ring_degree)
    sent = ulysses_bytes(shape, tokens, ulysses_degree, ring_degree, bytes_per_element=bytes_per_element)
    rows = local * shape.num_heads * max(4, bytes_per_element) * (ulysses_degree - 1) // ulysses_degree
    around = ring_bytes(shape, tokens, ulysses_degree, ring_degree, bytes_per_element=bytes_per_element)
    extra = {"none": 0, "selective": rows, "attention": sent * 3 // 4 + rows, "full": sent + around}
    return extra[_policy(policy)]


def gather_bytes(params: int, world_size: int, bytes_per_element: int = 2) -> int:
    """Return the bytes one rank receives when ZeRO-3 gathers (or sends when it reduce-scatters) `params`
    parameters."""
    return params * bytes_per_element * (world_size - 1) // world_size


def zero_bytes(
    params: int, world_size: int, zero_stage: int, accumulation: int = 1, bytes_per_element: int = 2
) -> tuple[int, int]:
    """Return the bytes one rank sends in an optimizer step to gather weights, and to reduce gradients.

    Stage 0 all-reduces float32 gradients once and gathers nothing. Stage 1 all-reduces once, stage 2 after
    each micro-batch (DeepSpeed all-reduces its buckets there, twice a reduce-scatter), and both gather the
    updated weights once. Stage 3 gathers each block for its forward and for its backward pass and
    reduce-scatters, after each micro-batch. Models small enough to stay gathered send less.
    """
    once = gather_bytes(params, world_size, bytes_per_element)
    return {
        0: (0, 2 * gather_bytes(params, world_size, 4)),
        1: (once, 2 * once),
        2: (once, 2 * once * accumulation),
        3: (2 * once * accumulation, once * accumulation),
    }[zero_stage]


# ------------------------------------------------------------------------------------------------- throughput


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


def _blocks(shape: ModelShape, layers: int | None) -> int:
    """Return how many blocks stand at the first `layers` layers, with control blocks, which are evenly
    spread."""
    layers = shape.num_layers if layers is None else layers
    if not 0 <= layers <= shape.num_layers:
        raise ValueError(f"{layers} recomputed layers; the model has {shape.num_layers}")
    return layers - (-layers * shape.vace_layers // shape.num_layers)
