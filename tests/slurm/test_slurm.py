"""The real scripts of slurm/ on a real Slurm of two nodes (`pytest -m slurm`; .ci/run installs what it
needs)."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megawan.checkpoint import StepWeights
from tests.commands import command
from tests.slurm.cluster import Slurm, missing, until
from tests.test_faults import digests

ROOT = Path(__file__).resolve().parents[2]
WHY = missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY), reason=WHY),
]
# What a shell would trip over, in the path of the checkout and of the output.
AWKWARD = 'it\'s a $HOME "lab"'
DEBUG = (
    *("--model.variant", "debug", "--model.recompute", "none", "--accumulation", "1"),
    *("--checkpoint.save_every", "20"),
)
TWO_RANKS = ("--parallel.ulysses_degree", "2")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / AWKWARD
    for name in ("megawan", "slurm", "tools", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("cluster") / "slurm", sys.executable, checkout)
    try:
        try:
            cluster.start()
        except TimeoutError as error:  # a machine that lets no daemon run is not ours to repair
            pytest.skip(f"Slurm does not start here: {error}\n{cluster.logs()}")
        yield cluster
    finally:
        cluster.stop()


def submit(
    slurm: Slurm,
    checkout: Path,
    script: str,
    *words: object,
    options: tuple[str, ...] = (),
    output: str = "",
    **variables: str,
) -> str:
    """Submit a script as a user would, from the checkout, `options` for sbatch; return the job's number."""
    ours = {
        "MEGAWAN_DATA": "synthetic",
        "MEGAWAN_INIT": "random",
        "MEGAWAN_RANKS_PER_NODE": "1",
        "MEGAWAN_PREFLIGHT": "0",
        "MEGAWAN_OUTPUT": str(checkout / output),
    }
    sbatch = ("sbatch", "--parsable", *options, f"slurm/{script}.sh", *words)
    return slurm.run(*sbatch, cwd=checkout, **{**ours, **variables}).strip()


def printed(slurm: Slurm, checkout: Path, job: str) -> str:
    return "".join(file.read_text(errors="replace") for file in checkout.glob(f"*_{job}.out"))


def test_two_nodes_train_and_a_warned_job_is_requeued_to_the_same_bits(slurm: Slurm, checkout: Path) -> None:
    flags = (*DEBUG, *TWO_RANKS, "--steps", "60")
    whole = submit(slurm, checkout, "train_14b", *flags, output="whole run")
    slurm.wait(whole)
    assert "finished 60 steps" in printed(slurm, checkout, whole)
    assert "layout: 2 ranks = dp 1 x ring 1 x ulysses 2" in printed(slurm, checkout, whole)

    warned = submit(slurm, checkout, "train_14b", *flags, output="warned run", MEGAWAN_PREFLIGHT="1")
    until(lambda: "step 5/60" in printed(slurm, checkout, warned), "step 5", 180)
    slurm.run("scancel", "--batch", "--signal=USR1", warned)
    until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", warned), "the requeue", 60)
    assert "warned by SIGUSR1 at step" in printed(slurm, checkout, warned)
    slurm.wait(warned, timeout=180)
    said = printed(slurm, checkout, warned)
    assert "resumed" in said and "finished 60 steps" in said
    # Looked at before the first step, and not again after the requeue.
    assert said.count("preflight: ") == 1 and said.index("preflight: ") < said.index("step 1/60")
    assert f"✓ slurm           job {warned}: 2 ranks on 2 nodes" in said
    assert "✓ ulysses         2 ranks; the slowest sends: all-to-all " in said
    assert digests(checkout / "warned run", 60) == digests(checkout / "whole run", 60)


def test_a_job_whose_store_is_missing_ends_with_the_table(slurm: Slurm, checkout: Path) -> None:
    there = {"MEGAWAN_PREFLIGHT": "1", "MEGAWAN_DATA": str(checkout / "no store")}
    job = submit(slurm, checkout, "train_14b", *DEBUG, *TWO_RANKS, output="never trained", **there)
    slurm.wait(job, ["FAILED"])
    said = printed(slurm, checkout, job)
    assert "✗ data            " in said and "not a finished latent store" in said and "mend: encode" in said
    assert "1 FAILED: data" in said and "layout: 2 ranks" not in said
    assert not list((checkout / "never trained").iterdir())


