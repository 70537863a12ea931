"""Parameter groups, the optimizer registry and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimOptions:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """Optimizer; all states are fp32 and sharded by ZeRO from stage 1 on."""
    learning_rate: float = 1e-5
    """Peak learning rate; 1e-5 is usual for a full finetune of released weights."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"] = (
        "constant_with_warmup"
    )
    """Shape after the warm-up, over --steps; named and shaped as in transformers.get_scheduler."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    min_learning_rate: float = 0.0
    """Floor of cosine_with_min_lr; must be 0 for the other schedules."""
    weight_decay: float = 0.01
    """Decoupled decay of weight matrices and convolutions; norms, biases and modulation tables get none."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.999
    """AdamW's beta2."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. Must be above 0; inf only
    measures."""
    max_loss: float = math.inf
    """A video's loss above this (or not a number) keeps its step from updating any weight; inf lets only
    what is not finite do so."""
    max_skipped: int = 10
    """Steps in a row without an update after which the run ends."""


def check(options: OptimOptions, steps: int) -> None:
    """Raise ValueError for a value that would silently train something else than asked."""
    if not options.max_loss > 0 or options.max_skipped < 1:
        raise ValueError(
            f"--optim.max_loss {options.max_loss} must be above 0,"
            f" --optim.max_skipped {options.max_skipped} 1 or more"
        )
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"--optim.learning_rate {options.learning_rate} must be above 0 and finite")
    if not 0 <= options.warmup_steps <= steps:
        raise ValueError(
            f"--optim.warmup_steps {options.warmup_steps} must lie between 0 and --steps {steps}"
        )
    if options.min_learning_rate and options.schedule != "cosine_with_min_lr":
        raise ValueError(
            f"--optim.min_learning_rate needs --optim.schedule cosine_with_min_lr, not {options.schedule}"
        )
    if not 0 <= options.min_learning_rate <= options.learning_rate:
        raise ValueError(
            f"--optim.min_learning_rate {options.min_learning_rate} must lie between 0 and"
            f" --optim.learning_rate {options.learning_rate}"
        )
    if options.schedule == "constant" and options.warmup_steps:
        raise ValueError(
            "--optim.schedule constant has no warm-up; choose constant_with_warmup or --optim.warmup_steps 0"
        )
    if not options.grad_clip > 0:
        raise ValueError(
            f"--optim.grad_clip {options.grad_clip} must be above 0; use inf to measure without clipping"
        )
    for name, beta in (("beta1", options.beta1), ("beta2", options.beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"--optim.{name} {beta} must lie in [0, 1)")
    # Written so that nan, which is neither below nor above anything, is refused too.
    if not 0 <= options.weight_decay < math.inf:
        raise ValueError(f"--optim.weight_decay {options.weight_decay} must be 0 or more and finite")
    if not 0 < options.eps < math.inf:
        raise ValueError(f"--optim.eps {options.eps} must be above 0 and finite")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], shapes: dict[str, tuple[int, ...]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return one group with decay and one without, by the parameter's true shape.

    `shapes` maps names to full shapes: under ZeRO-3 a parameter's own shape is empty. Modulation tables are
    3-D but act as shifts and gates, so they count with the biases.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_matrix = len(shapes[name]) >= 2 and not name.endswith(("modulation", "emb_pos"))
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    # ZeRO hands the optimizer one flat fp32 tensor a group: the fused kernel is a single pass over it.
    return torch.optim.AdamW(
        groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimOptions], torch.optim.Optimizer]] = {
    "adamw": _adamw
}


def build_optimizer(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    """Return the optimizer that `options.name` names, over `groups`."""
    return OPTIMIZERS[options.name](groups, options)


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimOptions, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule over `steps` optimizer steps; stepped once after each update.

    The shapes of transformers.get_scheduler, whose import would read a thousand files on every rank.
    """
    warmup, floor = options.warmup_steps, options.min_learning_rate / options.learning_rate

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if options.schedule.startswith("constant"):
            return 1.0
        length = max(1, steps - warmup)
        if options.schedule == "linear":
            return max(0.0, (steps - step) / length)
        done = (step - warmup) / length
        return 0.5 * (1.0 + math.cos(math.pi * done)) * (1.0 - floor) + floor

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
