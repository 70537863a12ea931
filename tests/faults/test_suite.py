"""Everything that is done to a run on purpose (`pytest -m faults`, about ten minutes; docs/reliability.md
has the last result): two real ranks, real kills, and afterwards the same bits as the undisturbed run."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megawan.dist import free_port
from tests.commands import command, rank_process, wait_for
from tests.ranks import TRAIN, train
from tests.test_faults import SHORT, digests, one_line

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

RUN = ("--output", "run", *SHORT)
LOST_S = 45.0
"""Every fault ends the run within this: ten seconds of start, the time-out of 8 s where it needs it, the
rest for a busy machine."""


@pytest.fixture(scope="module", autouse=True)  # the first run may have to build DeepSpeed's extension
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = train(folder, *RUN)
    assert ended.codes == [0, 0], ended.err
    return folder / "run"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGABRT", "SIGSEGV", "exit"])
def test_a_rank_that_dies_is_named_by_the_other(kind: str, rank: int, tmp_path: Path) -> None:
    ended = train(tmp_path, *RUN, "--dist_timeout", "8", fault=f"3:{rank}:{kind}")
    assert ended.codes[rank] == (3 if kind == "exit" else -signal.Signals[kind])
    assert ended.codes[1 - rank] == 1 and ended.seconds < LOST_S
    assert f"lost rank {rank} (" in one_line(ended, 1 - rank)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["hang", "SIGSTOP"])
def test_a_rank_that_stands_still_is_named_by_the_other(kind: str, rank: int, tmp_path: Path) -> None:
    ended = train(tmp_path, *RUN, "--dist_timeout", "8", fault=f"3:{rank}:{kind}")
    assert ended.codes[1 - rank] == 1 and ended.seconds < LOST_S
    assert ended.codes[rank] == (1 if kind == "hang" else None)  # a stopped process is its launcher's to kill
    assert f"rank {rank} (" in one_line(ended, 1 - rank)


@pytest.mark.parametrize("moment", ["write", "commit"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_save_that_is_killed_leaves_the_one_before(stage: int, moment: str, tmp_path: Path) -> None:
    flags = (*RUN, "--deepspeed", f"ds_configs/zero{stage}.json")
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(whole, *flags).codes == [0, 0]
    rank = 0 if moment == "commit" else 1
    killed = train(tmp_path, *flags, fault=f"4:{rank}:SIGKILL@{moment}")
    assert killed.codes[rank] == -signal.SIGKILL and killed.codes[1 - rank] == 1
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_0000002\n"
    resumed = train(tmp_path, *flags)
    assert resumed.codes == [0, 0], resumed.err
    assert "resumed run/checkpoints/step_0000002" in resumed.out[0]
    assert digests(tmp_path / "run", 6) == digests(whole / "run", 6)


def test_random_kills_over_200_steps_end_in_the_same_bits(tmp_path: Path) -> None:
    """A rank is killed at random moments, start-up and saves among them; the same command is given again."""
    flags = (
        "--steps",
        "200",
        "--checkpoint.save_every",
        "7",
        "--ema.decay",
        "0.99",
        "--dist_timeout",
        "30",
        "--metrics.log_every",
        "10",
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(whole, "--output", "run", *flags, timeout=300).codes == [0, 0]
    chance, kills = random.Random(20261123), 0

    def kill_one(ranks: list[int], out: Path) -> None:
        # Mostly while it trains and saves, now and then while it starts.
        if chance.random() < 0.8:
            wait_for("| loss", out)
        end = time.monotonic() + chance.uniform(0, 5)
        while time.monotonic() < end and "finished" not in out.read_text():
            time.sleep(0.02)
        with_process(chance.choice(ranks), signal.SIGKILL)

    for _ in range(40):
        ended = train(tmp_path, "--output", "run", *flags, timeout=300, meanwhile=kill_one)
        if ended.codes == [0, 0] or "finished 200 steps" in ended.out[0] or "nothing to do" in ended.out[0]:
            break
        kills += 1
    assert kills >= 5 and digests(tmp_path / "run", 200) == digests(whole / "run", 200)
    print(f"{kills} kills")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_said_and_ends_the_run_in_the_end(rank: int, tmp_path: Path) -> None:
    def fill_disk(ranks: list[int], out: Path) -> None:
        wait_for("saved run/checkpoints/step_0000002", out)
        resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    flags = ("--output", "run", "--steps", "100000", "--checkpoint.save_every", "2")
    ended = train(tmp_path, *flags, meanwhile=fill_disk)
    assert ended.codes == [1, 1], ended.err
    assert ended.out[0].count("NOT saved") == 3
    assert "3 checkpoints in a row could not be saved" in one_line(ended, 0)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left[0] == "latest" and not [name for name in left if name.endswith(".tmp")]
    # The disk is free again: it goes on from the last one that was saved.
    steps = int((tmp_path / "run/checkpoints/latest").read_text().strip()[5:])
    again = train(tmp_path, "--output", "run", "--steps", str(steps + 1))
    assert again.codes == [0, 0] and f"resumed run/checkpoints/step_{steps:07d}" in again.out[0]


def test_a_run_folder_that_vanishes_ends_the_run_in_the_end(tmp_path: Path) -> None:
    def take_away(ranks: list[int], out: Path) -> None:
        wait_for("saved run/checkpoints/step_0000002", out)
        (tmp_path / "run").rename(tmp_path / "gone")
        (tmp_path / "run").touch()  # or the next save would make it anew

    flags = ("--output", "run", "--steps", "100000", "--checkpoint.save_every", "2")
    ended = train(tmp_path, *flags, meanwhile=take_away)
    assert ended.codes == [1, 1], ended.err
    assert "NOT saved" in ended.out[0]
    # TensorBoard's own thread prints a traceback of its own when its file is gone.
    assert "could not be saved" in ended.err[0].splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_again_and_again_do_not_disturb_the_save(number: int, tmp_path: Path) -> None:
    def warn_all(ranks: list[int], out: Path) -> None:
        wait_for("step 1/", out)
        for _ in range(20):
            for rank in ranks:
                with_process(rank, number)
            time.sleep(0.02)

    ended = train(tmp_path, "--output", "run", "--steps", "100000", meanwhile=warn_all)
    assert ended.codes == [0, 0], ended.err
    stopped = int((tmp_path / "run/checkpoints/latest").read_text().strip()[5:])
    again = train(tmp_path, "--output", "run", "--steps", str(stopped + 1))
    assert again.codes == [0, 0] and "resumed run/checkpoints/step_" in again.out[0]


def with_process(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP", "hang"])
def test_a_rank_that_fails_the_health_check_is_named(kind: str, tmp_path: Path) -> None:
    flags = (*RUN, "--health_check", "--dist_timeout", "8")
    ended = train(tmp_path, *flags, fault=f"0:1:{kind}@health")
    assert ended.codes[0] == 1 and ended.seconds < LOST_S
    said = one_line(ended, 0)
    assert "rank 1 (" in said and "step 0, health check" in said
    assert not (tmp_path / "run/config.json").exists()


def test_ranks_with_another_configuration_stop_before_they_train(tmp_path: Path) -> None:
    ended = train(tmp_path, *RUN, of_rank_1=("--optim.learning_rate", "3e-4"))
    assert ended.codes == [1, 1] and ended.seconds < LOST_S
    assert all("ranks [1] disagree with rank 0 about the configuration" in one_line(ended, r) for r in (0, 1))
    assert "this rank has: optim.learning_rate 0.0003; rank 0 has: optim.learning_rate" in one_line(ended, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{"MASTER_ADDR": "no-such-host.invalid"}, {"WORLD_SIZE": "3"}])
def test_a_world_that_does_not_come_together_ends_in_one_line(
    variables: dict[str, str], tmp_path: Path
) -> None:
    ended = train(tmp_path, *RUN, "--dist_timeout", "6", variables=variables)
    assert ended.codes == [1, 1] and ended.seconds < 2 * LOST_S
    assert all("cannot join the other" in one_line(ended, rank) for rank in (0, 1))


def test_ctrl_c_ends_all_ranks_at_once(tmp_path: Path) -> None:
    def interrupt(ranks: list[int], out: Path) -> None:
        wait_for("step 1/", out)
        for rank in ranks:
            os.kill(rank, signal.SIGINT)

    ended = train(tmp_path, "--output", "run", "--steps", "100000", meanwhile=interrupt)
    assert ended.codes == [-signal.SIGINT] * 2 and ended.seconds < LOST_S


def torchrun(*flags: object) -> list[object]:
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    return [*words, *flags]


def test_no_rank_outlives_its_launcher_not_even_a_stopped_one(tmp_path: Path) -> None:
    ranks: list[int] = []

    def kill_launcher(out: Path, launcher: int) -> None:
        wait_for("step 1/", out)
        ranks.extend(rank_process(launcher, rank) for rank in (0, 1))
        os.kill(ranks[1], signal.SIGSTOP)
        os.kill(launcher, signal.SIGKILL)
        end = time.monotonic() + 10
        while any(map(alive, ranks)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, ranks))

    def alive(rank: int) -> bool:
        """A killed process lets go of its files before it is a zombie."""
        words = ["ps", "-o", "stat=", "-p", str(rank)]
        state = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        return state != "" and not state.startswith("Z")

    command(*torchrun(TRAIN, "--output", "run", "--steps", "100000"), cwd=tmp_path, meanwhile=kill_launcher)
    assert len(ranks) == 2


def test_torchrun_restarts_a_killed_run_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    # The kill in step 5 finds step 4 saved, however busy the machine is.
    flags = (*RUN, "--checkpoint.no_background", "--dist_timeout", "20")
    words = torchrun("--max_restarts", "1", TRAIN, *flags)
    done = command(*words, cwd=tmp_path, env={"MEGAWAN_FAULT": "5:1:SIGKILL"}, timeout=180)
    assert done.code == 0, done.err[-3000:]
    assert "resumed run/checkpoints/step_0000004" in done.out
    assert digests(tmp_path / "run", 6) == digests(undisturbed, 6)


def test_a_reading_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    def kill_reader(ranks: list[int], out: Path) -> None:
        wait_for("step 1/", out)
        children = Path(f"/proc/{ranks[1]}/task/{ranks[1]}/children").read_text().split()
        readers = [
            child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        os.kill(int(readers[0]), signal.SIGKILL)

    flags = ("--output", "run", "--steps", "100000", "--data.workers", "1")
    ended = train(tmp_path, *flags, meanwhile=kill_reader)
    assert ended.codes == [1, 1] and ended.seconds < LOST_S + 20
    assert "DataLoader worker" in ended.err[1] and "rank 1, step" in ended.err[1]
    assert "rank 1 failed at step" in one_line(ended, 0)


def test_another_layout_continues_with_the_same_samples(undisturbed: Path, tmp_path: Path) -> None:
    """From 2 ranks of ZeRO-3 to one rank of ZeRO-1 with accumulation: the losses of the curve go on."""
    where = ("--output", "run", *SHORT, "--checkpoint.resume", undisturbed / "checkpoints/step_0000004")
    flags = ("--deepspeed", "ds_configs/zero1.json", "--accumulation", "2")
    other = train(tmp_path, *where, *flags, world=1)
    assert other.codes == [0], other.err
    same = tmp_path / "same"
    same.mkdir()
    whole = train(same, *RUN)
    lines = [
        [line.split("|")[1] for line in out.splitlines() if line.startswith(("step 5/", "step 6/"))]
        for out in (other.out[0], whole.out[0])
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_the_dump_of_a_skipped_step_is_strict_json(tmp_path: Path) -> None:
    ended = train(tmp_path, *RUN, fault="3:1:nan")
    assert ended.codes == [0, 0]

    def refuse(name: str) -> float:
        raise ValueError(name)

    json.loads((tmp_path / "run/skipped/step_0000003.json").read_text(), parse_constant=refuse)
