"""Ranks that encode one store together: the same samples as one process, and no dead rank is waited for."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megawan.data.encoding import REJECTED
from megawan.data.latents import LatentStore, StoreWriter
from megawan.data.ranks import Ranks
from megawan.dist import tasks
from tests.commands import ROOT
from tests.data.encoding import make_media
from tools.encode_dataset import main as encode_dataset

FLAGS = (
    *("--codec", "dct", "--num_frames", "5", "--height", "32", "--width", "32", "--windows", "2"),
    *("--bucket", "auto", "--max_area", "48x64"),
)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad clips, one of them listed twice, by rows of both ranks."""
    folder = make_media(tmp_path_factory.mktemp("media"))
    names = sorted(path.name for path in folder.iterdir())
    rows = [f"{name},caption of {name}" for name in [*names, "fast.mkv"]]
    assert (len(rows) - 1 - names.index("fast.mkv")) % 2 == 1
    (folder / "metadata.csv").write_text("\n".join(["video,prompt", *rows, ""]))
    return folder


def start(rank: int, media: Path, store: Path, *flags: str, size: int = 2) -> "subprocess.Popen[str]":
    """Start one rank as torchrun would."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    words = [
        sys.executable,
        str(ROOT / "tools/encode_dataset.py"),
        "--input",
        str(media),
        "--output",
        str(store),
    ]
    return subprocess.Popen(
        [*words, *FLAGS, *flags],
        env={**os.environ, **place, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(ranks: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Return code, output and errors of every rank, at the latest in a minute."""
    try:
        return [(rank.wait(60), *rank.communicate()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.timeout(180)
def test_two_ranks_make_the_store_of_one_also_after_one_was_killed(media: Path, tmp_path: Path) -> None:
    encode_dataset(["--input", str(media), "--output", str(tmp_path / "one"), *FLAGS])
    store = tmp_path / "two"
    ranks = [start(rank, media, store, "--rank_timeout", "3") for rank in (0, 1)]
    while not (store / "ranks/1.json").exists():
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGKILL)
    (code, _, said), (killed, _, _) = ended(ranks)
    assert killed == -signal.SIGKILL and code == 2 and not (store / "index.json").exists()
    assert said.count("\n") == 1 and "rank 1 of 2 gave no sign of life for 3 s" in said, said
    assert (store / "ranks").is_dir()
    first, second = ended([start(rank, media, store) for rank in (0, 1)])
    assert (first[0], second) == (0, (0, "", "")), (first, second)
    assert f" {len(LatentStore(store))} samples, " in first[1]
    one, two = LatentStore(tmp_path / "one"), LatentStore(store)
    two.verify()
    assert two.fingerprint == one.fingerprint and torch.equal(two.empty_text, one.empty_text)
    for number in range(len(one)):
        ours, theirs = two[number], one[number]
        assert ours.prompt == theirs.prompt
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.text, theirs.text)
    rejected = (store / REJECTED).read_text()
    assert rejected == (tmp_path / "one" / REJECTED).read_text() and "listed before" in rejected
    assert sorted(path.name for path in store.iterdir()) == [
        *("empty.safetensors", "index.json", REJECTED),
        *("shard_0of2_00000.safetensors", "shard_1of2_00000.safetensors"),
    ]


def test_ranks_divide_a_share_of_a_job_array_and_a_last_call_finishes(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.csv"
    one.write_text("video,prompt\nlong.mkv,caption of long.mkv\n")
    words = ["--input", str(one), "--root", str(media), "--output", str(tmp_path / "s"), *FLAGS]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for share, rank, made in (
        ("1/2", "1", "nothing to do"),
        ("0/2", "1", "nothing to do"),
        ("0/2", "0", "2 enc"),
    ):
        monkeypatch.setenv("RANK", rank)
        encode_dataset([*words, "--shard", share])
        number = int(share[0]) + 2 * int(rank)
        said = capsys.readouterr().out
        assert made in said and f"share {number}/4 of" in said and not (tmp_path / "s/ranks").exists()
    (tmp_path / "s/ranks").mkdir()  # as killed ranks leave it
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    encode_dataset(words)
    assert "nothing to do, 2 kept" in capsys.readouterr().out and len(LatentStore(tmp_path / "s")) == 2
    assert not (tmp_path / "s/ranks").exists()


def gathered(store: Path, size: int, say: list[Any], timeout: float = 20) -> list[Any]:
    """Return what each rank's gather returned or raised, all at once; None in `say`: no such rank."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = Ranks(store, rank, size, timeout).gather(say[rank])
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size) if say[rank] is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_rank_0_hears_what_the_others_did_and_nothing_is_left(tmp_path: Path) -> None:
    told = gathered(tmp_path / "s", 3, [{"did": 0}, {"did": 1}, {"did": 2, 7: []}])
    assert told == [[{"did": 0}, {"did": 1}, {"did": 2, "7": []}], None, None]
    assert not (tmp_path / "s").exists()


def test_what_a_killed_call_said_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "ranks"
    folder.mkdir(parents=True)
    old = {"is": "old", "hears": "older", "at": 3, "done": {"did": "long ago"}}
    (folder / "1.json").write_text(json.dumps(old))
    silent = gathered(tmp_path / "s", 2, [{"did": 0}, None], timeout=0.6)[0]
    assert "rank 1 of 2 gave no sign of life" in str(silent)
    (folder / "1.json").write_text(json.dumps(old))
    (folder / "0.json").write_text(json.dumps({**old, "heard": ["another"], "failed": "long ago"}))
    late = gathered(tmp_path / "s", 2, [None, {"did": 1}], timeout=0.6)[1]
    assert "rank 0 of 2 gave no sign of life" in str(late)
    assert gathered(tmp_path / "s", 2, [{"did": 0}, {"did": 1}])[0] == [{"did": 0}, {"did": 1}]


def test_a_rank_that_gives_up_says_so(tmp_path: Path) -> None:
    first, second = Ranks(tmp_path / "s", 0, 2, 20), Ranks(tmp_path / "s", 1, 2, 20)
    second.fail("no weights")
    with pytest.raises(ValueError, match="rank 1 of 2 failed: no weights"):
        first.gather({})
    first.fail("no weights of rank 1")
    with pytest.raises(ValueError, match="rank 0 of 2 failed: no weights of rank 1"):
        second.gather({})


def test_a_folder_that_is_no_store_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("film.tmp", "note.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="holds film.tmp, which is not a latent store's"):
        Ranks(tmp_path, 0, 2, 20)
    with pytest.raises(ValueError, match="holds film.tmp, which is not a latent store's"):
        StoreWriter(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.tmp", "note.txt"]


def test_the_launcher_says_which_rank_this_is() -> None:
    def numbers(variables: dict[str, str]) -> tuple[int, int, int]:
        place = tasks(variables)
        return place.rank, place.world_size, place.local_rank

    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    step = {**batch_script, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    assert numbers({}) == numbers(batch_script) == (0, 1, 0)
    assert numbers(step) == (5, 8, 1)
    assert numbers({**step, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == (1, 2, 1)
