"""The Wan video transformer: one forward for every variant, on one rank or many.

Parallelism touches it in two places: `context.shard` cuts the token sequence (and the rotary rows with it)
before the patch embedding, and `context.attend` replaces self-attention. Everything else is local to a token.

Letters: B batch, C latent channels, T H W latent grid, L tokens, l this rank's tokens, D width, N heads, K
head width, S text tokens, P numbers in an output token, R modulation rows (1, or 2 where some frames are
clean).
State-dict keys are Wan's own. Every parameter is used inside the forward of the module that owns it (ZeRO-3
gathers there), and `WanBlock` and `VaceBlock` are meant to be gathered whole (`LEAF_MODULES`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megawan import cost
from megawan.models.attention import select_attention
from megawan.models.compiling import compile_each_size
from megawan.models.gates import GATE_CODE
from megawan.models.heads import RMSNorm, zero_sum
from megawan.models.precision import LayerNorm, TanhGELU, WideLinear, modulated_norm, wide
from megawan.models.recompute import Keep, parse_recompute
from megawan.models.rope import RopeTables
from megawan.models.variants import WanConfig
from megawan.parallel.context import ContextParallel

Grid = tuple[int, int, int]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def token_grid(latent_shape: tuple[int, ...] | torch.Size, patch: Grid) -> Grid:
    """Return the tokens (t, h, w) of a latent [..., T, H, W]; raises ValueError if the patch does not fit."""
    sizes = tuple(latent_shape[-3:])
    if len(sizes) < 3 or any(size < 1 or size % side for size, side in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"latent of shape {tuple(latent_shape)}: T, H, W must be positive multiples of the patch {patch}"
        )
    t, h, w = (size // side for size, side in zip(sizes, patch, strict=True))
    return t, h, w


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """Return the tokens [B, L, P] of x [B, C, T, H, W], C fastest: the layout of head and loss target."""
    token_grid(x.shape, patch)
    pt, ph, pw = patch
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Return the latent [B, C, T, H, W] of tokens [B, L, P]; the inverse of `patchify`."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        tokens, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
    )


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return cos(t·w) | sin(t·w), float64 [..., dim]; w_j = 10000^(−j/(dim/2)), t on the 0..1000 scale."""
    half = dim // 2
    rates = torch.exp(
        torch.arange(half, dtype=torch.float64, device=timestep.device) * (-math.log(10000.0) / half)
    )
    angles = timestep.double().unsqueeze(-1) * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@dataclass(frozen=True)
class TokenLayout:
    """What the blocks know about this rank's tokens; nothing in it carries a gradient."""

    length: int
    """L, the true token count of the whole sample."""
    clean: int
    """How many of this rank's tokens, from its first, belong to clean frames."""
    rope: tuple[Tensor, Tensor]
    context: ContextParallel
    kernel: Attention

    @property
    def gate_by_weight(self) -> bool:
        """Whether the gates take their gradient from that of the weight before them."""
        return self.length >= cost.GATE_BY_WEIGHT_TOKENS

    @property
    def sent(self) -> bool:
        """Whether self-attention sends its q, k and v to other ranks, for their heads."""
        return self.context.ulysses_size > 1


class PatchEmbedding(nn.Module):
    """A linear map from a token's latent numbers to the width: the checkpoint's Conv3d, kernel = stride."""

    def __init__(self, channels: int, dim: int, patch: Grid) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, patches: Tensor) -> Tensor:
        """Return [B, l, D] from patches [B, l, C·patch], C slowest as in the convolution."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """CLIP features to width D; with two images, a learned position per CLIP token is added first."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            LayerNorm(dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, clip: Tensor) -> Tensor:
        """Return [B, rows, D] from clip [B, rows, image_dim]."""
        if self.emb_pos is not None:
            clip = clip + self.emb_pos
        return self.proj(clip)  # type: ignore[no-any-return]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [B, l, N, K] from x [B, l, N·K]."""
    return rearrange(x, "b l (n k) -> b l n k", n=heads)


