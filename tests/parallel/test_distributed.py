"""The helper that starts ranks: what goes in comes out, every kind of failure is told, nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import ROOT, DistributedError, run_distributed

WORKERS = "tests.parallel.faulty_workers"


def alive(pid: int) -> bool:
    """Return True while the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true_soon: object, seconds: float = 10.0) -> bool:
    """Return whether the callable becomes true within the time."""
    assert callable(true_soon)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true_soon():
            return True
        time.sleep(0.02)
    return bool(true_soon())


def test_ranks_form_a_group_and_return_in_order() -> None:
    results = run_distributed(f"{WORKERS}:echo", 2, {"a": [1, "x", None]}, scale=0.5, timeout=60)
    for rank, result in enumerate(results):
        assert result["rank"] == rank and result["world"] == 2 and result["local"] == [str(rank), "2"]
        assert result["value"] == {"a": [1, "x", None]}
        assert result["threads"] == 1
        assert torch.equal(result["total"], torch.tensor([1.5]))
        assert not alive(result["pid"])


def test_tensors_keep_their_values_and_dtypes() -> None:
    half = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).t()  # not contiguous
    exact = torch.arange(4, dtype=torch.float64) / 3
    (result,) = run_distributed(f"{WORKERS}:mixed", 1, {"list": ["a", exact], "half": half, "none": None}, timeout=60)
    assert torch.equal(result["list"][1], exact * 2) and result["list"][1].dtype == torch.float64
    assert torch.equal(result["half"], half * 2) and result["half"].dtype == torch.bfloat16
    assert result["none"] is None


def test_the_first_failing_rank_leads_the_report() -> None:
    with pytest.raises(DistributedError) as error:
        run_distributed(f"{WORKERS}:one_raises", 2, 1, timeout=60)
    first, _, others = str(error.value).partition("--- rank 0")
    assert "rank 1 of 2 failed first" in first and "ValueError: the guilty rank says this" in first
    assert "in one_raises" in first
    assert "guilty rank says" not in others


def test_a_silent_exit_is_told_with_its_code_and_last_output() -> None:
    with pytest.raises(DistributedError) as error:
        run_distributed(f"{WORKERS}:one_exits", 2, 0, timeout=60)
    first = str(error.value).partition("--- rank")[0]
    assert "rank 0 of 2 failed first" in first and "exit code 7" in first
    assert "last line of the rank that left" in first


def test_a_hang_ends_at_the_time_limit_and_says_where(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError) as error:
        run_distributed(f"{WORKERS}:one_hangs", 2, 1, str(tmp_path), timeout=6)
    assert time.monotonic() - started < 20
    assert "ranks [1] of 2 still ran after 6 s" in str(error.value)
    assert "wait_for_ever_in_here" in str(error.value)
    pids = [int((tmp_path / name).read_text()) for name in ("rank0", "rank1", "child")]
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_a_result_that_cannot_travel_is_refused() -> None:
    with pytest.raises(DistributedError, match="cannot be sent between processes: object"):
        run_distributed(f"{WORKERS}:returns_object", 1, timeout=60)
    with pytest.raises(TypeError, match="cannot be sent between processes: object"):
        run_distributed(f"{WORKERS}:returns_object", 1, object())
    with pytest.raises(TypeError, match="keys that JSON cannot carry"):
        run_distributed(f"{WORKERS}:returns_object", 1, {1: 2})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_when_the_tests_do(how: signal.Signals, tmp_path: Path) -> None:
    source = (
        "from tests.distributed import run_distributed\n"
        f"run_distributed('{WORKERS}:one_hangs', 2, 1, {str(tmp_path)!r}, timeout=100)\n"
    )
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", source], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    names = [tmp_path / name for name in ("rank0", "rank1", "child")]
    try:
        assert until(lambda: all(name.exists() and name.read_text() for name in names), 60), "the ranks never started"
        pids = [int(name.read_text()) for name in names]
        assert alive(pids[1]) and alive(pids[2])
        parent.send_signal(how)
        assert until(lambda: not any(alive(pid) for pid in pids))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
