"""The whole layout grid against one rank alone: `pytest -m grid`, minutes; see docs/layout_parity.md.

Plain torch in float64 to 1e-9, then the DeepSpeed engine in float32 to 1e-5. One group of ranks runs all
cases of its world.
"""

import json
from typing import Any

import pytest

from megawan.parity import OPTIM, POLICIES, layouts
from tests.distributed import run_distributed
from tests.grid.cases import ENGINE_PROBLEMS, PROBLEMS, STAGES

pytestmark = [pytest.mark.grid, pytest.mark.timeout(3600)]


def judge(kind: str, world_size: int, results: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Print the worst figures and return the cases that fail on any rank."""
    rows = [row for result in results for row in result["rows"]]
    figures = ("loss", "grad_norm", "gradient", "parameter")
    summary = {figure: max(row[figure] for row in rows) for figure in figures}
    cases = len(results[0]["rows"])
    print(
        f"{kind} world {world_size}: {cases} cases, {results[0]['seconds']:.0f} s, worst", json.dumps(summary)
    )
    return [f"{row['case']}: {row}" for row in rows if not max(row[figure] for figure in figures) < tolerance]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_takes_the_steps_of_one_rank(world_size: int) -> None:
    arguments = {"problems": PROBLEMS, "policies": POLICIES}
    results = run_distributed("tests.grid.workers:plain_grid", world_size, timeout=3000, arguments=arguments)
    wanted = sum(len(layouts(world_size, problem[1], POLICIES)) for problem in PROBLEMS)
    assert {len(result["rows"]) for result in results} == {wanted}
    assert judge("float64", world_size, results, 1e-9) == []
    # A comparison of vanishing numbers would prove nothing: every gradient is alive, every step is clipped.
    rows = results[0]["rows"]
    assert min(row["alive"] for row in rows) > 1e-5
    assert min(min(row["norms"]) for row in rows) > OPTIM.grad_clip


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_zero_stage_takes_the_steps_of_one_rank(world_size: int) -> None:
    arguments = {"problems": ENGINE_PROBLEMS, "policies": POLICIES, "stages": STAGES}
    results = run_distributed("tests.grid.workers:engine_grid", world_size, timeout=3000, arguments=arguments)
    assert judge("float32 engine", world_size, results, 1e-5) == []
    for result in results:
        assert {row["stage"] for row in result["rows"]} == set(STAGES)
