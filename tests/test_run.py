"""What surrounds a run's steps: who asks for a checkpoint, who holds the run folder, how a save goes on
aside. One group of two ranks serves all tests."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megawan import changes, train
from megawan.checkpoint import CheckpointOptions
from megawan.ds_config import Resolved
from megawan.run_folder import LOCK
from megawan.watch import PHASES, Watch
from tests.dist_workers import world_of_one
from tests.distributed import run_distributed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return run_distributed("tests.run_workers:cases", 2, timeout=90, arguments={"folder": str(folder)})


def both(seen: list[dict[str, Any]], part: str, name: str) -> Any:
    first, second = (one[part][name] for one in seen)
    assert first == second
    return first


def test_a_wish_of_any_rank_is_everybodys(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "agreement", "nobody") == ["", False]
    assert both(seen, "agreement", "warned") == [["warned by SIGUSR1", True]] * 2
    assert both(seen, "agreement", "save") == [["asked by the file save", False], ["", False]]
    assert both(seen, "agreement", "save_quit") == [["asked by the file save_quit", True], ["", False]]
    assert both(seen, "agreement", "two places") == ["", False]
    assert both(seen, "agreement", "minutes") == ["--checkpoint.save_minutes have passed", False]
    assert both(seen, "agreement", "saved") == ["", False]


def test_the_rank_that_all_wait_for_is_known(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "agreement", "late") == [1, True]


def test_ranks_of_one_video_with_other_samples_stop_before_they_hang(seen: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(seen):
        said = one["agreement"]["different samples"]
        assert "data-parallel place 0" in said and f"samples [{rank}]" in said and "--data.path" in said


def test_a_folder_is_held_by_one_run(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "folder", "free") == "held True, then False"
    assert both(seen, "folder", "dead") == "held True, then False"
    assert both(seen, "folder", "mine") == "held True, then False"
    assert both(seen, "folder", "untouched for long") == ["held True, then False"] * 2
    for name in ("alive", "elsewhere", "unreadable"):
        first, second = (one["folder"][name] for one in seen)
        assert "another run has held it" in first and "remove" in first and LOCK in first
        assert "another rank cannot use the run folder" in second
    assert f"process {os.getpid()}" in seen[0]["folder"]["alive"]


def test_a_folder_that_cannot_take_checkpoints_is_refused_by_all(seen: list[dict[str, Any]]) -> None:
    assert "GB free, one checkpoint needs 1152921504.6 GB" in seen[0]["folder"]["too small"]
    assert "1 of 2 wrote into rank 0's" in seen[0]["folder"]["not shared"]
    assert "file" in seen[0]["folder"]["a file"] and "held" not in seen[0]["folder"]["a file"]
    for name in ("too small", "not shared"):
        assert "another rank" in seen[1]["folder"][name]
    assert both(seen, "folder", "left") == [LOCK]
    assert not both(seen, "folder", "unused")


def test_a_disk_that_will_be_full_is_said_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = shutil.disk_usage(tmp_path).free // 2
    for keep_last, needed in ((0, size), (2, 1)):  # all stay, and nobody knows how many; there is room
        train.warn_of_little_room(tmp_path, needed, CheckpointOptions(keep_last=keep_last))
    assert capsys.readouterr().out == ""
    train.warn_of_little_room(tmp_path, size, CheckpointOptions(keep_last=2))
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path} has room for ") and "keep_last 2 needs 3" in said
    for step in (1, 2, 3):  # they take their room already; this run's save makes one of them go
        (tmp_path / f"step_000000{step}").mkdir()
    train.warn_of_little_room(tmp_path, size, CheckpointOptions(keep_last=2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "on"),
    [({}, True), ({"disable_python_gc": False}, True), ({"disable_python_gc": True}, False)],
)
def test_the_garbage_collector_stays_off_where_deepspeeds_settings_say_so(
    settings: dict[str, Any], on: bool
) -> None:
    gc.disable()
    try:
        train.begin_collecting(Resolved(settings, 3, "fp32"))
        assert gc.isenabled() == on
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_phase_that_no_report_knows_is_refused(tmp_path: Path) -> None:
    with world_of_one():
        watch = Watch(tmp_path, 60)
        for phase in PHASES:
            watch.at(1, phase)
        with pytest.raises(ValueError, match="'lunch' is not in watch.PHASES"):
            watch.at(1, "lunch")
        watch.close()


def test_training_goes_on_while_a_save_writes_what_it_copied(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "saver", "as copied")
    assert both(seen, "saver", "ended") == [f"saved /step_000000{step}" for step in (1, 2, 3)]
    assert both(seen, "saver", "ended again") == []
    assert both(seen, "saver", "left") == ["latest", "step_0000002", "step_0000003"]
    assert both(seen, "saver", "no folder") == [True]
    assert both(seen, "saver", "threads") == []


THEN: dict[str, Any] = {
    "data": "store 1", "global_batch": 8,
    "config": {"seed": 0, "steps": 5, "output": "a", "micro_batch": 8, "flow": {"shift": 5.0},
               "optim": {"learning_rate": 1e-5}, "ema": {"decay": 0.0}, "data": {"path": "x"},
               "checkpoint": {"resume": "auto"}, "older": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("now", "had_ema", "found", "not_allowed"),
    [
        ({}, False, {}, []),
        ({"config": {"output": "b", "micro_batch": 4, "checkpoint": {"resume": "must"}}}, False, {}, []),
        ({"config": {"steps": 9, "newer": 2}}, False, {"steps": (5, 9)}, []),
        ({"config": {"optim": {"learning_rate": 1.0}}}, False, {"optim.learning_rate": (1e-5, 1.0)}, []),
        ({"config": {"seed": 1}}, False, {"seed": (0, 1)}, ["seed"]),
        ({"config": {"flow": {"shift": 3.0}}}, False, {"flow.shift": (5.0, 3.0)}, ["flow"]),
        ({"data": "store 2"}, False, {"data": ("store 1", "store 2")}, ["data"]),
        ({"config": {"data": {"path": "y"}}}, False, {"data.path": ("x", "y")}, []),
        ({"global_batch": 4}, False, {"global_batch": (8, 4)}, ["global_batch"]),
        ({}, True, {"ema": ("a moving average", "no moving average")}, ["ema"]),
        (
            {"config": {"ema": {"decay": 0.9}}},
            False,
            {"ema.decay": (0.0, 0.9), "ema": ("no moving average", "a moving average")},
            ["ema"],
        ),
        ({"config": {"ema": {"decay": 0.9}}}, True, {"ema.decay": (0.0, 0.9)}, []),
    ],
)
def test_changes_since_a_checkpoint(
    now: dict[str, Any], had_ema: bool, found: dict[str, Any], not_allowed: list[str]
) -> None:
    here = {**THEN, **now, "config": {**THEN["config"], **now.get("config", {})}}
    differences = changes.changes(THEN, here, had_ema)
    assert differences == found
    assert changes.refused(differences, ()) == not_allowed
    assert changes.refused(differences, changes.UNSAFE) == []
