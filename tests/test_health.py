"""The look at all ranks before a run: what two real ranks measure, and how slow and wrong ones are named."""

import socket

from megawan.health import Health
from tests.distributed import run_distributed


def test_two_ranks_measure_the_same_world() -> None:
    first, second = run_distributed("tests.health_workers:look", 2, timeout=60)
    assert first == second
    assert first["hosts"] == [socket.gethostname()] * 2 and first["wrong"] == []
    assert all(seconds > 0 for name in ("matmul_s", "neighbour_s") for seconds in first[name])
    assert "2 ranks on 1 machines" in Health(**first).describe() and not Health(**first).problems()


def test_slow_and_wrong_ranks_are_named_with_their_machine() -> None:
    found = Health(
        ["a", "a", "b", "b"], [1.0, 1.1, 2.3, 1.0], [0.5, 0.5, 0.5, 1.1], 0.1, 256, 2**20, wrong=[1]
    )
    assert found.warnings() == [
        "matrix products of rank 2 on b take 2.2 times the median",
        "messages at rank 3 on b take 2.2 times the median",
    ]
    assert found.problems() == ["rank 1 on a computes wrong numbers"]
