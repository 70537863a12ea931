"""The multi-process harness: it returns what the ranks return, and no failure leaves a process behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import ROOT, DistributedError, run_distributed

ILL = "tests.parallel.ill_workers"


def pids(folder: Path) -> list[int]:
    return [int(word) for file in folder.glob("pids-*") for word in file.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(numbers: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in numbers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in numbers if alive(pid)]


def test_results_come_back_by_rank_and_floats_keep_every_bit(tmp_path: Path) -> None:
    results = run_distributed(
        f"{ILL}:echo", 3, arguments={"folder": str(tmp_path), "value": 0.1 + 0.2}, timeout=30
    )
    assert results == [{"rank": rank, "world": 3, "value": 0.1 + 0.2} for rank in range(3)]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "exit code 1\nTraceback"),
        ("exit", "exit code 7\ngone without a word"),
        ("signal", "exit code -9"),
    ],
)
def test_the_rank_that_failed_first_is_shown_first(tmp_path: Path, how: str, says: str) -> None:
    arguments = {"folder": str(tmp_path), "rank": 1, "how": how}
    with pytest.raises(DistributedError) as caught:
        run_distributed(f"{ILL}:fail", 2, arguments=arguments, timeout=30)
    head, _, report = str(caught.value).partition("\n")
    assert head == f"{ILL}:fail on 2 ranks: rank 1 failed first"
    assert report.startswith(f"--- rank 1: {says}") and "--- rank 0: stopped by this test" in report
    assert ("ValueError: rank 1 has had enough" in report) == (how == "raise")
    assert len(pids(tmp_path)) == 4
    assert_gone(pids(tmp_path))


def test_a_group_that_hangs_is_stopped_and_shows_where(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"ranks \[0, 1\] still ran after 10 s") as caught:
        run_distributed(
            f"{ILL}:fail", 2, arguments={"folder": str(tmp_path), "rank": 5, "how": "hang"}, timeout=10
        )
    assert time.monotonic() - start < 18
    assert 'ill_workers.py", line' in str(caught.value) and " in fail" in str(caught.value)
    assert len(pids(tmp_path)) == 4
    assert_gone(pids(tmp_path))


def test_an_interrupt_ends_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        if len(pids(tmp_path)) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("tests.distributed.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_distributed(
            f"{ILL}:fail", 2, arguments={"folder": str(tmp_path), "rank": 5, "how": "hang"}, timeout=30
        )
    monkeypatch.undo()
    assert_gone(pids(tmp_path))


def test_ranks_do_not_outlive_a_killed_test(tmp_path: Path) -> None:
    code = f"from {ILL} import start_and_wait; start_and_wait({str(tmp_path)!r})"
    test = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 30
    while len(pids(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    numbers = pids(tmp_path)
    test.kill()
    test.wait()
    ranks = [int(file.read_text().split()[0]) for file in tmp_path.glob("pids-*")]
    assert len(ranks) == 2
    assert_gone(ranks)
    for orphan in set(numbers) - set(ranks):  # a rank's own children are reached only by the killed test
        os.kill(orphan, 9)