def test_a_cancelled_job_leaves_nothing_running(slurm: Slurm, checkout: Path) -> None:
    job = submit(slurm, checkout, "train_14b", *DEBUG, *TWO_RANKS, "--steps", "100000", output="cancelled")
    until(lambda: "step 2/" in printed(slurm, checkout, job), "step 2", 180)
    assert slurm.leftovers(job)
    slurm.run("scancel", job)
    slurm.wait(job, ["CANCELLED"])
    until(lambda: not slurm.leftovers(job), "the end of all processes", 30)


def test_a_node_that_fails_requeues_the_job(slurm: Slurm, checkout: Path) -> None:
    flags = (*DEBUG, *TWO_RANKS, "--steps", "400", "--checkpoint.save_every", "10")
    job = submit(slurm, checkout, "train_14b", *flags, output="failed node")
    until(lambda: (checkout / "failed node/checkpoints/latest").exists(), "a checkpoint", 180)
    slurm.crash_node("n2")
    # The ranks of n1 fail first; the script finds n2 gone and asks for the requeue.
    until(lambda: "does not answer any more" in printed(slurm, checkout, job), "the script's finding", 90)
    slurm.start_node("n2")
    until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", job), "the restart", 120)
    until(lambda: "resumed " in printed(slurm, checkout, job), "the resumed run", 120)
    slurm.run("scancel", job)
    slurm.wait(job, ["CANCELLED"])
    until(lambda: not slurm.leftovers(job), "the end of all processes", 30)


def test_an_array_encodes_shares_that_merge_without_copying(slurm: Slurm, checkout: Path) -> None:
    clips, store = checkout / "my clips", checkout / "the store"
    made = command(ROOT / "tools/make_toy_dataset.py", "--output", clips, "--clips", "12", cwd=checkout)
    assert made.code == 0, made.err
    size = ("--codec", "dct", "--num_frames", "9", "--height", "64", "--width", "64")
    where = {"MEGAWAN_VIDEOS": str(clips), "MEGAWAN_DATA": str(store), "MEGAWAN_SHARDS": "2"}
    job = submit(
        slurm, checkout, "encode_dataset", *size, options=("--array=0-1", "--mem-per-gpu=100"), **where
    )
    until(lambda: not slurm.run("squeue", "--noheader", f"--jobs={job}").strip(), "the array's end", 120)
    before = {file.name: file.stat().st_mtime_ns for file in store.glob("shard_*.safetensors")}
    merge = ("--input", clips, "--output", store, *size)
    merged = command(ROOT / "tools/encode_dataset.py", *merge, cwd=checkout)
    assert merged.code == 0 and "12 kept" in merged.out, merged.out + merged.err + slurm.logs()
    assert before == {file.name: file.stat().st_mtime_ns for file in store.glob("shard_*.safetensors")}
    assert len(json.loads((store / "index.json").read_text())["samples"]) == 12


def test_both_experts_train_in_one_job(slurm: Slurm, checkout: Path) -> None:
    flags = (*DEBUG[2:], "--parallel.ulysses_degree", "1", "--steps", "3")
    two = ("--nodes=2",)
    job = submit(
        slurm, checkout, "train_a14b", *flags, options=two, output="both experts", MEGAWAN_TASK="debug"
    )
    slurm.wait(job, timeout=180)
    said = printed(slurm, checkout, job)
    assert said.count("finished 3 steps") == 2
    for expert in ("high", "low"):
        assert StepWeights(checkout / f"both experts/{expert}/checkpoints/step_0000003").step == 3
    assert "sigma 0.875300..1" in said and "sigma 0.004980..0.874850" in said
    folders = {"native": "low_noise_model", "diffusers": "transformer_2"}
    for layout, low in folders.items():
        words = ("--input", "both experts", "--output", f"one model {layout}", "--layout", layout)
        made = command(ROOT / "tools/export_checkpoint.py", *words, cwd=checkout)
        assert made.code == 0 and (checkout / f"one model {layout}" / low).is_dir(), made.err


def test_a_job_that_cannot_train_fails_with_one_line(slurm: Slurm, checkout: Path) -> None:
    job = submit(slurm, checkout, "train_14b", *DEBUG, "--parallel.ulysses_degree", "4", output="wrong")
    slurm.wait(job, ["FAILED"])
    assert "ulysses_degree 4" in printed(slurm, checkout, job)
    assert os.listdir(checkout / "wrong") == []
