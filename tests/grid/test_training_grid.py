"""The debug variants through `Trainer.step` and DeepSpeed on 2 and 4 ranks: every ZeRO stage in every layout.

Part of `pytest -m grid`. Like tests/test_training.py, of which it is the rest: plain torch on one rank is the
reference, Adam's first moment after three steps holds every parameter's gradient.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Size, Tensor

from megawan import checkpoint
from megawan.models.variants import get_variant
from megawan.parity import POLICIES, layouts, relative_difference, worst_tensor
from tests.distributed import run_distributed
from tests.grid.cases import STAGES
from tests.training import plan_of, reference_run

pytestmark = [pytest.mark.grid, pytest.mark.timeout(3600)]

# 3 x 3 x 5 = 45 tokens. An epsilon far above rounding: see megawan.parity.OPTIM.
COMMON = (
    "--steps=3", "--seed=3", "--data.num_frames=9", "--data.prompt_dropout=0.3", "--optim.learning_rate=1e-2",
    "--optim.warmup_steps=1", "--optim.grad_clip=0.05", "--optim.eps=1e-5",
)  # fmt: skip
VARIANTS = {
    "debug": ("--model.variant=debug", "--data.height=48", "--data.width=80"),
    "debug-i2v": ("--model.variant=debug-i2v", "--data.height=48", "--data.width=80"),
    "debug-ti2v": ("--model.variant=debug-ti2v", "--data.height=96", "--data.width=160"),
}


def cases(variant: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Return every ZeRO stage in every layout; batch splits and recompute policies take turns."""
    every = layouts(world_size, get_variant(variant).config.num_heads, POLICIES[:1])
    degrees = sorted({(layout.ulysses, layout.ring) for layout in every})
    made = {}
    for stage in STAGES:
        for index, (ulysses, ring) in enumerate(degrees):
            splits = [layout for layout in every if (layout.ulysses, layout.ring) == (ulysses, ring)]
            layout = splits[stage % len(splits)]
            policy = POLICIES[(stage + index) % len(POLICIES)]
            made[f"{variant} zero {stage} {layout.describe(world_size)} {policy}"] = {
                "argv": [
                    *COMMON,
                    *VARIANTS[variant],
                    f"--deepspeed=ds_configs/zero{stage}.json",
                    f"--parallel.ulysses_degree={ulysses}",
                    f"--parallel.ring_degree={ring}",
                    f"--micro_batch={layout.micro_batch}",
                    f"--accumulation={layout.accumulation}",
                    f"--model.recompute={policy}",
                ]
            }
    return made


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_run(variant: str, world_size: int, tmp_path: Path) -> None:
    wanted = reference_run(plan_of(1, *COMMON, *VARIANTS[variant], "--micro_batch=4"))
    todo = {str(index): case for index, case in enumerate(cases(variant, world_size).values())}
    arguments = {"cases": todo, "output": str(tmp_path)}
    (runs, *_) = run_distributed(
        "tests.training_workers:train_cases", world_size, timeout=3000, arguments=arguments
    )
    moments = {name: value.flatten() for name, value in wanted.exp_avg.items()}
    rows = []
    for name, run in zip(cases(variant, world_size), runs.values(), strict=True):
        saved = checkpoint.StepWeights(Path(run["folder"]))
        assert sorted(saved.keys()) == sorted(wanted.masters)
        gradient, gradient_name = worst_tensor(flat_moments(saved), moments)
        master, master_name = worst_tensor({key: saved.load(key) for key in saved.keys()}, wanted.masters)
        rows.append(
            {
                "case": name,
                "loss": max(map(relative_difference, run["losses"], wanted.losses)),
                "grad_norm": max(map(relative_difference, run["grad_norms"], wanted.grad_norms)),
                "gradient": gradient,
                "gradient_name": gradient_name,
                "parameter": master,
                "parameter_name": master_name,
            }
        )
    figures = ("loss", "grad_norm", "gradient", "parameter")
    summary = {figure: max(row[figure] for row in rows) for figure in figures}
    print(f"step {variant} world {world_size}: {len(rows)} cases, worst", json.dumps(summary))
    assert [row for row in rows if not max(row[figure] for figure in figures) < 1e-5] == []


def flat_moments(saved: checkpoint.StepWeights) -> dict[str, Tensor]:
    return {key: saved.load_range("exp_avg", key, 0, Size(saved.shape(key)).numel()) for key in saved.keys()}
