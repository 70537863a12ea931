"""The implementations that are measured against each other, as training steps over the same weights."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from megawan.benchmark.problem import Inputs, Problem
from megawan.flow.loss import flow_loss
from megawan.models.attention import select_attention
from megawan.models.keys import to_diffusers
from megawan.models.wan import WanModel, patchify
from megawan.parallel.kernel import AttentionKernel

OURS, DIFFUSERS, DIFFSYNTH = "ours", "diffusers", "diffsynth"
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """Which implementation, and how it runs."""

    framework: str
    policy: str = "none"
    compiled: bool = False

    @property
    def label(self) -> str:
        """The name in tables, such as `ours selective compiled`."""
        return f"{self.framework} {self.policy}{' compiled' if self.compiled else ''}"


@dataclass
class Arm:
    """One implementation, ready to step."""

    kind: Kind
    model: nn.Module
    loss: Callable[[], Tensor]
    """The forward pass with its loss."""
    optimizer: torch.optim.Optimizer | None

    def step(self) -> Tensor:
        """Take one step and return the loss; gradients are gone afterwards."""
        loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()


def available_peers() -> list[str]:
    """Return the other implementations that can be imported here."""
    modules = {DIFFUSERS: "diffusers", DIFFSYNTH: "diffsynth"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]


def build(kind: Kind, source: WanModel, problem: Problem, inputs: Inputs, optimizer: bool) -> Arm:
    """Return the arm; its parameters are those of `source`, storage and all.

    Raises ValueError for a policy that the implementation does not have.
    """
    makers = {OURS: _ours, DIFFUSERS: _diffusers, DIFFSYNTH: _diffsynth}
    if kind.framework != OURS and kind.policy not in ("none", "full"):
        raise ValueError(f"{kind.framework} has no recompute policy {kind.policy!r}; legal: none, full")
    model, loss = makers[kind.framework](kind, source, problem, inputs)
    model.train()
    adam = (
        torch.optim.AdamW(model.parameters(), lr=0.0) if optimizer else None
    )  # weights are shared: no drift
    return Arm(kind, model, loss, adam)


def _ours(
    kind: Kind, source: WanModel, problem: Problem, inputs: Inputs
) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = problem.config
    dtype, device = inputs.x_t.dtype, inputs.x_t.device
    need_lse = kind.policy in ("selective", "attention") or problem.parts > 1
    kernel = select_attention("auto", device.type, dtype, head_dim=config.head_dim, need_lse=need_lse)
    if problem.parts > 1:
        assert isinstance(kernel, AttentionKernel)
        kernel = PartAttention(kernel, problem.parts)  # type: ignore[assignment]
    with torch.device("meta"):
        model = WanModel(config, attention=kernel, recompute=kind.policy, compiled=kind.compiled)
    model.load_state_dict(dict(source.named_parameters()), assign=True)

    def loss() -> Tensor:
        pred = model(inputs.x_t, inputs.timestep, inputs.text)
        target = patchify(inputs.target, config.patch_size)
        tokens = problem.tokens
        return flow_loss(pred, target, inputs.weight, valid=None, valid_tokens=tokens, cp_size=1).loss

    return model, loss


def _diffusers(
    kind: Kind, source: WanModel, problem: Problem, inputs: Inputs
) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = problem.config
    cls = importlib.import_module("diffusers").WanTransformer3DModel
    with torch.device("meta"):
        model = cls(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    # Its rotary tables alone are no parameters.
    rope = type(model.rope)(config.head_dim, config.patch_size, model.config.rope_max_seq_len)
    model.rope = rope.to(inputs.x_t.device)
    weights = {to_diffusers(key): value for key, value in source.named_parameters()}
    model.load_state_dict(weights, assign=True)
    if kind.policy == "full":
        model.enable_gradient_checkpointing(recompute_as(problem))
    if kind.compiled:
        model.compile_repeated_blocks(dynamic=False)

    def loss() -> Tensor:
        with part_of(problem):
            pred = model(inputs.x_t, inputs.timestep, inputs.text, return_dict=False)[0]
        return F.mse_loss(pred.float(), inputs.target) * inputs.weight.mean()

    return model, loss


def _diffsynth(
    kind: Kind, source: WanModel, problem: Problem, inputs: Inputs
) -> tuple[nn.Module, Callable[[], Tensor]]:
    config = problem.config
    module = importlib.import_module("diffsynth.models.wan_video_dit")
    with torch.device("meta"):
        model = module.WanModel(
            dim=config.dim,
            in_dim=config.in_dim,
            ffn_dim=config.ffn_dim,
            out_dim=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            eps=config.eps,
            patch_size=config.patch_size,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            has_image_input=False,
        )
    model.freqs = module.precompute_freqs_cis_3d(config.head_dim)
    model.load_state_dict(dict(source.named_parameters()), assign=True)
    if kind.compiled:
        for block in model.blocks:
            block.compile(dynamic=False)

    recompute = recompute_as(problem) if kind.policy == "full" else None

    def loss() -> Tensor:
        with part_of(problem):
            pred = _diffsynth_forward(model, module, inputs, recompute)
        return F.mse_loss(pred.float(), inputs.target) * inputs.weight.mean()

    return model, loss


def _diffsynth_forward(
    model: Any, module: Any, inputs: Inputs, recompute: Callable[..., Any] | None
) -> Tensor:
    """Return the velocity as DiffSynth's training computes it; the model's own forward is not what it
    trains through. recompute: calls a block that keeps nothing."""
    x = inputs.x_t
    times = module.sinusoidal_embedding_1d(model.freq_dim, inputs.timestep.to(x.dtype))
    t = model.time_embedding(times)
    t_mod = model.time_projection(t).unflatten(1, (6, model.dim))
    context = model.text_embedding(inputs.text)
    x = model.patchify(x)
    f, h, w = x.shape[2:]
    x = x.flatten(2).transpose(1, 2).contiguous()
    frames, rows, columns = model.freqs
    freqs = torch.cat(
        (
            frames[:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            rows[:h].view(1, h, 1, -1).expand(f, h, w, -1),
            columns[:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ),
        dim=-1,
    )
    freqs = freqs.reshape(f * h * w, 1, -1).to(x.device)
    for block in model.blocks:
        inputs_of_block = x, context, t_mod, freqs
        x = recompute(block, *inputs_of_block) if recompute else block(*inputs_of_block)
    velocity: Tensor = model.unpatchify(model.head(x, t), (f, h, w))
    return velocity


@dataclass(frozen=True)
class PartAttention:
    """Self-attention of one rank of Ulysses without its communication: `parts` times the tokens, 1/parts of
    the heads. The numbers are meaningless, their count and time are right."""

    kernel: AttentionKernel
    parts: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, l, N, K]."""
        return (
            regrouped(self.kernel(*self._part(q, k, v)), -self.parts)
            if self._own(q, k)
            else self.kernel(q, k, v)
        )

    def forward_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse), lse in the shape of the part."""
        if not self._own(q, k):
            return self.kernel.forward_lse(q, k, v)
        out, lse = self.kernel.forward_lse(*self._part(q, k, v))
        return regrouped(out, -self.parts), lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Triple:
        """Return (dq, dk, dv)."""
        if not self._own(q, k):
            return self.kernel.backward(dout, q, k, v, out, lse)
        dout, q, k, v, out = self._part(dout, q, k, v, out)
        dq, dk, dv = self.kernel.backward(dout, q, k, v, out, lse)
        return regrouped(dq, -self.parts), regrouped(dk, -self.parts), regrouped(dv, -self.parts)

    def _own(self, q: Tensor, k: Tensor) -> bool:
        return q.shape[1] == k.shape[1]

    def _part(self, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(regrouped(x, self.parts) for x in tensors)


def regrouped(x: Tensor, parts: int) -> Tensor:
    """Return x [B, L, N, K] as [B, L·parts, N/parts, K]; negative parts undo it."""
    batch, tokens, heads, width = x.shape
    if parts < 0:
        return x.reshape(batch, tokens // -parts, heads * -parts, width)
    return x.reshape(batch, tokens * parts, heads // parts, width)


def part_of(problem: Problem) -> AbstractContextManager[object]:
    """Return what others' forward pass runs under: self-attention of one part, where there are parts."""
    return PartMode(problem.parts) if problem.parts > 1 else contextlib.nullcontext()


def recompute_as(problem: Problem) -> Callable[..., Any]:
    """Return full checkpointing, function(block, *inputs), whose recomputation runs as the first pass did; a
    mode that is on during the backward pass would not reach it."""
    return functools.partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), part_of(problem))
    )


class PartMode(TorchFunctionMode):
    """While it is entered, others' self-attention is that of one part, as `PartAttention` does to ours."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `function`, with self-attention regrouped."""
        named = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention:
            return function(*args, **named)
        q, k, v = (*args, *(named.pop(name) for name in ("query", "key", "value") if name in named))[:3]
        if q.shape[2] != k.shape[2]:
            return function(q, k, v, **named)
        q, k, v = (regrouped(x.transpose(1, 2), self.parts).transpose(1, 2) for x in (q, k, v))
        out = function(q, k, v, **named)
        return regrouped(out.transpose(1, 2), -self.parts).transpose(1, 2)
