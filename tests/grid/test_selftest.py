"""tools/selftest.py for real on two CPU ranks: it passes, and says so when a layout or a rank is broken."""

from pathlib import Path

import pytest

from megawan.parity import global_batch
from megawan.selftest import ENGINE_PROBLEM, PROBLEMS, STAGES, engine_cases, pruned
from tests.commands import ROOT, command

CPUS = {"CUDA_VISIBLE_DEVICES": ""}


def broken(fault: str, *words: str, cwd: Path) -> tuple[int, str, str]:
    environment = {**CPUS, "BROKEN": fault, "PYTHONPATH": str(ROOT)}
    done = command("-m", "tests.grid.broken_selftest", "--no_zero", *words, cwd=cwd, env=environment)
    return done.code, done.out, done.err


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    words = ("--ranks", 2, "--no_zero", "--time_limit", 100)
    done = command(ROOT / "tools/selftest.py", *words, cwd=tmp_path, env=CPUS)
    assert done.code == 0, done.err
    heading, *rows, verdict = done.out.splitlines()
    assert heading.split()[:3] == ["model", "layout", "zero"]
    assert len(rows) == sum(len(pruned(2, problem.heads, 0)) for problem in PROBLEMS) == 8
    assert all(row.endswith(" ok") for row in rows)
    assert verdict.startswith("selftest: all 8 layouts equal one rank alone, 2 ranks, ")


def test_a_broken_layout_exits_1(tmp_path: Path) -> None:
    code, out, _ = broken("loss", "--ranks", "2", cwd=tmp_path)
    assert code == 1
    data_parallel, ring, verdict = out.splitlines()[1:]
    assert " ring 1 ulysses 1 " in data_parallel and data_parallel.endswith(" ok")
    assert " ring 2 " in ring and ring.endswith(" DIFFERS")
    assert verdict.startswith("selftest: 1 of 2 layouts DIFFER from one rank alone")


def test_a_rank_that_hangs_is_ended_and_exits_1(tmp_path: Path) -> None:
    code, out, err = broken("hang", "--ranks", "2", "--time_limit", "15", cwd=tmp_path)
    assert code == 1
    assert len(out.splitlines()) == 1  # the heading
    assert "(time limit 15 s)" in err
    ranks = [Path("/proc", file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    assert len(ranks) == 2 and not any(rank.exists() for rank in ranks)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ranks", 0), "--ranks 0 must be 1 to 8 (on CPUs)"),
        (("--ranks", 9), "--ranks 9 must be 1 to 8 (on CPUs)"),
        (("--time_limit", 0), "--time_limit 0.0 must be above 0 seconds"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[object, ...], says: str, tmp_path: Path) -> None:
    done = command(ROOT / "tools/selftest.py", *words, cwd=tmp_path, env=CPUS)
    assert (done.code, done.out, done.err) == (2, "", f"tools/selftest.py: error: {says}\n")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 16])
def test_every_pair_of_degrees_is_there_at_every_stage(world_size: int) -> None:
    degrees = {(layout.ulysses, layout.ring) for layout in pruned(world_size, ENGINE_PROBLEM.heads, 0)}
    assert len(degrees) == len(pruned(world_size, ENGINE_PROBLEM.heads, 0))
    for stage in STAGES:
        found = [layout for wanted, layout in engine_cases(world_size) if wanted == stage]
        assert {(layout.ulysses, layout.ring) for layout in found} == degrees
    for _, layout in engine_cases(world_size):
        dp_size = world_size // (layout.ulysses * layout.ring)
        assert layout.micro_batch * layout.accumulation * dp_size == global_batch(world_size)
