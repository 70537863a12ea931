"""What ZeRO-3 sends and holds is what cost.py says, to the byte."""

import json
from typing import Any

import pytest

from megawan import cost
from megawan.models.variants import get_variant
from megawan.plan import PACKAGE, model_shape
from tests.distributed import run_distributed

SHIPPED = json.loads((PACKAGE.parent / "ds_configs/zero3.json").read_text())["zero_optimization"]
# As for a model too large to stay gathered between its forward and its backward pass.
LARGE = {**SHIPPED, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
CASES: dict[str, dict[str, Any]] = {
    "small": {"zero": SHIPPED, "recompute": "none"},
    "small, recompute": {"zero": SHIPPED, "recompute": "full"},
    "large": {"zero": LARGE, "recompute": "none"},
    "large, recompute": {"zero": LARGE, "recompute": "full"},
    "large, fp32": {"zero": LARGE, "recompute": "none", "file": {"communication_data_type": "fp32"}},
    "stage 1": {"zero": {"stage": 1}, "recompute": "none"},
    "stage 2": {"zero": {"stage": 2}, "recompute": "none"},
    "fp32": {"zero": SHIPPED, "recompute": "none", "precision": "fp32"},
    "fp32 stage 0": {"zero": {"stage": 0}, "recompute": "none", "precision": "fp32"},
    "fp32 stage 1": {"zero": {"stage": 1}, "recompute": "none", "precision": "fp32"},
    "fp32 stage 2": {"zero": {"stage": 2}, "recompute": "none", "precision": "fp32"},
}
PARAMETERS = cost.parameters(model_shape(get_variant("debug").config))


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    arguments = {"cases": list(CASES.values())}
    ranks = run_distributed("tests.zero_workers:steps", 2, arguments=arguments, timeout=240)
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(CASES)}


@pytest.mark.parametrize(
    ("name", "gathers", "gradient_bytes"),
    [
        ("small", 1, 2),  # stays gathered from the forward to the backward pass
        ("small, recompute", 1, 2),
        ("large", 2, 2),
        ("large, recompute", 2, 2),  # the recomputation and the backward pass share a gather
        ("large, fp32", 2, 4),
    ],
)
def test_gathers_and_reductions_send_the_predicted_bytes(
    name: str, gathers: int, gradient_bytes: int, found: dict[str, Any]
) -> None:
    for rank in found[name]:
        assert rank["sent"] == {
            "all_gather_into_tensor": gathers * cost.gather_bytes(PARAMETERS, 2),
            "reduce_scatter_tensor": cost.gather_bytes(PARAMETERS, 2, gradient_bytes),
        }


@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_the_predicted_states(name: str, found: dict[str, Any]) -> None:
    stage = CASES[name]["zero"]["stage"]
    states = cost.model_states(PARAMETERS, 2, stage, CASES[name].get("precision", "bf16"))
    # Stage 1 keeps whole gradients while micro-batches accumulate, and its shard of them after the last.
    gradients = states.gradients / 2 if stage == 1 else states.gradients
    for rank in found[name]:
        assert rank["held"]["weights"] == pytest.approx(states.weights, rel=0.02)
        assert rank["held"]["gradients"] == pytest.approx(gradients, rel=0.02)
        assert rank["held"]["optimizer"] == pytest.approx(states.optimizer, rel=0.02)
