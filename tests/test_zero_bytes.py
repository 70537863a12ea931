"""What ZeRO sends and holds is what cost.py says, and with it the plan of tools/plan.py."""

import json
from typing import Any

import pytest

from megawan import cost, planning
from megawan.hardware import GPUS
from megawan.models.variants import get_variant
from megawan.plan import PACKAGE
from megawan.sizes import model_shape
from tests.distributed import run_distributed


def shipped(name: str) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((PACKAGE.parent / f"ds_configs/{name}.json").read_text())
    return section["zero_optimization"]


SHIPPED = shipped("zero3")
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
    "zero0": {"zero": shipped("zero0"), "recompute": "none", "precision": "fp32", "accumulation": 2},
    "zero1": {"zero": shipped("zero1"), "recompute": "none", "accumulation": 2},
    "zero2": {"zero": shipped("zero2"), "recompute": "none", "accumulation": 2},
    "zero3": {"zero": LARGE, "recompute": "none", "accumulation": 2},
    "zero3_offload": {"zero": shipped("zero3_offload"), "recompute": "none"},
    "fp32 stage 0": {"zero": {"stage": 0}, "recompute": "none", "precision": "fp32"},
    "fp32 stage 1": {"zero": {"stage": 1}, "recompute": "none", "precision": "fp32"},
    "fp32 stage 2": {"zero": {"stage": 2}, "recompute": "none", "precision": "fp32"},
}
SHAPE = model_shape(get_variant("debug").config)
PARAMETERS = cost.parameters(SHAPE)


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


@pytest.mark.parametrize("name", [name for name in CASES if name != "zero3_offload"])
def test_each_rank_holds_the_predicted_states(name: str, found: dict[str, Any]) -> None:
    stage = CASES[name]["zero"]["stage"]
    states = cost.model_states(PARAMETERS, 2, stage, CASES[name].get("precision", "bf16"))
    # Stage 1 keeps whole gradients while micro-batches accumulate, and its shard of them after the last.
    gradients = states.gradients / 2 if stage == 1 else states.gradients
    for rank in found[name]:
        assert rank["held"]["weights"] == pytest.approx(states.weights, rel=0.02)
        assert rank["held"]["gradients"] == pytest.approx(gradients, rel=0.02)
        assert rank["held"]["optimizer"] == pytest.approx(states.optimizer, rel=0.02)


def row(name: str) -> planning.Row:
    """Return what tools/plan.py says of a shipped file on these two ranks."""
    question = planning.ask("debug", 9, 64, 64, 2, GPUS["h100"], global_batch=4)
    return next(
        row
        for row in planning.rows(question)
        if (row.deepspeed, row.topology.cp_size, row.recompute) == (f"ds_configs/{name}.json", 1, "none")
        and not row.offload_activations
    )


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_the_plan_says_what_each_shipped_file_holds(name: str, found: dict[str, Any]) -> None:
    planned = row(name)
    for rank in found[name]:
        held = rank["held"]
        if name == "zero3_offload":  # all but the weights is the host's
            assert held["gradients"] + held["optimizer"] == pytest.approx(planned.host.states, rel=0.02)
            assert held["weights"] == pytest.approx(planned.memory.states, rel=0.02)
        else:  # stage 1 keeps its shard alone of the gradients after the last micro-batch
            before = planned.memory.states - (PARAMETERS if name == "zero1" else 0)
            assert sum(held.values()) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload", "fp32", "fp32 stage 2"])
def test_an_update_takes_what_the_plan_says(name: str, found: dict[str, Any]) -> None:
    """The gradients joined and in float32: 6 bytes a parameter of the share, 4 or 8 in float32.

    Nothing where the host updates. The share's small second group (without decay) is updated after the first.
    """
    layout = cost.Layout(2, zero_stage=CASES[name]["zero"]["stage"], precision="fp32")
    alone = cost.rank_memory(SHAPE, 48, [("none", SHAPE.num_layers)], layout)
    planned = (alone if name.startswith("fp32") else row(name).memory).updating
    for rank in found[name]:
        assert rank["update"] == pytest.approx(planned, rel=0.02, abs=2_000)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_every_stage_sends_the_predicted_bytes(name: str, found: dict[str, Any]) -> None:
    gather, reduce = cost.zero_bytes(PARAMETERS, 2, int(name[-1]), accumulation=2)
    planned = row(name)
    assert planned.accumulation == 2
    assert (planned.wire.zero_intra, planned.wire.zero_inter) == (gather + reduce, 0)
    for rank in found[name]:
        sent = rank["sent"]
        assert sent.get("all_gather_into_tensor", 0) == pytest.approx(gather, rel=1e-4)
        reduced = sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0)
        assert reduced == pytest.approx(reduce, rel=1e-4)
