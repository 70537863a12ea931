"""The preflight: every ✗ is brought about once, by one process and by two ranks, and nothing else is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megawan import cli, plan
from megawan.dist import Environment, free_port
from megawan.models.attention import PackageAttention
from megawan.preflight import alone, together
from megawan.preflight.run import parse
from megawan.preflight.table import Check, Checks, as_json, as_text, failed, merge
from tests.commands import command
from tests.data.stores import make_store
from tests.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/preflight.py"


def look(*argv: object, world_size: int = 1) -> dict[str, Check]:
    """Return what a rank finds alone, by name."""
    checks = Checks()
    options = parse([str(word) for word in argv], prog="preflight.py", description="")
    alone.look(options, Environment(0, 0, 1, 1), world_size, checks)
    return {row.name: row for row in checks.rows}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    wan = plan.get_variant("debug").config
    make_store(path, [(16, 3, 8, 8)] * 3, latent_channels=16, text_dim=wan.text_dim)
    return path


def damage(kind: str) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        file = path / "shard_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    return {
        "missing": lambda path: (path / "shard_00001.safetensors").unlink(),
        "cut": cut,
        "no index": lambda path: (path / "index.json").unlink(),
    }[kind]


@pytest.mark.parametrize(
    ("row", "words", "argv"),
    [
        ("flags", ("--steps 0",), ("--steps", "0")),
        ("flags", ("keep_last -1",), ("--checkpoint.keep_last", "-1")),
        ("model", ("t2v-2B", "t2v-14B"), ("--model.variant", "t2v-2B")),
        ("layout", ("ulysses_degree 5", "nearest"), ("--parallel.ulysses_degree", "5")),
        ("layout", ("does not divide the world of 8",), ("--parallel.ring_degree", "3")),
        ("deepspeed file", ("no such file", "zero3.json"), ("--deepspeed", "zero9.json")),
        ("weights", ("/nowhere", "no such file"), ("--model.init_from", "/nowhere")),
        ("data", ("/nowhere", "index.json"), ("--data.path", "/nowhere")),
        ("data", ("18 frames", "4n+1"), ("--data.num_frames", "18")),
        ("inputs", ("warm",), ("--optim.warmup_steps", "90", "--steps", "9")),
        ("inputs", ("VACE",), ("--model.variant", "debug-vace")),
        ("memory", ("budget is 0.1 GiB",), ("--model.memory_budget_gb", "0.1")),
        ("attention", ("'abacus' is unknown",), ("--model.attention", "abacus")),
    ],
)
def test_each_mistake_fails_its_row_alone(row: str, words: tuple[str, ...], argv: tuple[str, ...]) -> None:
    found = look(*argv, world_size=8)
    assert [check.name for check in found.values() if check.ok is False] == [row]
    assert found[row].mend
    assert all(word in found[row].found for word in words), found[row]


def test_a_sound_line_fails_nothing(store: Path) -> None:
    found = look("--data.path", store, "--parallel.ulysses_degree", "2", world_size=8)
    assert not failed(list(found.values())), found
    assert "3 samples" in found["data"].found and "dp 4" in found["layout"].found
    assert found["memory"].ok is None  # no GPU to compare with
    assert look("--model.memory_budget_gb", "2")["memory"].ok is True


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", ("is missing",)), ("cut", ("bytes", "the index says")), ("no index", ("not a finished",))],
)
def test_every_file_of_a_store_must_be_there_as_it_was_written(
    kind: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    wan = plan.get_variant("debug").config
    make_store(tmp_path / "store", [(16, 3, 8, 8)] * 3, latent_channels=16, text_dim=wan.text_dim)
    damage(kind)(tmp_path / "store")
    row = look("--data.path", tmp_path / "store")["data"]
    assert row.ok is False and all(word in row.found for word in words), row


def test_a_store_of_another_variant_or_size(store: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "other", [(4, 3, 2, 2)])
    assert "takes 16 and" in look("--data.path", tmp_path / "other")["data"].found
    row = look("--data.path", store, "--data.height", "480")["data"]
    assert row.ok is False and "clips of 64" in row.found
    row = look("--data.path", store, "--model.variant", "debug-i2v")["inputs"]
    assert row.ok is False and "no CLIP features and no condition" in row.found


def test_weights_are_held_against_the_variant_by_their_headers(tmp_path: Path) -> None:
    shapes = {"patch_embedding.weight": torch.zeros(2, 2), "head.head.weight": torch.zeros(1)}
    save_file(shapes, tmp_path / "weights.safetensors")
    row = look("--model.init_from", tmp_path / "weights.safetensors")["weights"]
    assert row.ok is False and "weights.safetensors" in row.found and "debug" in row.mend


def test_a_gpu_is_the_budget_where_none_is_named() -> None:
    options = parse([], prog="preflight.py", description="")
    made = plan.make_plan(options, Environment(0, 0, 1, 1))
    gib = plan.GIB
    small = alone.budgeted(options, alone.Gpu("small", gib // 2, gib // 2))
    with pytest.raises(ValueError, match=r"the budget is 0\.45 GiB"):
        plan.choose_recompute(small, made.variant, made.topology, made.deepspeed, 48)
    assert alone.budgeted(options, None) == options
    with pytest.raises(ValueError, match=r"80 GiB of this H100 only 0\.5 are free"):
        alone.require_memory(made, alone.Gpu("H100", 80 * gib, gib // 2))
    assert alone.require_memory(made, alone.Gpu("H100", 80 * gib, 2 * gib)) is made


def test_a_kernel_that_gives_other_numbers_is_refused() -> None:
    made = plan.make_plan(parse([], prog="preflight.py", description=""), Environment(0, 0, 1, 1))
    with pytest.raises(RuntimeError, match="broken: differs from the formula"):
        alone.try_kernel(PackageAttention("broken", lambda q, k, v: v * 1.01), made, "cpu")


def test_the_disk_must_hold_what_stays_and_what_is_written() -> None:
    assert "30.0 GB free" in together.require_space(30 * 10**9, 10**10, keep_last=2, there=0)
    assert together.require_space(10**10, 10**10, keep_last=2, there=2)
    with pytest.raises(ValueError, match="3 more will lie there at once"):
        together.require_space(29 * 10**9, 10**10, keep_last=2, there=0)
    with pytest.raises(ValueError, match="1 more"):
        together.require_space(10**9, 10**10, keep_last=2, there=7)


HOSTS = ["a", "b"]
SOUND = Check("data", True, "one", "encode", "same")


def test_rows_of_all_ranks_become_one_that_names_the_rank() -> None:
    bad = Check("data", False, "no such folder", "mount it")
    (row,) = merge([[SOUND], [bad]], HOSTS)
    assert (row.ok, row.found, row.mend) == (False, "rank 1 on b: no such folder", "mount it")
    (row,) = merge([[bad], [bad]], HOSTS)
    assert row.found == "no such folder"
    (row,) = merge([[SOUND], [Check("data", True, "two", "", "other")]], HOSTS)
    assert row.ok is False and row.found == "rank 1 on b: two; but rank 0 on a: one"
    (row,) = merge([[SOUND], [Check("data", None, "not tried")]], HOSTS)
    assert row.ok is None and row.found == "rank 1 on b: not tried"
    assert merge([[SOUND], [SOUND]], HOSTS) == [SOUND]


def test_table_and_json() -> None:
    rows = [SOUND, Check("disk", False, "full", "free some"), Check("slurm", None, "none")]
    assert as_text(rows, "utf-8").splitlines() == [
        "✓ data   one",
        "✗ disk   full",
        "         mend: free some",
        "– slurm  none",
        "preflight: 1 passed, 1 do not apply; 1 FAILED: disk",
    ]
    assert as_text(rows, "ascii").splitlines()[1] == "FAIL disk   full"
    shown = json.loads(as_json(rows, 4))
    assert (shown["ok"], shown["world_size"]) == (False, 4)
    assert [check["ok"] for check in shown["checks"]] == [True, False, None]
    assert [check["mend"] for check in shown["checks"]] == ["", "free some", ""]
    assert json.loads(as_json([SOUND], 1))["ok"] is True


SRUN = {"JOB_ID": "5", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"JOB_ID": "6"}, "SLURM_JOB_ID differs between ranks: 5, 6"),
        ({"STEP_NUM_NODES": "3"}, "SLURM_STEP_NUM_NODES differs"),
        ({"NODENAME": "n1"}, "srun started 2 nodes, but ranks are on n1"),
    ],
)
def test_slurm_and_ranks_must_agree(changed: dict[str, str], words: str) -> None:
    first, second = {**SRUN, "NODENAME": "n1"}, {**SRUN, "NODENAME": "n2"}
    places = [Environment(0, 0, 2, 1), Environment(1, 0, 2, 1)]
    assert together.compare_slurm([first, second], places, HOSTS).ok is True
    assert together.compare_slurm([{}, {}], places, HOSTS).ok is None
    row = together.compare_slurm([first, {**second, **changed}], places, HOSTS)
    assert row.ok is False and words in row.found, row
    twice = [Environment(0, 0, 2, 1), Environment(1, 1, 2, 1)]
    assert "n2 has the local ranks [1]" in together.compare_slurm([first, second], twice, HOSTS).found
    alone_of_many = {**SRUN, "STEP_NUM_TASKS": "16", "STEP_NUM_NODES": "1"}
    row = together.compare_slurm([alone_of_many], [Environment(0, 0, 1, 1)], ["a"])
    assert row.ok is False and "16 tasks on 1 nodes for a world of 1 ranks" in row.found


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 ranks"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("preflight"))
    found: list[dict[str, Any]] = run_distributed(
        "tests.preflight_workers:cases", request.param, arguments={"folder": folder}, timeout=150
    )
    return found


def wrong(rows: dict[str, Any]) -> list[str]:
    return [name for name, row in rows.items() if name != "left behind" and row[0] is False]


def test_all_ranks_find_the_same_and_leave_nothing(seen: list[dict[str, Any]]) -> None:
    for case, rows in seen[0].items():
        assert rows["left behind"] == [], case
        assert all(other[case] == rows for other in seen), case


def test_every_mistake_fails_its_row_and_the_others_are_tried(seen: list[dict[str, Any]]) -> None:
    first, both = seen[0], len(seen) == 2
    failing = {
        "sound": [],
        "layout": ["layout"],
        "deepspeed": ["deepspeed"],
        "another seed": ["flags", "data"] if both else [],
        "one without data": ["flags", "data"] if both else ["data"],
        "clocks": ["clocks"] if both else [],
        "slurm": [],
        "slurm of 7 tasks": ["slurm"],
        "slurm of 2 nodes": ["slurm"],
        "none there": ["resume"],
        "goes on": [],
        "another experiment": ["resume"],
        "allowed": [],
        "another model": ["resume"],
        "held": ["run folder"],
        "damaged": ["layout", "resume"],
        "a file": ["run folder"],
        "numbers": ["world"] if both else [],
        "hang": ["world"] if both else [],
    }
    assert {case: wrong(rows) for case, rows in first.items()} == failing
    assert all(row[2] for rows in first.values() for name, row in rows.items() if row and row[0] is False)
    says = {
        ("layout", "layout"): "ulysses_degree 3",
        ("layout", "data"): "32 synthetic samples",
        ("deepspeed", "deepspeed"): "/dev/null/extensions",
        ("slurm of 7 tasks", "slurm"): "srun started 7 tasks",
        ("slurm of 2 nodes", "slurm"): "srun started 2 nodes, but ranks are on n1",
        ("none there", "resume"): "no checkpoint under",
        ("goes on", "resume"): "step 2 of 20",
        ("another experiment", "resume"): "seed was 0, is 3",
        ("allowed", "resume"): "seed was 0, is 3",
        ("another model", "resume"): "--model.variant debug-i2v has",
        ("held", "run folder"): "another run has held it since",
        ("damaged", "resume"): "rank_00000.safetensors has",
        ("a file", "run folder"): "file: File exists",
    }
    if both:
        says |= {
            ("another seed", "flags"): "rank 1 on ",
            ("one without data", "data"): "rank 1 on ",
            ("clocks", "clocks"): "rank 0 on ",
            ("sound", "world"): "2 ranks; the slowest sends: all-reduce ",
            ("numbers", "world"): "ranks 0, 1: all-reduce gives wrong numbers",
            ("hang", "world"): "rank 0: still waits in all-reduce after 2 s; rank 1: still waits",
            ("hang", "ring"): "not tried: world hangs",
        }
    for (case, name), words in says.items():
        assert words in first[case][name][1], (case, name, first[case][name])


def test_the_groups_of_a_layout_are_tried() -> None:
    found = run_distributed("tests.preflight_workers:layouts", 2, timeout=100)[0]
    assert "all-to-all" in found["ulysses"] and "to the next rank" in found["ring"], found
    assert found["wrong"] == {"ulysses": ["world", "ulysses"], "ring": ["world", "ring"]}


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_it(tmp_path: Path) -> None:
    sound = command(TOOL, "--world_size", "2", "--json", cwd=tmp_path)
    assert sound.code == 0, sound
    shown = json.loads(sound.out)
    assert shown["ok"] and shown["world_size"] == 2
    assert not (tmp_path / "runs").exists()

    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("raise ImportError('libcuda.so.1 is not there')")
    broken = command(TOOL, "--parallel.ulysses_degree", "5", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert broken.code == 1, broken
    assert "✗ deepspeed       libcuda.so.1 is not there" in broken.out
    assert broken.out.splitlines()[-1].endswith("2 FAILED: layout, deepspeed")

    lonely = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone_there = command(TOOL, "--dist_timeout", "2", cwd=tmp_path, env=lonely)
    assert alone_there.code == 1 and "✗ process group" in alone_there.out, alone_there


def test_bad_flags_are_one_line_and_exit_code_2() -> None:
    for argv in (["--nonsense", "1"], ["--world_size", "0"], ["--collective_timeout", "0"]):
        with pytest.raises(cli.UserError, match=argv[0].strip("-")):
            parse(argv, prog="preflight.py", description="")


def test_two_ranks_end_with_one_table(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), TOOL)
    done = command(*launch, "--data.path", tmp_path / "no", cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert done.code == 1
    assert done.out.count("preflight: ") == 1 and done.out.splitlines()[-1].endswith("1 FAILED: data")
