"""Runs that something happens to, on two real ranks: whatever it is, all ranks end soon and say why, and
what a checkpoint holds is what an undisturbed run would hold. The rest is in tests/faults/ (`pytest -m
faults`)."""

import json
import os
import signal
from pathlib import Path

import pytest

from megawan.checkpoint import StepWeights
from tests.commands import wait_for
from tests.ranks import Ended, train

SHORT = (
    *("--steps", "6", "--checkpoint.save_every", "2", "--checkpoint.keep_last", "0", "--ema.decay", "0.9"),
    *("--optim.warmup_steps", "5"),  # another learning rate at every step
)

SECRETS = {
    "HF_TOKEN": "hf_planted5a17c0ffee",
    "WANDB_API_KEY": "planted5a17wandb",
    "AWS_SECRET_ACCESS_KEY": "planted5a17aws",
}


def digests(run: Path, step: int) -> dict[str, str]:
    """Return the sha256 of every rank's states: equal for runs that are the same bit by bit."""
    manifest = json.loads((run / f"checkpoints/step_{step:07d}/manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def one_line(ended: Ended, rank: int) -> str:
    """Return the last words of a rank that has nothing else to say."""
    assert "Traceback" not in ended.err[rank], ended.err[rank]
    (line,) = [line for line in ended.err[rank].splitlines() if line.startswith("megawan/train.py")]
    return line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = train(folder, "--output", "run", *SHORT, variables=SECRETS)
    assert ended.codes == [0, 0], ended.err
    assert not (folder / "run/lock.json").exists()
    return folder / "run"


def test_nothing_that_a_run_writes_or_says_holds_the_shells_secrets(undisturbed: Path) -> None:
    files = [path for path in undisturbed.parent.rglob("*") if path.is_file()]
    assert {"config.json", "env.json", "manifest.json", ".out0", ".err1"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


def test_the_first_error_is_shown_with_its_place_and_ends_all(tmp_path: Path) -> None:
    ended = train(tmp_path, "--output", "run", *SHORT, fault="3:1:raise")
    assert ended.codes == [1, 1] and ended.seconds < 60
    assert "RuntimeError: the fault that MEGAWAN_FAULT asks for at step 3" in ended.err[1]
    assert "rank 1, step 3, data" in ended.err[1]
    said = one_line(ended, 0)
    assert "rank 1 failed at step 3 (data): RuntimeError" in said and "samples [" in said


def test_a_rank_that_hangs_is_named_and_the_run_ends(tmp_path: Path) -> None:
    ended = train(tmp_path, "--output", "run", *SHORT, "--dist_timeout", "6", fault="3:1:SIGSTOP")
    assert ended.codes[0] == 1 and ended.codes[1] is None  # stopped for good: the launcher's to kill
    assert "watchdog: rank 1 (" in ended.err[0] and "all_reduce at megawan/agreement.py" in ended.err[0]
    assert "no sign of life" in ended.err[0] and "lost rank 1 (" in one_line(ended, 0)


def test_a_rank_killed_while_it_writes_costs_nothing_but_the_steps_since(
    undisturbed: Path, tmp_path: Path
) -> None:
    """With and without EMA, LR, data order, noise and step count: the states are the same bit by bit."""
    killed = train(tmp_path, "--output", "run", *SHORT, fault="4:1:SIGKILL@write")
    assert killed.codes == [1, -signal.SIGKILL]
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left in (["latest", "step_0000002"], ["latest", "step_0000002", "step_0000004.tmp"])
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_0000002\n"
    resumed = train(tmp_path, "--output", "run", *SHORT)
    assert resumed.codes == [0, 0], resumed.err
    assert "resumed run/checkpoints/step_0000002, written by 2 ranks" in resumed.out[0]
    for step in (4, 6):
        assert digests(tmp_path / "run", step) == digests(undisturbed, step)
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))
    saved = StepWeights(undisturbed / "checkpoints/step_0000006")
    name = "blocks.0.ffn.0.weight"
    assert saved.has_ema
    assert not saved.load(name).equal(StepWeights(saved.folder, "ema").load(name))


@pytest.mark.parametrize("fault", ["nan", "spike"])
def test_a_step_that_is_no_number_on_one_rank_moves_no_weight_on_any(fault: str, tmp_path: Path) -> None:
    flags = ("--steps", "4", "--checkpoint.save_every", "1", "--checkpoint.keep_last", "0")
    flags += ("--optim.max_loss", "100") if fault == "spike" else ()
    ended = train(tmp_path, "--output", "run", *flags, fault=f"3:1:{fault}")
    assert ended.codes == [0, 0], ended.err
    assert "step 3: NOT updated" in ended.out[0] and "1 in a row of at most 10" in ended.out[0]
    dump = json.loads((tmp_path / "run/skipped/step_0000003.json").read_text())
    assert len(dump["samples"]) == 2 and all(0 < row["sigma"] < 1 for row in dump["samples"])
    weights = [StepWeights(tmp_path / f"run/checkpoints/step_000000{step}") for step in (2, 3, 4)]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        two, three, four = (one.load_range(kind, "head.head.bias", 0, 64) for one in weights)
        assert two.equal(three) and not three.equal(four) and four.isfinite().all()
    assert [one.skipped_steps for one in weights] == [0, 1, 1]


def test_too_many_in_a_row_end_the_run_and_a_step_can_be_taken_again(tmp_path: Path) -> None:
    faults = "3:0:nan,4:1:nan"
    ended = train(tmp_path, "--output", "run", *SHORT, "--optim.max_skipped", "2", fault=faults)
    assert ended.codes == [1, 1]
    assert "2 steps in a row, up to step 4" in one_line(ended, 0) and "replay_step.py" in one_line(ended, 1)
    replay = (Path(__file__).parents[1] / "tools/replay_step.py", "run/skipped/step_0000004.json")
    again = train(tmp_path, program=replay, fault=faults)
    assert again.codes == [0, 0], again.err
    assert "from run/checkpoints/step_0000002: 2 steps to take" in again.out[0]
    assert "mse nan, then nan; its features are finite" in again.out[0]
    assert "step 4 does not update the weights" in again.out[0]


def test_a_rank_that_keeps_all_others_waiting_is_named(tmp_path: Path) -> None:
    faults = ",".join(f"{step}:1:slow" for step in range(2, 7))
    ended = train(tmp_path, "--output", "run", *SHORT, fault=faults)
    assert ended.codes == [0, 0], ended.err
    assert "mostly for rank 1 (" in ended.out[0] and "the last rank to begin them" in ended.out[0]


def test_ranks_of_one_video_that_read_different_samples_stop(tmp_path: Path) -> None:
    words = ("--output", "run", "--parallel.ulysses_degree", "2", *SHORT)
    ended = train(tmp_path, *words, fault="3:1:samples")
    assert ended.codes == [1, 1]
    assert all("read different samples" in one_line(ended, rank) for rank in (0, 1))


def test_everybody_saves_at_the_same_step_when_one_rank_is_told_to_stop(
    undisturbed: Path, tmp_path: Path
) -> None:
    def tell_rank_1(ranks: list[int], out: Path) -> None:
        wait_for("step 1/", out)
        os.kill(ranks[1], signal.SIGTERM)

    long = ("--output", "run", "--steps", "100000", *SHORT[2:])
    ended = train(tmp_path, *long, meanwhile=tell_rank_1)
    assert ended.codes == [0, 0], ended.err
    assert "saving step" in ended.out[0] and "warned by SIGTERM" in ended.out[0]
    stopped = (tmp_path / "run/checkpoints/latest").read_text()
    assert "the same command goes on from here" in ended.out[0] and stopped.startswith("step_")


def test_a_run_that_is_another_experiment_does_not_continue(undisturbed: Path, tmp_path: Path) -> None:
    where = ("--output", tmp_path / "other", "--checkpoint.resume", undisturbed / "checkpoints/step_0000004")
    other = train(tmp_path, *where, *SHORT, "--seed", "1", world=1)
    assert other.codes == [2] and "Traceback" not in other.err[0]
    # Synthetic samples are made of the seed, so the data is another too.
    assert "was trained with another data, global_batch, seed (" in other.err[0]
    assert "--checkpoint.allow_changes data global_batch seed" in other.err[0]
    assert not (tmp_path / "other").exists()
    names = ("data", "global_batch", "seed", "ema")
    allowed = ("--checkpoint.allow_changes", *names, "--steps", "5", "--ema.decay", "0")
    same = train(tmp_path, *where, "--seed", "1", *allowed, world=1)
    assert same.codes == [0], same.err
    for said in ("seed was 0, is 1", "global_batch was 2, is 1", "ema was a moving average, is no moving"):
        assert f"changed since step 4: {said}" in same.out[0]