class SelfAttention(nn.Module):
    """Rotary attention over the whole sequence; q and k are normalised over all heads together.

    The attention itself runs between `project` and the output projection `o`: see `WanBlock`.
    """

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], sent: bool, keep: Keep
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, each [B, l, N, K], from x [B, l, D]; sent: Ulysses will send them away."""
        q = self.norm_q(keep.linear(self.q, x), self.heads, rope)
        k = self.norm_k(keep.linear(self.k, x), self.heads, rope)
        return q, k, split_heads(keep.linear(self.v, x, sent), self.heads)


class CrossAttention(nn.Module):
    """Attention to the text and, in a model with an image branch, to the CLIP tokens; the sum is projected.

    No mask: every text row is attended, those past the prompt's end too, as in Wan's training.
    """

    def __init__(self, dim: int, heads: int, eps: float, image: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, kernel: Attention, keep: Keep) -> Tensor:
        """Return [B, l, D] from x [B, l, D], text [B, S, D] and image [B, rows, D] or None."""
        q = self.norm_q(keep.linear(self.q, x), self.heads)
        k = zero_sum(self.norm_k(keep.linear(self.k, text), self.heads))
        v = split_heads(keep.linear(self.v, text), self.heads)
        out = keep.cross_attention(q, k, v, kernel)
        if image is not None:
            k = zero_sum(self.norm_k_img(keep.linear(self.k_img, image), self.heads))
            v = split_heads(keep.linear(self.v_img, image), self.heads)
            out = out + keep.cross_attention(q, k, v, kernel)
        return keep.linear(self.o, out.flatten(2))


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the time shifts, scales and gates the first and last.

    compiled: torch.compile the two halves around the self-attention, whose communication stays outside, and
    the last gate.
    """

    output_is_read = False
    """Whether something in the module reads what `forward` returns here, so that a recomputation needs it."""

    def __init__(self, config: WanConfig, compiled: bool = False) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config.dim, config.num_heads, config.eps)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(
            config.dim, config.num_heads, config.eps, config.image_dim is not None
        )
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            TanhGELU(),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        # DeepSpeed's hooks sit on the module's call, outside both halves.
        self._first, self._second, self._gate = self.before_attention, self.after_attention, GATE_CODE
        if compiled:
            self._first, self._second = compile_each_size(self._first), compile_each_size(self._second)
            self._gate = GATE_CODE.compiled()

    def forward(
        self, x: Tensor, text: Tensor, image: Tensor | None, e0: Tensor, tokens: TokenLayout, keep: Keep
    ) -> Tensor:
        """Return [B, l, D] from x [B, l, D]; e0 [B, R, 6, D] is the projected time."""
        q, k, v = self._first(x, text.dtype, e0, tokens.clean, tokens.rope, tokens.sent, keep)
        out = keep.self_attention(q, k, v, tokens.kernel, tokens.context, tokens.length)
        clean, by_weight = tokens.clean, tokens.gate_by_weight
        x, h, gate = self._second(x, out, text, image, e0, clean, by_weight, tokens.kernel, keep)
        narrow = self.ffn[2]
        assert isinstance(narrow, nn.Linear)
        last, code = not self.output_is_read, self._gate
        return keep.gated_linear(narrow, h, x, gate, clean, by_weight=by_weight, last=last, code=code)

    def before_attention(
        self,
        x: Tensor,
        dtype: torch.dtype,
        e0: Tensor,
        clean: int,
        rope: tuple[Tensor, Tensor],
        sent: bool,
        keep: Keep,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return self-attention's q, k, v [B, l, N, K]."""
        shift, scale = (wide(self.modulation) + e0)[:, :, :2].unbind(2)
        y = modulated_norm(x, shift, scale, self.eps, clean, dtype)
        return self.self_attn.project(y, rope, sent, keep)

    def after_attention(
        self,
        x: Tensor,
        out: Tensor,
        text: Tensor,
        image: Tensor | None,
        e0: Tensor,
        clean: int,
        by_weight: bool,
        kernel: Attention,
        keep: Keep,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual x [B, l, D], the feed-forward's activation h [B, l, F] and its gate [B, R, D],
        from the block's input x [B, l, D] and self-attention's out [B, l, N, K]."""
        gate1, shift2, scale2, gate2 = (wide(self.modulation) + e0)[:, :, 2:].unbind(2)
        x = keep.gated_linear(self.self_attn.o, out.flatten(2), x, gate1, clean, by_weight=by_weight)
        x = x + self.cross_attn(self.norm3(x), text, image, kernel, keep)
        y = modulated_norm(x, shift2, scale2, self.eps, clean, text.dtype)
        widen, activation, _ = self.ffn
        return x, activation(keep.linear(widen, y)), gate2


class VaceBlock(WanBlock):
    """A block of VACE's side branch; its hint is added to the main stream."""

    output_is_read = True

    def __init__(self, config: WanConfig, first: bool, compiled: bool = False) -> None:
        super().__init__(config, compiled)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self,
        c: Tensor,
        x: Tensor,
        text: Tensor,
        image: Tensor | None,
        e0: Tensor,
        tokens: TokenLayout,
        keep: Keep,
    ) -> tuple[Tensor, Tensor]:
        """Return (hint, c), each [B, l, D]; only the first block reads x, the embedded main stream."""
        if self.before_proj is not None:
            c = keep.linear(self.before_proj, c) + x
        c = super().forward(c, text, image, e0, tokens, keep)
        # The last product: a recomputation ends before it.
        return self.after_proj(c.to(text.dtype)), c


LEAF_MODULES = (WanBlock, VaceBlock)


class Head(nn.Module):
    """Last norm, modulation by the unprojected time embedding, map to velocity tokens; all in float32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = WideLinear(config.dim, config.token_width)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, e: Tensor, clean: int) -> Tensor:
        """Return [B, l, P] from x [B, l, D] and e [B, R, D]."""
        shift, scale = (wide(self.modulation) + e.unsqueeze(2)).unbind(2)
        return self.head(modulated_norm(x, shift, scale, self.eps, clean, shift.dtype))  # type: ignore[no-any-return]


class WanModel(nn.Module):
    """The transformer of `config`. Its values are left to `initial` or a checkpoint.

    attention: a kernel(q, k, v) on [B, L, N, K]; None chooses the fastest for the device on first use.
    recompute: what the backward pass recomputes, see `recompute.parse_recompute`.
    offload: hold what the recomputed blocks keep in CPU memory.
    compiled: torch.compile each block's two halves.
    wide_residual: keep the residual stream in float32 under bfloat16 weights, as Wan's own inference code
    does; by default it has the weights' dtype (each addition is still summed in float32), which halves its
    memory.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        attention: Attention | None = None,
        recompute: str = "none",
        offload: bool = False,
        compiled: bool = False,
        wide_residual: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.recompute = parse_recompute(recompute, config.num_layers, offload, compiled)
        self.wide_residual = wide_residual
        self.rope = RopeTables(config.head_dim)
        self._best: dict[tuple[str, torch.dtype, bool], Attention] = {}
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), TanhGELU(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(WideLinear(config.freq_dim, dim), nn.SiLU(), WideLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config, compiled) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.pos_embed_seq_len)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_in_dim, dim, config.patch_size)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, i == 0, compiled) for i in range(len(config.vace_layers))
            )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        context: ContextParallel | None = None,
        clean_frames: int = 0,
        clip: Tensor | None = None,
        condition: Tensor | None = None,
        vace: Tensor | None = None,
        vace_scale: float = 1.0,
    ) -> Tensor:
        """Return this rank's velocity tokens [B, l, P] in `patchify`'s layout, float32 or float64.

        latents: noisy latent [B, C, T, H, W]; timestep: float32 [B] on the 0..1000 scale;
        text: [B, S, text_dim], S at most text_len (Wan pads prompts to exactly text_len with zero rows).
        clean_frames: leading latent frames that are given clean and get time 0 (TI2V: 1 with an image).
        clip: [B, 257 or 514, image_dim]; condition: [B, in_dim − C, T, H, W], concatenated after the latent;
        vace: [B, vace_in_dim, T, H, W], whose hints are added `vace_scale` times.
        Raises ValueError for an input that does not fit the configuration.
        """
        self._check(latents, timestep, text, clean_frames, clip, condition, vace)
        config = self.config
        context = context or ContextParallel.single()
        grid = token_grid(latents.shape, config.patch_size)
        dtype = self.patch_embedding.weight.dtype
        tokens = self._layout(grid, clean_frames, context, latents.device, dtype)

        channels = latents if condition is None else torch.cat((latents, condition.to(latents.dtype)), dim=1)
        x = self.patch_embedding(self._local_patches(channels, context))
        text_tokens = self.text_embedding(text.to(dtype))
        image_tokens = None if clip is None else self.img_emb(clip.to(dtype))
        e = self.time_embedding(
            self._times(timestep, clean_frames).to(torch.promote_types(dtype, torch.float32))
        )
        e0 = self.time_projection(e).unflatten(-1, (6, config.dim))
        if self.wide_residual:
            x = wide(x)

        main, c = x, None if vace is None else self.vace_patch_embedding(self._local_patches(vace, context))
        for index, block in enumerate(self.blocks):
            hint = None
            if c is not None and index in config.vace_layers:
                place = config.vace_layers.index(index)
                hint, c = self.recompute.run(
                    index, self.vace_blocks[place], c, main, text_tokens, image_tokens, e0, tokens
                )
            x = self.recompute.run(index, block, x, text_tokens, image_tokens, e0, tokens)
            if hint is not None:
                x = x + hint * vace_scale
        return self.head(x, e, tokens.clean)  # type: ignore[no-any-return]

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        context: ContextParallel | None = None,
        clean_frames: int = 0,
        clip: Tensor | None = None,
        condition: Tensor | None = None,
        vace: Tensor | None = None,
        vace_scale: float = 1.0,
    ) -> Tensor:
        """Return the whole velocity [B, C, T, H, W] on every rank: `forward`, gathered and unpatchified."""
        tokens = self(
            latents,
            timestep,
            text,
            context=context,
            clean_frames=clean_frames,
            clip=clip,
            condition=condition,
            vace=vace,
            vace_scale=vace_scale,
        )
        grid = token_grid(latents.shape, self.config.patch_size)
        whole = (context or ContextParallel.single()).gather(tokens, math.prod(grid))
        return unpatchify(whole, grid, self.config.patch_size)

    def _local_patches(self, x: Tensor, context: ContextParallel) -> Tensor:
        """Return this rank's rows [B, l, C·patch], C slowest; a rank embeds only its own."""
        pt, ph, pw = self.config.patch_size
        patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return context.shard(patches)

    def _times(self, timestep: Tensor, clean_frames: int) -> Tensor:
        """Return the rows' sinusoids, float64 [B, R, freq_dim]: of (t), or of (0, t) with clean frames."""
        rows = timestep.unsqueeze(1)
        if clean_frames:
            rows = torch.cat((torch.zeros_like(rows), rows), dim=1)
        return timestep_embedding(rows, self.config.freq_dim)

    def _layout(
        self,
        grid: Grid,
        clean_frames: int,
        context: ContextParallel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> TokenLayout:
        length = math.prod(grid)
        local = context.local_length(length)
        start, stop = context.local_range(length)
        clean_tokens = clean_frames // self.config.patch_size[0] * grid[1] * grid[2]
        clean = min(max(clean_tokens - start, 0), local)
        rope = self.rope.rows(grid, start, stop, local, device, torch.promote_types(dtype, torch.float32))
        return TokenLayout(length, clean, rope, context, self._kernel(device, dtype, context.ring_size > 1))

    def _kernel(self, device: torch.device, dtype: torch.dtype, ring: bool) -> Attention:
        """Return the kernel that was given, or the best one for this device and dtype.

        A ring and a policy that keeps attention's result need one with a log-sum-exp.
        """
        if self.attention is not None:
            return self.attention
        key = (device.type, dtype, ring or self.recompute.needs_lse)
        if key not in self._best:
            self._best[key] = select_attention(
                "auto", device.type, dtype, head_dim=self.config.head_dim, need_lse=key[2]
            )
        return self._best[key]

    def _check(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        clean_frames: int,
        clip: Tensor | None,
        condition: Tensor | None,
        vace: Tensor | None,
    ) -> None:
        """Raise ValueError where an input does not fit the configuration; reads shapes only."""
        config = self.config
        if latents.ndim != 5:
            raise ValueError(f"latents must be [B, C, T, H, W], not {tuple(latents.shape)}")
        batch, channels, frames = latents.shape[:3]
        extra = 0 if condition is None else condition.shape[1]
        if channels + extra != config.in_dim:
            raise ValueError(
                f"latents have {channels} channels and the condition {extra}:"
                f" the model embeds in_dim {config.in_dim} together"
            )
        if condition is not None and condition.shape != (batch, extra, *latents.shape[2:]):
            raise ValueError(
                f"condition {tuple(condition.shape)} and latents {tuple(latents.shape)} must share B, T, H, W"
            )
        if tuple(timestep.shape) != (batch,):
            raise ValueError(f"timestep must be [{batch}], one per sample, not {tuple(timestep.shape)}")
        if (
            text.ndim != 3
            or text.shape[0] != batch
            or text.shape[2] != config.text_dim
            or text.shape[1] > config.text_len
        ):
            raise ValueError(
                f"text must be [{batch}, S <= {config.text_len}, {config.text_dim}], not {tuple(text.shape)}"
            )
        if not 0 <= clean_frames <= frames or clean_frames % config.patch_size[0]:
            raise ValueError(
                f"clean_frames {clean_frames} must be whole patches, from 0 to the latent's {frames} frames"
            )
        if (clip is None) != (config.image_dim is None):
            has = "needs" if clip is None else "has no image branch for"
            raise ValueError(
                f"a {config.model_type} model with image_dim {config.image_dim} {has} clip features"
            )
        if clip is not None and tuple(clip.shape) != (batch, config.clip_tokens, config.image_dim):
            wanted = [batch, config.clip_tokens, config.image_dim]
            raise ValueError(f"clip must be {wanted}, not {list(clip.shape)}")
        if (vace is None) != (not config.vace_layers):
            verb = "needs a" if vace is None else "takes no"
            raise ValueError(f"a model with vace_layers {config.vace_layers} {verb} vace input")
        if vace is not None and tuple(vace.shape) != (batch, config.vace_in_dim, *latents.shape[2:]):
            wanted = [batch, config.vace_in_dim, *latents.shape[2:]]
            raise ValueError(f"vace must be {wanted}, not {list(vace.shape)}")
