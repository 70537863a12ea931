"""Checkpoints: whole or absent, verified before they are used, and readable in any cut."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megawan import checkpoint, saving
from megawan.checkpoint import MOMENTS, CheckpointOptions, DamagedCheckpoint, Fragment, StepWeights
from tests.checkpoint_workers import SHAPES, flip, pieces, whole
from tests.dist_workers import world_of_one
from tests.distributed import run_distributed

KEEP_ALL = CheckpointOptions(keep_last=0)

KINDS = ("master", *MOMENTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def seen(base: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw, for all cases that need two."""
    return run_distributed("tests.checkpoint_workers:cases", 2, arguments={"folder": str(base)}, timeout=90)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A gloo group of this process alone."""
    with world_of_one():
        yield


def test_two_ranks_write_files_with_their_true_hashes(seen: list[dict[str, Any]], base: Path) -> None:
    assert {one["first"] for one in seen} == {str(base / "full disk" / "step_0000001")}
    folder = base / "full disk" / "step_0000001"
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert (manifest["step"], manifest["world_size"], manifest["variant"]) == (1, 2, "debug")
    assert manifest["files"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.glob("*.safetensors")
    }
    assert sorted(manifest["files"]) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert checkpoint.verify(folder) == manifest


def test_a_rank_without_room_fails_all_and_leaves_what_was(seen: list[dict[str, Any]], base: Path) -> None:
    assert [one["no room"].startswith("OSError: checkpoint of step 2 was not saved: ") for one in seen] == [
        True,
        True,
    ]
    assert "another rank" in seen[0]["no room"] and "another rank" not in seen[1]["no room"]
    assert seen[0]["no room leaves"] == ["latest", "step_0000001"]
    assert (base / "full disk" / "latest").read_text() == "step_0000001\n"
    checkpoint.verify(base / "full disk" / "step_0000001")


def test_a_save_that_fails_at_its_last_file_is_undone(seen: list[dict[str, Any]], base: Path) -> None:
    for one in seen:
        assert all(said.startswith("OSError: ") for said in one["no latest"])
    steps = [name for name in seen[0]["no latest leaves"] if name.startswith("step")]
    assert steps == ["step_0000001", "step_0000002"]
    kept = StepWeights(base / "no manifest" / "step_0000002")
    assert torch.equal(kept.load("odd").flatten(), whole("master", "odd", 5)), "the older save of step 2"
    assert all(one["no folder"].startswith("OSError: ") for one in seen)


def test_leftovers_of_killed_saves_are_ignored_and_cleaned(seen: list[dict[str, Any]]) -> None:
    assert [one["leftovers are chosen"] for one in seen] == ["None", "None"]
    # What is not ours stays.
    assert seen[0]["kept leaves"] == ["latest", "step_0000003", "step_0000004", "step_of_mine.tmp"]


def test_the_same_step_saved_twice_is_the_second(seen: list[dict[str, Any]], base: Path) -> None:
    assert seen[0]["again leaves"] == seen[0]["kept leaves"]
    folder = base / "kept" / "step_0000004"
    assert torch.equal(StepWeights(folder).load("bias"), whole("master", "bias", 9))
    checkpoint.verify(folder)


def test_keep_every_keeps_what_it_divides(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["milestones leave"] == ["latest", "step_0000003", "step_0000006", "step_0000007"]


def test_keep_last_counts_only_steps_up_to_the_saved_one(seen: list[dict[str, Any]], base: Path) -> None:
    assert seen[0]["branch leaves"] == ["latest", "step_0000002", "step_0000005", "step_0000006"]
    assert (base / "branch" / "latest").read_text() == "step_0000002\n"


def test_two_ranks_choose_alike(seen: list[dict[str, Any]], base: Path) -> None:
    root = base / "damaged"
    newest, oldest = str(root / "step_0000003"), str(root / "step_0000001")
    for one in seen:
        auto, must, none, path = one["sound"]
        assert (auto, must, path) == (newest, newest, oldest)
        assert none.startswith("ValueError: --resume none, but ")
        auto, path = one["newest damaged"]
        assert auto == str(root / "step_0000002")
        assert path.startswith("DamagedCheckpoint: ")
        assert all(
            said.startswith(f"ValueError: every checkpoint under {root}") for said in one["all damaged"]
        )
    assert "does not have the sha256" in seen[1]["newest damaged"][1], "rank 1 checked that file"
    assert seen[0]["not shared"] == seen[1]["not shared"] == ["ValueError", "ValueError"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_of_two_ranks_fragments_reads_back(
    seen: list[dict[str, Any]], base: Path, data: st.DataObject
) -> None:
    saved = StepWeights(base / "full disk" / "step_0000001")
    name, kind = data.draw(st.sampled_from(sorted(SHAPES))), data.draw(st.sampled_from(KINDS))
    wanted = whole(kind, name)
    start = data.draw(st.integers(0, len(wanted)))
    length = data.draw(st.integers(0, len(wanted) - start))
    assert torch.equal(saved.load_range(kind, name, start, length), wanted[start : start + length])
    assert torch.equal(saved.load(name), whole("master", name).view(SHAPES[name]))
    for ill in ((start, len(wanted) - start + 1), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="no elements"):
            saved.load_range(kind, name, *ill)


def test_one_rank_writes_what_two_ranks_write(seen: list[dict[str, Any]], base: Path, sound: Path) -> None:
    one, two = StepWeights(sound), StepWeights(base / "full disk" / "step_0000001")
    assert one.keys() == two.keys() == list(SHAPES)
    for name, shape in SHAPES.items():
        assert one.shape(name) == two.shape(name) == shape
        assert torch.equal(one.load(name), two.load(name))


@pytest.fixture
def sound(tmp_path: Path, alone: None) -> Path:
    """A step folder of one rank, with an older one beside it."""
    for step in (1, 2):
        folder = saving.save(tmp_path, step, pieces(0, 1), {"variant": "debug"}, KEEP_ALL)
    return folder


def expect_damage(folder: Path, capsys: pytest.CaptureFixture[str], match: str = "") -> None:
    """All ways in refuse the folder in one line; auto says so and takes the older one."""
    for read in (checkpoint.verify, StepWeights):
        if read is StepWeights and match in ("sha256", "bytes"):
            continue  # what only the hashes show
        with pytest.raises(DamagedCheckpoint, match=match) as refusal:
            read(folder)
        assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert checkpoint.choose(folder.parent, "auto") == folder.parent / "step_0000001"
    said = capsys.readouterr().out
    assert said.startswith(f"resume: skipped {folder}") and said.count("\n") == 1
    with pytest.raises(DamagedCheckpoint):
        checkpoint.choose(folder.parent, str(folder))


RANK_0 = "rank_00000.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flipped bit": ("sha256", lambda folder: flip(folder / RANK_0, -3)),
    "truncated": ("bytes", lambda folder: (folder / RANK_0).write_bytes((folder / RANK_0).read_bytes()[:-4])),
    "file missing": ("rank_00000", lambda folder: (folder / RANK_0).unlink()),
    "file is a folder": (
        "rank_00000",
        lambda folder: ((folder / RANK_0).unlink(), (folder / RANK_0).mkdir()),
    ),
    "manifest missing": ("manifest.json", lambda folder: (folder / "manifest.json").unlink()),
    "manifest not JSON": ("manifest.json", lambda folder: (folder / "manifest.json").write_text("{")),
    "manifest not UTF-8": ("manifest.json", lambda folder: (folder / "manifest.json").write_bytes(b'"\xff"')),
    "manifest too deep": ("deep", lambda folder: (folder / "manifest.json").write_text("[" * 200_000)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_skipped(name: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    match, damage = DAMAGES[name]
    damage(sound)
    expect_damage(sound, capsys, match)


def entry(**changes: Any) -> dict[str, Any]:
    return {RANK_0: {"bytes": 1, "sha256": "0" * 64, **changes}}


HOSTILE_MANIFESTS: dict[str, Any] = {
    "a list": [],
    "another format": {"format": "other"},
    "another version": {"version": 2},
    "format is a list": {"format": []},
    "no step": {"step": None},
    "step is a text": {"step": "1"},
    "step is true": {"step": True},
    "step below 0": {"step": -1},
    "no world size": {"world_size": None},
    "more ranks than files": {"world_size": 2},
    "no files": {"files": None},
    "files is a list": {"files": [RANK_0]},
    "files is empty": {"files": {}},
    "no ranks": {"files": {}, "world_size": 0},
    "entry is a list": {"files": {RANK_0: [1, "0" * 64]}},
    "entry without bytes": {"files": {RANK_0: {"sha256": "0" * 64}}},
    "entry without sha256": {"files": {RANK_0: {"bytes": 1}}},
    "bytes is a text": {"files": entry(bytes="1")},
    "bytes is true": {"files": entry(bytes=True)},
    "bytes is a fraction": {"files": entry(bytes=1.5)},
    "sha256 is a number": {"files": entry(sha256=0)},
    "sha256 too short": {"files": entry(sha256="0" * 63)},
    **{
        f"file named {name!r}": {"files": {name: entry()[RANK_0]}}
        for name in ("..", ".", "", "../step_0000001/" + RANK_0, "/etc/passwd", "a/b", "a\0b", "a\\b")
    },
}


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused(name: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, changes = sound / "manifest.json", HOSTILE_MANIFESTS[name]
    manifest = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**manifest, **changes} if isinstance(changes, dict) else changes))
    expect_damage(sound, capsys, "manifest.json")


Table = dict[str, Any]
HOSTILE_TABLES: dict[str, Callable[[Table], Any]] = {
    "a list": lambda table: [],
    "a number": lambda table: 3,
    "empty": lambda table: {},
    "a tensor not listed": lambda table: {key: value for key, value in table.items() if key != "master/one"},
    "a tensor too many": lambda table: {**table, "master/more": [0, 1, [1]]},
    "entry is a number": lambda table: {**table, "master/one": 1},
    "entry is a table": lambda table: {**table, "master/one": {"start": 0}},
    "entry too short": lambda table: {**table, "master/one": [0, 1]},
    "start is a text": lambda table: {**table, "master/one": ["0", 1, [1]]},
    "start is a fraction": lambda table: {**table, "master/one": [0.0, 1, [1]]},
    "start is true": lambda table: {**table, "master/odd": [True, 20, [3, 7]]},
    "start below 0": lambda table: {**table, "master/one": [-1, 1, [1]]},
    "length is null": lambda table: {**table, "master/one": [0, None, [1]]},
    "shape is a number": lambda table: {**table, "master/one": [0, 1, 1]},
    "shape below 0": lambda table: {**table, "master/odd": [0, 21, [-3, -7]]},
    "shape of texts": lambda table: {**table, "master/one": [0, 1, ["1"]]},
    "beyond the shape": lambda table: {**table, "master/one": [1, 1, [1]]},
    "beyond the tensor": lambda table: {**table, "master/odd": [0, 20, [3, 7]]},
    "shape larger than the pieces": lambda table: {
        key: [0, 1, [2]] if key.endswith("/one") else value for key, value in table.items()
    },
    "longer than the tensor": lambda table: {
        key: [0, 2, [2]] if key.endswith("/one") else value for key, value in table.items()
    },
    "another shape for a moment": lambda table: {**table, "exp_avg/odd": [0, 21, [7, 3]]},
    "kind unknown": lambda table: {
        key.replace("exp_avg_sq/one", "exp/one"): value for key, value in table.items()
    },
}


def rewrite(folder: Path, table_of: Callable[[Table], Any]) -> None:
    """Write the rank's file anew with another table, and a manifest that vouches for it."""
    file = folder / RANK_0
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        table = json.loads(opened.metadata()["fragments"])
    changed = table_of(table)
    save_file(tensors, file, {"fragments": changed if isinstance(changed, str) else json.dumps(changed)})
    vouch(folder)


