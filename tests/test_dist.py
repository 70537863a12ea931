"""Ranks: what the launcher says, and what they tell each other. One group of two serves all tests."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from megawan import dist
from tests.dist_workers import TEXTS, world_of_one
from tests.distributed import run_distributed


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_distributed("tests.dist_workers:cases", 2, timeout=90)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, (0, 0, 1, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 1, 4, 2)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, (3, 1, 4, 2)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 1, 2, 2)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "1"}, (0, 0, 2, 1)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "2"}, (0, 0, 2, 1)),
        ({"LOCAL_WORLD_SIZE": "0"}, (0, 0, 1, 1)),
    ],
)
def test_the_launchers_variables(variables: dict[str, str], wanted: tuple[int, ...]) -> None:
    assert dist.environment(variables) == dist.Environment(*wanted)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two' is not a whole number"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK='' is not"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' is not"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5' is not"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK='²' is not"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' is not"),
        ({"LOCAL_SIZE": "8 "}, "LOCAL_SIZE='8 ' is not"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
    ],
)
def test_variables_that_no_launcher_sets(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match="whole number|must be below") as refusal:
        dist.environment(variables)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_many_ranks_need_a_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but MASTER_ADDR is not set"):
        dist.initialize(dist.Environment(0, 0, 2, 2), torch.device("cpu"), 5)


def test_a_machine_that_sees_no_gpu_is_named() -> None:
    store, gpu, cpu = torch.distributed.HashStore(), torch.device("cuda", 0), torch.device("cpu")
    dist.require_one_kind(store, 0, gpu, "gpu01")
    dist.require_one_kind(store, 1, gpu, "gpu02")
    with pytest.raises(ValueError, match="rank 8 computes on cpu on gpu07, rank 0 on cuda on gpu01"):
        dist.require_one_kind(store, 8, cpu, "gpu07")


def test_a_process_of_its_own_is_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    dist.say("no group yet")
    before = dict(os.environ)
    with world_of_one():
        assert torch.distributed.get_world_size() == 1
        assert dist.is_main() and dist.share_text("ü") == "ü" and not dist.all_succeeded(False)
        dist.require_agreement("anything", "x")
    assert not torch.distributed.is_initialized() and dict(os.environ) == before
    dist.shutdown()
    assert capsys.readouterr().out == "no group yet\n"


def test_leaving_takes_nothing_down_and_loses_no_output() -> None:
    # os.abort stands for what a thread of gloo does when it meets an interpreter that goes down.
    code = (
        "import atexit, os; from megawan import dist; atexit.register(os.abort); print('last'); dist.leave(3)"
    )
    gone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (gone.returncode, gone.stdout) == (3, "last\n")


def test_ranks_know_their_places(seen: list[dict[str, Any]]) -> None:
    assert [one["place"] for one in seen] == [[0, 0, 2, 2], [1, 1, 2, 2]]
    assert [one["main"] for one in seen] == [True, False]
    assert [one["left"] for one in seen] == [False, False]


def test_a_shared_text_arrives_whole(seen: list[dict[str, Any]]) -> None:
    assert max(len(text) for text in TEXTS) > 4096
    assert [one["shared"] for one in seen] == [[True] * len(TEXTS)] * 2


def test_a_disagreement_names_the_stranger(seen: list[dict[str, Any]]) -> None:
    named = "ranks [1] disagree with rank 0 about the weather; "
    assert [one["agree"] for one in seen] == ["", ""]
    assert seen[0]["disagree"] == named + "what they have stands in their own messages"
    assert seen[1]["disagree"] == named + "this rank has: sunny on 1; rank 0 has: sunny on 0"


def test_one_failure_is_everybodys(seen: list[dict[str, Any]]) -> None:
    assert [one["succeeded"] for one in seen] == [[True, False, False, False]] * 2


def test_the_mean_over_ranks(seen: list[dict[str, Any]]) -> None:
    assert [one["mean"] for one in seen] == [[[[1.0, 0.5], [4.0, 5.0]], "torch.float32", True]] * 2
