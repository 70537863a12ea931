"""The layout never changes the numbers: ZeRO stages, Ulysses, ring, data parallel and accumulation train one
run.

A two-rank gloo group trains every case through the real DeepSpeed engine; plain torch on one rank is the
reference. Adam's first moment after the steps holds every parameter's gradient, so a wrong factor shows even
where Adam's update would hide it.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Size, Tensor

from megawan import checkpoint
from megawan.parity import worst_tensor
from tests.distributed import run_distributed
from tests.training import Reference, plan_of, reference_run

# 3 x 3 x 5 = 45 tokens: no number of ranks divides them. Clipping bites at every step. Adam's epsilon is
# above rounding: it would otherwise turn the rounding of a zero gradient into a whole step.
COMMON = (
    "--steps=3", "--seed=3", "--data.num_frames=9", "--data.height=48", "--data.width=80",
    "--data.prompt_dropout=0.3", "--optim.learning_rate=1e-3", "--optim.warmup_steps=2",
    "--optim.grad_clip=0.05", "--optim.eps=1e-6",
    "--validation.every=1", "--validation.samples=3", "--validation.levels=5",
)  # fmt: skip
TI2V = ("--model.variant=debug-ti2v", "--data.height=64", "--data.width=96")

CASES: dict[str, tuple[str, ...]] = {
    "zero3 ulysses recompute": ("--micro_batch=4", "--parallel.ulysses_degree=2", "--model.recompute=full"),
    "zero3 ulysses accumulation": ("--micro_batch=2", "--accumulation=2", "--parallel.ulysses_degree=2"),
    "zero3 ulysses attention": (
        *("--micro_batch=4", "--parallel.ulysses_degree=2", "--model.recompute=attention:4,selective"),
        "--model.offload_activations",
    ),
    "zero3 ring": ("--micro_batch=4", "--parallel.ring_degree=2", "--model.recompute=full:2"),
    "zero3 dp": ("--micro_batch=2",),
    "zero2 ulysses": ("--deepspeed=ds_configs/zero2.json", "--micro_batch=4", "--parallel.ulysses_degree=2"),
    "zero2 ring selective": (
        *("--deepspeed=ds_configs/zero2.json", "--micro_batch=4", "--parallel.ring_degree=2"),
        "--model.recompute=selective",
    ),
    "zero2 dp accumulation": ("--deepspeed=ds_configs/zero2.json", "--micro_batch=1", "--accumulation=2"),
    "zero1 ring": ("--deepspeed=ds_configs/zero1.json", "--micro_batch=4", "--parallel.ring_degree=2"),
    "zero0 ulysses": ("--deepspeed=ds_configs/zero0.json", "--micro_batch=4", "--parallel.ulysses_degree=2"),
    "zero0 dp": ("--deepspeed=ds_configs/zero0.json", "--micro_batch=2"),
    "ti2v zero3 ulysses": (*TI2V, "--micro_batch=4", "--parallel.ulysses_degree=2"),
    "ti2v zero3 ring": (*TI2V, "--micro_batch=2", "--accumulation=2", "--parallel.ring_degree=2"),
}
RESUMED: dict[str, tuple[str, str]] = {
    # name of the resumed case: (the case whose layout it has, the case whose step-2 checkpoint it continues)
    "zero3 ulysses from zero3 ulysses": ("zero3 ulysses recompute", "zero3 ulysses recompute"),
    "zero3 dp from zero1 ring": ("zero3 dp", "zero1 ring"),
    "zero2 ulysses from zero3 dp": ("zero2 ulysses", "zero3 dp"),
    "zero0 dp from zero2 ulysses": ("zero0 dp", "zero2 ulysses"),
    "zero1 ring from zero0 dp": ("zero1 ring", "zero0 dp"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("training")
    cases: dict[str, dict[str, Any]] = {name: {"argv": [*COMMON, *argv]} for name, argv in CASES.items()}
    sources = sorted({source for _, source in RESUMED.values()})
    for source in sources:
        cases[f"{source} until 2"] = {"argv": [*COMMON, *CASES[source]], "stop": 2}
    for name, (layout, source) in RESUMED.items():
        folder = root / f"{source} until 2" / "step_0000002"
        # Looking at held-out samples on the way must not change a bit of what is trained.
        cases[name] = {"argv": [*COMMON, *CASES[layout]], "resume": str(folder), "look": True}
    (results, *_) = run_distributed(
        "tests.training_workers:train_cases", 2, timeout=300, arguments={"cases": cases, "output": str(root)}
    )
    return results


@pytest.fixture(scope="module")
def references() -> dict[bool, Reference]:
    return {
        ti2v: reference_run(plan_of(1, *COMMON, *(TI2V if ti2v else ()), "--micro_batch=4"))
        for ti2v in (False, True)
    }


def test_the_reference_holds_samples_out_only_where_asked() -> None:
    """As tests/grid, which runs seldom, does not."""
    assert not reference_run(plan_of(1, *COMMON, "--validation.every=0", "--micro_batch=4")).held_out


@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_the_reference_run(
    name: str, trained: dict[str, Any], references: dict[bool, Reference]
) -> None:
    wanted, found = references[name.startswith("ti2v")], trained[name]
    assert found["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    assert found["grad_norms"] == pytest.approx(wanted.grad_norms, rel=1e-5)
    assert found["held_out"] == pytest.approx(wanted.held_out, rel=1e-5)
    saved = checkpoint.StepWeights(Path(found["folder"]))
    assert sorted(saved.keys()) == sorted(wanted.masters)
    moments = {name: value.flatten() for name, value in wanted.exp_avg.items()}
    difference, where = worst_tensor(flat_tensors(saved, "exp_avg"), moments)
    assert difference < 1e-5, f"gradient of {where}"
    difference, where = worst_tensor({key: saved.load(key) for key in wanted.masters}, wanted.masters)
    assert difference < 1e-5, where


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_takes_the_same_last_step(name: str, trained: dict[str, Any]) -> None:
    layout, source = RESUMED[name]
    whole, resumed = trained[layout], trained[name]
    assert resumed["start"] == 2
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    assert resumed["grad_norms"] == pytest.approx(whole["grad_norms"][2:], rel=1e-5)
    # The step after the resume used the loaded moments and their count: its update shows whether they were
    # right.
    wanted, found = (checkpoint.StepWeights(Path(run["folder"])) for run in (whole, resumed))
    for kind, tolerance in (("exp_avg", 1e-5), ("exp_avg_sq", 2e-5), ("master", 1e-5)):
        difference, where = worst_tensor(flat_tensors(found, kind), flat_tensors(wanted, kind))
        assert difference < tolerance, f"{kind} of {where}"


def flat_tensors(saved: checkpoint.StepWeights, kind: str) -> dict[str, Tensor]:
    """Return every parameter's `kind`, flattened, by name."""
    return {key: saved.load_range(kind, key, 0, Size(saved.shape(key)).numel()) for key in saved.keys()}


def test_a_resume_on_the_same_layout_is_bit_identical(trained: dict[str, Any]) -> None:
    whole = checkpoint.StepWeights(Path(trained["zero3 ulysses recompute"]["folder"]))
    resumed = checkpoint.StepWeights(Path(trained["zero3 ulysses from zero3 ulysses"]["folder"]))
    assert {entry["sha256"] for entry in whole.manifest["files"].values()} == {
        entry["sha256"] for entry in resumed.manifest["files"].values()
    }
