"""Encoding while training, with real processes: the same losses, the same store, and clean ends."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from megawan.cli import UserError
from megawan.data.toy import ToyOptions, make_dataset
from tests.commands import ROOT, Finished, command, wait_for
from tests.data.encoding import contents
from tests.distributed import run_distributed
from tests.training import plan_of

TRAIN = ROOT / "megawan/train.py"
SIZE = ("--num_frames", "9", "--height", "32", "--width", "32")
ENCODE = ("--encode.codec", "dct", *(word.replace("--", "--encode.") for word in SIZE))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy clips, and the store that the tool makes of them."""
    folder = tmp_path_factory.mktemp("job")
    make_dataset(folder / "clips", ToyOptions(clips=20, size=32))
    tool = ROOT / "tools/encode_dataset.py"
    done = command(tool, "--input", "clips", "--output", "prepared", "--codec", "dct", *SIZE, cwd=folder)
    assert done.code == 0, done.err
    return folder


def worker_of(folder: Path) -> int:
    process = json.loads((folder / "status.json").read_text())["process"]
    return int(re.findall(r"process (\d+) on", process)[0])


def gone(process: int) -> bool:
    end = time.monotonic() + 20
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not Path(f"/proc/{process}").exists()


@pytest.fixture(scope="module")
def interrupted(job: Path) -> Finished:
    """A training whose worker is killed in the middle; then another one that is killed itself."""
    words = (TRAIN, "--data.source", "clips", "--data.path", "filled", *ENCODE, "--steps", "1000")
    folder, killed = job / "filled.filling", list[int]()

    def kill_worker(out: Path, _: int) -> None:
        wait_for("step 3/", out, 240)  # a first run builds DeepSpeed's extension
        killed.append(worker_of(folder))
        os.kill(killed[0], signal.SIGKILL)

    flags = ("--output", "run", "--micro_batch", "2", "--data.ahead", "2")
    died = command(*words, *flags, cwd=job, timeout=280, meanwhile=kill_worker)
    assert len(list((folder / "samples").iterdir())) in range(6, 11)  # of 3 or 4 steps, and 2 ahead

    def kill_trainer(_: Path, trainer: int) -> None:
        end = time.monotonic() + 60
        while worker_of(folder) == killed[0] and time.monotonic() < end:
            time.sleep(0.05)
        killed.append(worker_of(folder))
        os.kill(trainer, signal.SIGKILL)
        assert gone(killed[1])

    command(*words, cwd=job, meanwhile=kill_trainer)
    assert killed[0] != killed[1] and not (job / "filled/index.json").exists()
    return Finished(died.code, died.out, died.err.replace(f"process {killed[0]}", "process N"))


def test_a_killed_worker_ends_the_run_in_one_line(interrupted: Finished) -> None:
    said = (
        "the encoding worker (process N) was ended by SIGKILL; its log: filled.filling/worker.log; the same"
    )
    assert interrupted.code == 2 and interrupted.err.count("\n") == 1, interrupted.err[-3000:]
    assert interrupted.err.startswith(f"megawan/train.py: error: {said} command goes on from what is encoded")


def test_two_ranks_train_the_same_on_the_fly_as_on_the_prepared_store(
    job: Path, interrupted: Finished
) -> None:
    common = ["--deepspeed=ds_configs/zero2.json", "--micro_batch=2", "--steps=6", "--seed=4"]
    common += ["--data.prompt_dropout=0.3"]
    fly = [f"--data.source={job / 'clips'}", f"--data.path={job / 'filled'}", "--data.ahead=3", *ENCODE]
    cases = {
        "prepared": [*common, f"--data.path={job / 'prepared'}"],
        "fly": [*common, *fly, "--data.workers=1"],
    }
    ranks = run_distributed("tests.filling_workers:train", 2, timeout=200, arguments={"cases": cases})
    for rank in ranks:
        assert rank["fly"] == rank["prepared"]
        assert len(set(rank["fly"]["losses"])) == 6
    assert ranks[0]["fly"]["samples"] != ranks[1]["fly"]["samples"]
    assert contents(job / "filled") == contents(job / "prepared")


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("--data.source=c", *ENCODE), "--data.source c needs --data.path"),
    (("--data.path=p", *ENCODE), "--encode.* says how --data.source is encoded"),
    (("--data.source=c", "--data.path=p", "--encode.height=40"), "--encode.*: --height 40 must be"),
    (("--data.source=c", "--data.path=p", "--data.ahead=0"), "--data.ahead 0 must be 1 or more"),
    (("--data.source=c", "--data.path=p", "--data.wait_timeout=nan"), "--data.wait_timeout nan must be"),
    (("--data.source=c", "--data.path=p", "--dry_run", *ENCODE), "c: no such file or folder"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_flags_that_do_not_fit_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan_of(1, *words)


def test_a_mistake_that_the_worker_finds_is_one_line_and_leaves_nothing(job: Path) -> None:
    before = sorted(path.name for path in job.iterdir())
    words = ("--data.source", "clips", "--data.path", "prepared", *ENCODE, "--encode.fps", "8")
    refused = command(TRAIN, *words, cwd=job)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err[-3000:]
    assert "prepared: was encoded with other settings (fps: there 16.0, asked 8.0)" in refused.err
    assert sorted(path.name for path in job.iterdir()) == before
