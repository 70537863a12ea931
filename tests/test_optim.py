"""Groups, AdamW and schedules against what their definitions say."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from megawan import optim
from megawan.models.variants import get_variant
from megawan.models.wan import WanModel
from megawan.optim import OptimOptions
from megawan.rng import generator_at

VARIANTS = ("debug", "debug-i2v", "debug-flf2v", "debug-ti2v", "debug-vace")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_in_exactly_one_group(variant: str) -> None:
    with torch.device("meta"):
        model = WanModel(get_variant(variant).config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    decayed, plain = optim.parameter_groups(model.named_parameters(), shapes, 0.25)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    grouped = [names[id(parameter)] for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(grouped) == sorted(shapes)

    # The rule by kind of module instead of by shape: what multiplies features is decayed, nothing else.
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or name.endswith("patch_embedding")
    }
    assert {names[id(parameter)] for parameter in decayed["params"]} == matrices
    spared = [names[id(parameter)] for parameter in plain["params"]]
    assert any(name.endswith("modulation") for name in spared) and any("norm" in name for name in spared)
    assert any(name.endswith("emb_pos") for name in spared) == (variant == "debug-flf2v")


def test_groups_go_by_the_true_shape_of_a_sharded_parameter() -> None:
    matrix, bias = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    groups = optim.parameter_groups([("w", matrix), ("b", bias)], {"w": (4, 4), "b": (4,)}, 0.5)
    assert [[one is matrix for one in group["params"]] for group in groups] == [[True], [False]]
    (only,) = optim.parameter_groups([("b", bias)], {"b": (4,)}, 0.5)
    assert only["weight_decay"] == 0.0, "an empty group is left out"


OPTIONS = OptimOptions(learning_rate=0.02, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-3)


def trained(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> list[Tensor]:
    """Return two parameters, one of each group, after four steps of given gradients, float64."""
    start = [torch.randn(5, 3, generator=generator_at(0, place), dtype=torch.float64) for place in range(2)]
    matrix, table = (nn.Parameter(value) for value in start)
    shapes = {"w": (5, 3), "modulation": (5, 3)}
    groups = optim.parameter_groups([("w", matrix), ("modulation", table)], shapes, OPTIONS.weight_decay)
    optimizer = make(groups)
    for step in range(4):
        for parameter in (matrix, table):
            parameter.grad = gradient(step)
        optimizer.step()
    return [matrix.detach(), table.detach()]


def gradient(step: int) -> Tensor:
    return torch.randn(5, 3, generator=generator_at(1, step), dtype=torch.float64)


def test_adamw_is_torchs_own() -> None:
    found = trained(lambda groups: optim.build_optimizer(groups, OPTIONS))
    wanted = trained(
        lambda groups: torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-3, foreach=False)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_adamw_is_its_published_formula() -> None:
    # Loshchilov and Hutter, algorithm 2, with the decay multiplied by the learning rate as torch does.
    found = trained(lambda groups: optim.build_optimizer(groups, OPTIONS))
    for place, decay in enumerate((0.3, 0.0)):
        theta = torch.randn(5, 3, generator=generator_at(0, place), dtype=torch.float64)
        m = v = torch.zeros_like(theta)
        for step in range(4):
            g = gradient(step)
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            hatted = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-3)
            theta = theta - 0.02 * hatted - 0.02 * decay * theta
        torch.testing.assert_close(found[place], theta, rtol=1e-12, atol=1e-12)


# Learning rate / peak at step s of `steps` after the warm-up of w steps; r is the floor / peak.


def cosine(s: int, w: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (s - w) / (steps - w)))


SHAPES: dict[str, Callable[[int, int, int, float], float]] = {
    "constant": lambda s, w, steps, r: 1.0,
    "constant_with_warmup": lambda s, w, steps, r: 1.0,
    "linear": lambda s, w, steps, r: (steps - s) / (steps - w),
    "cosine": lambda s, w, steps, r: cosine(s, w, steps),
    "cosine_with_min_lr": lambda s, w, steps, r: r + (1 - r) * cosine(s, w, steps),
}


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", SHAPES)
def test_every_step_has_the_schedules_learning_rate(schedule: str, warmup: int) -> None:
    warmup, floor, steps = warmup * (schedule != "constant"), 0.02 * (schedule == "cosine_with_min_lr"), 11
    options = OptimOptions(
        learning_rate=0.1,
        schedule=schedule,
        warmup_steps=warmup,
        min_learning_rate=floor,  # type: ignore[arg-type]
    )
    optim.check(options, steps)
    parameter = nn.Parameter(torch.zeros(2))
    ours = optim.build_optimizer([{"params": [parameter]}], options)
    theirs = torch.optim.SGD([parameter], lr=0.1)
    built = optim.build_schedule(ours, options, steps)
    reference = get_scheduler(
        schedule, theirs, warmup, steps, {"min_lr": floor} if schedule == "cosine_with_min_lr" else None
    )
    for step in range(steps):
        (found,), (other,) = built.get_last_lr(), reference.get_last_lr()
        factor = step / warmup if step < warmup else SHAPES[schedule](step, warmup, steps, floor / 0.1)
        assert found == pytest.approx(0.1 * factor, rel=1e-12) and found == other
        assert ours.param_groups[0]["lr"] == found
        ours.step()
        theirs.step()
        built.step()
        reference.step()


ILL: dict[str, dict[str, Any]] = {
    "learning_rate 0": {"learning_rate": 0.0},
    "learning_rate -1": {"learning_rate": -1.0},
    "learning_rate nan": {"learning_rate": math.nan},
    "learning_rate inf": {"learning_rate": math.inf},
    "warmup_steps -1": {"warmup_steps": -1},
    "warmup_steps 101": {"warmup_steps": 101},
    "min_learning_rate needs": {"min_learning_rate": 1e-6, "schedule": "cosine"},
    "min_learning_rate 1.0": {"min_learning_rate": 1.0, "schedule": "cosine_with_min_lr"},
    "min_learning_rate -1.0": {"min_learning_rate": -1.0, "schedule": "cosine_with_min_lr"},
    "min_learning_rate nan": {"min_learning_rate": math.nan, "schedule": "cosine_with_min_lr"},
    "schedule constant": {"schedule": "constant", "warmup_steps": 1},
    "grad_clip 0.0": {"grad_clip": 0.0},
    "grad_clip -1.0": {"grad_clip": -1.0},
    "grad_clip nan": {"grad_clip": math.nan},
    "beta1 1.0": {"beta1": 1.0},
    "beta1 -0.1": {"beta1": -0.1},
    "beta2 1.0": {"beta2": 1.0},
    "beta2 nan": {"beta2": math.nan},
    "weight_decay -0.1": {"weight_decay": -0.1},
    "weight_decay nan": {"weight_decay": math.nan},
    "weight_decay inf": {"weight_decay": math.inf},
    "eps 0.0": {"eps": 0.0},
    "eps nan": {"eps": math.nan},
    "eps inf": {"eps": math.inf},
}


@pytest.mark.parametrize("said", ILL)
def test_an_ill_option_is_named_in_one_line(said: str) -> None:
    with pytest.raises(ValueError, match=f"^--optim.{said.replace('.', '[.]')}") as refusal:
        optim.check(OptimOptions(**ILL[said]), 100)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_clip": math.inf},
        {"warmup_steps": 100},
        {"weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0},
        {"schedule": "cosine_with_min_lr", "min_learning_rate": 1e-5},
        {"schedule": "constant"},
    ],
)
def test_options_at_their_limits_are_taken(changes: dict[str, Any]) -> None:
    optim.check(dataclasses.replace(OptimOptions(), **changes), 100)
