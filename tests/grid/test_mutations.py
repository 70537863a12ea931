"""The comparison that the grid rests on sees each fault that would train silently wrong, by a wide margin."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from megawan.parity import Outcome, compare
from tests.distributed import run_distributed

# What each fault must show: in the loss, in some gradient, or in the gradients of the text branch alone.
FAULTS = {
    "loss without x cp_size": ("loss", ""),
    "strided all-to-all output": ("gradient", ""),
    "rope rows not sharded": ("loss", ""),
    "seeded by global rank": ("loss", ""),
    "padding attended": ("loss", ""),
    "text gradient of rank 0 only": ("gradient", "text_embedding."),
    "no text gradient": ("gradient", "text_embedding."),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    arguments = {"problem": ["t2v", 4, [3, 3, 5]]}
    first, second = run_distributed("tests.grid.faulty:mutations", 2, timeout=100, arguments=arguments)
    assert first.keys() == second.keys() == {"none", *FAULTS}
    return first


def test_without_a_fault_two_ranks_are_one(found: dict[str, dict[str, Any]]) -> None:
    assert found["none"]["loss"] < 1e-12
    assert found["none"]["gradient"] < 1e-9


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, found: dict[str, dict[str, Any]]) -> None:
    figure, where = FAULTS[fault]
    assert found[fault][figure] > 1e-4  # a hundred thousand times what the grid allows
    assert found[fault]["gradient"] > 1e-3
    assert found[fault]["gradient_name"].startswith(where)


def test_only_its_gradients_show_a_cut_text_branch_at_first(found: dict[str, dict[str, Any]]) -> None:
    """Which is why the grid compares gradients: the loss of the first step is right."""
    assert found["no text gradient"]["first_loss"] < 1e-12
    assert found["no text gradient"]["gradient"] == 1.0


def test_one_wrong_number_in_one_tensor_is_named() -> None:
    wanted = Outcome([1.0, 2.0], [1.0, 1.0], {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.ones(3)})
    assert compare(wanted, wanted).worst() == 0
    moved = dataclasses.replace(wanted, gradients={"a": torch.ones(3), "b": torch.tensor([1.0, 1.25])})
    assert compare(moved, wanted).gradient == 0.25 and compare(moved, wanted).gradient_name == "b"
    late = dataclasses.replace(wanted, losses=[1.0, 2.5])
    assert compare(late, wanted).loss == 0.25


def test_what_is_not_a_number_never_passes() -> None:
    wanted = Outcome([1.0, 2.0], [1.0, 1.0], {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.ones(3)})
    sick = torch.tensor([1.0, math.nan])
    for broken in (
        dataclasses.replace(wanted, losses=[1.0, math.nan]),
        dataclasses.replace(wanted, grad_norms=[math.nan, 1.0]),
        dataclasses.replace(wanted, gradients={"a": torch.ones(3), "b": sick}),
    ):
        assert compare(broken, wanted).worst() == math.inf
    with pytest.raises(ValueError, match="different names"):
        compare(dataclasses.replace(wanted, gradients={"a": torch.ones(3)}), wanted)