def vouch(folder: Path) -> None:
    """Write a manifest with the true sizes and hashes of the files that lie here."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    found = sorted(folder.glob("rank_*.safetensors"))
    manifest["world_size"] = len(found)
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in found
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_file_written_anew_unchanged_is_sound(sound: Path) -> None:
    rewrite(sound, lambda table: table)
    checkpoint.verify(sound)


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_a_hostile_table_is_refused(name: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(sound, HOSTILE_TABLES[name])
    expect_damage(sound, capsys, "rank_00000|elements")


@pytest.mark.parametrize("name", ["momentum/one", "/one", "master/", "master"])
def test_a_tensor_of_no_kind_or_name_is_refused(
    name: str, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(sound / RANK_0, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        table = json.loads(opened.metadata()["fragments"])
    table[name] = [0, 1, [1]]
    save_file({**tensors, name: torch.ones(1)}, sound / RANK_0, {"fragments": json.dumps(table)})
    vouch(sound)
    expect_damage(sound, capsys, "no legal place")


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "NaN"])
def test_a_table_that_is_no_table_is_refused(
    text: str, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(sound, lambda table: text)
    expect_damage(sound, capsys, "rank_00000")


def test_another_dtype_or_no_table_is_refused(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(sound / RANK_0, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        metadata = opened.metadata()
    save_file({**tensors, "master/one": tensors["master/one"].half()}, sound / RANK_0, metadata)
    vouch(sound)
    expect_damage(sound, capsys, "float32")
    save_file(tensors, sound / RANK_0)
    vouch(sound)
    expect_damage(sound, capsys, "table of fragments")


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        # The lengths add up to the whole each time: counting them would pass.
        ([(0, 8), (0, 8)], "twice"),
        ([(0, 10), (4, 10), (16, 16)], "twice"),
        ([(0, 4), (6, 12), (6, 16)], "nowhere"),
        ([(4, 16), (4, 8)], "nowhere"),
        ([(0, 8), (9, 16)], "nowhere"),
        ([(0, 8), (8, 15)], "15 of 16"),
        ([(0, 8)], "8 of 16"),
    ],
)
def test_pieces_that_do_not_tile_are_refused(
    ranges: list[tuple[int, int]], match: str, tmp_path: Path, alone: None
) -> None:
    values = torch.arange(16.0)
    folder = saving.save(tmp_path, 1, [], {}, KEEP_ALL)
    for rank, (start, stop) in enumerate(ranges):
        file = folder / f"rank_{rank:05d}.safetensors"
        keys = [f"{kind}/p" for kind in KINDS]
        save_file(
            {key: values[start:stop].clone() for key in keys},
            file,
            {"fragments": json.dumps({key: [start, stop - start, [16]] for key in keys})},
        )
    vouch(folder)
    for read in (checkpoint.verify, StepWeights):
        with pytest.raises(DamagedCheckpoint, match=match):
            read(folder)


def test_choose_says_what_it_does_not_take(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = sound.parent / "step_0000001"
    assert checkpoint.choose(sound.parent, str(sound)) == sound
    assert capsys.readouterr().out == ""
    assert checkpoint.choose(sound.parent, str(older)) == older
    assert f"newer {sound}" in capsys.readouterr().out
    assert checkpoint.choose(sound.parent / "nothing", "auto") is None
    assert checkpoint.choose(sound.parent / "nothing", "none") is None
    with pytest.raises(ValueError, match="--resume must: no checkpoint"):
        checkpoint.choose(sound.parent / "nothing", "must")
    with pytest.raises(ValueError, match="--resume nowhere: no such folder; legal: auto, must, none"):
        checkpoint.choose(sound.parent, "nowhere")
    (sound.parent / "weights").mkdir()
    with pytest.raises(ValueError, match="weights: no checkpoint of a run; .* for --model.init_from; legal"):
        checkpoint.choose(sound.parent, str(sound.parent / "weights"))


def test_a_run_folder_stands_for_its_newest_sound_checkpoint(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        (sound.parent / f"step_000000{step}").rename(tmp_path / f"moved_{step}")
    (run / "checkpoints").mkdir()
    for step in (1, 2):
        (tmp_path / f"moved_{step}").rename(run / f"checkpoints/step_000000{step}")
    newest = run / "checkpoints/step_0000002"
    nothing = tmp_path / "another"
    assert checkpoint.choose(nothing, str(run)) == checkpoint.choose(nothing, str(newest.parent)) == newest
    flip(newest / RANK_0, -3)
    assert checkpoint.choose(nothing, str(run)) == run / "checkpoints/step_0000001"
    assert f"skipped {newest}" in capsys.readouterr().out
    (run / "checkpoints/step_0000001/manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint under .*run is damaged"):
        checkpoint.choose(nothing, str(run))


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(sound: Path) -> None:
    os.utime(sound.parent / "step_0000001", (2e9, 2e9))
    os.utime(sound, (1e9, 1e9))
    assert checkpoint.choose(sound.parent, "auto") == sound


def test_a_commit_is_on_the_disk_before_anyone_can_see_its_name(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a power failure tests: bytes, manifest, folder, name, the name's folder, `latest`."""
    done: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def logged_fsync(descriptor: int) -> None:
        done.append(f"sync {relative(Path(os.readlink(f'/proc/self/fd/{descriptor}')))}")
        fsync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        done.append(f"{relative(path)} -> {relative(target)}")
        return rename(path, target)

    def logged_replace(path: Path, target: Path) -> Path:
        done.append(f"{relative(path)} -> {relative(target)}")
        return replace(path, target)

    def relative(path: Path) -> str:
        return str(path.relative_to(tmp_path)).replace("step_0000001", "S")

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(Path, "replace", logged_replace)
    saving.save(tmp_path, 1, pieces(0, 1), {}, KEEP_ALL)
    wanted = []
    for file in (f"S.tmp/{RANK_0}", "S.tmp/manifest.json"):
        wanted += [f"sync {file}.tmp", f"{file}.tmp -> {file}", "sync S.tmp"]
    wanted += ["sync S.tmp", "S.tmp -> S", "sync ."]
    assert done == [*wanted, "sync latest.tmp", "latest.tmp -> latest", "sync ."]


def test_views_of_one_buffer_and_other_dtypes_are_stored_as_fp32(tmp_path: Path, alone: None) -> None:
    buffer = torch.arange(12, dtype=torch.float64).requires_grad_()
    parts = [Fragment(kind, name, (6,), 0, buffer[at : at + 6]) for kind in KINDS for name, at in
             (("a", 0), ("b", 6))]  # fmt: skip
    saved = StepWeights(saving.save(tmp_path, 3, parts, {}, KEEP_ALL))
    assert saved.step == 3 and saved.dtype("a") == torch.float32
    assert saved.load("a").tolist() == [0, 1, 2, 3, 4, 5] and saved.load("b").tolist() == [6, 7, 8, 9, 10, 11]


def test_options_below_zero_are_refused() -> None:
    checkpoint.check(CheckpointOptions(save_every=0, keep_last=0))
    for options in (CheckpointOptions(save_every=-1), CheckpointOptions(keep_last=-1)):
        with pytest.raises(ValueError, match="-1 must be 0 or more"):
            checkpoint.check(options)
