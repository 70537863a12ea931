"""What one benchmark trains: a model's sizes, a video's, and the inputs that every implementation gets."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megawan import cost
from megawan.models.variants import WanConfig, get_variant
from megawan.rng import generator_at

Latent = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """One model on one video, batch 1."""

    name: str
    config: WanConfig
    latent: Latent
    """(T, H, W) of the latent."""
    parts: int = 1
    """Attention sees `parts` times the tokens with 1/parts of the heads: one rank's share of Ulysses."""

    @property
    def tokens(self) -> int:
        """Tokens that the linear layers see."""
        return math.prod(s // p for s, p in zip(self.latent, self.config.patch_size, strict=True))

    @property
    def flops(self) -> int:
        """Model FLOPs of forward and backward (cost.py); recompute is not counted."""
        flops = cost.train_flops(self.shape, self.tokens)
        attention = self.config.num_layers * cost.block_flops(self.shape, self.tokens).self_attention
        return flops + 3 * attention * (self.parts - 1)

    def vector(self, dtype: torch.dtype) -> int:
        """Return the bytes of one hidden vector a token."""
        return self.tokens * self.config.dim * dtype.itemsize

    @property
    def shape(self) -> cost.ModelShape:
        """The sizes that cost.py reads."""
        c = self.config
        return cost.ModelShape(
            c.dim,
            c.ffn_dim,
            c.num_heads,
            c.num_layers,
            c.in_dim,
            c.out_dim,
            c.text_len,
            c.text_dim,
            c.freq_dim,
        )

    def describe(self) -> str:
        """Return the sizes in one line."""
        c = self.config
        part = (
            f", attention of {c.num_heads // self.parts} heads x {self.tokens * self.parts}"
            if self.parts > 1
            else ""
        )
        return (
            f"{self.name}: dim {c.dim}, ffn {c.ffn_dim}, {c.num_heads} heads, {c.num_layers} blocks,"
            f" {self.tokens} tokens{part}, {c.text_len} text tokens"
        )


@dataclass(frozen=True)
class Inputs:
    """One noised video and what its loss needs, on the device."""

    x_t: Tensor
    """[1, C, T, H, W] in the weights' dtype."""
    timestep: Tensor
    """float32 [1]."""
    text: Tensor
    """[1, S, text_dim] in the weights' dtype."""
    target: Tensor
    """float32 [1, C, T, H, W]."""
    weight: Tensor
    """float32 [1]."""


def make_inputs(problem: Problem, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs that depend on the problem alone."""
    config, generator = problem.config, generator_at(0, problem.name)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    video = (1, config.out_dim, *problem.latent)
    return Inputs(
        x_t=draw(*video).to(dtype),
        timestep=torch.full((1,), 611.0, device=device),
        text=draw(1, config.text_len, config.text_dim).to(dtype),
        target=draw(*video),
        weight=torch.ones(1, device=device),
    )


def cut(variant: str, layers: int) -> WanConfig:
    """Return the configuration of a published variant with only `layers` blocks."""
    return replace(get_variant(variant).config, num_layers=layers)


SMALL = WanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=2, text_dim=512)
CPU_PROBLEMS = (
    Problem("small", SMALL, (4, 32, 32)),
    Problem("1.3B-block", cut("t2v-1.3B", 1), (8, 32, 32)),
    Problem("1.3B-block-4k", cut("t2v-1.3B", 1), (16, 32, 32)),
)
GPU_PROBLEMS = (
    Problem("t2v-1.3B", get_variant("t2v-1.3B").config, (21, 60, 104)),  # 81 x 480 x 832
    Problem("ti2v-5B", get_variant("ti2v-5B").config, (31, 44, 80)),  # 121 x 704 x 1280
    # 37,440 tokens over 8 ranks: 4,680 in the linear layers, 5 heads x 37,440 in attention. 16 of 40 blocks
    # are what 80 GB hold of every implementation; of 4, embeddings and head would be 2 % of a step.
    Problem("t2v-14B-cp8", cut("t2v-14B", 16), (13, 30, 48), parts=8),
)
