"""The commands as people type them, from another directory, on real files: the whole job in small, and
mistakes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from megawan.checkpoint import StepWeights
from megawan.data.video import read_all
from megawan.engine import extension_folder
from megawan.models.layouts import open_weights
from megawan.models.variants import get_variant
from megawan.models.wan import WanModel
from tests.commands import ROOT, Finished, command, rank_process, wait_for
from tests.models.peers import PeerModel, random_inputs

TRAIN = ROOT / "megawan/train.py"
LAUNCHER = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port")
BAD = ("--input", "bad.csv", "--output")
SAY_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
SIZE = ("--num_frames", "9", "--height", "64", "--width", "64")


def tool(name: str, *words: object, cwd: Path) -> Finished:
    return command(ROOT / f"tools/{name}.py", *words, cwd=cwd)


def is_one_line(finished: Finished, *words: str) -> None:
    assert finished.code == 2, finished.err[-2000:]
    assert finished.err.count("\n") == 1 and "Traceback" not in finished.err, finished.err[-2000:]
    for word in words:
        assert word in finished.err


def imported(finished: Finished) -> set[str]:
    """Return the packages that a command run with SAY_IMPORTS imported."""
    return set(re.findall(r"^import time: .*\| +([A-Za-z_]+)", finished.err, re.MULTILINE))


def port() -> int:
    return 20000 + os.getpid() % 20000


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's steps with few clips and three optimizer steps, run from a directory that is not the
    checkout."""
    cwd = tmp_path_factory.mktemp("a job's folder")
    steps = [
        (ROOT / "tools/make_toy_dataset.py", "--output", "clips", "--clips", "24"),
        (ROOT / "tools/encode_dataset.py", "--input", "clips", "--output", "store", "--codec", "dct", *SIZE),
        (
            *(*LAUNCHER, port(), TRAIN, "--deepspeed", "ds_configs/zero3.json", "--data.path", "store"),
            *("--output", "run", "--steps", "3", "--micro_batch", "4", "--parallel.ulysses_degree", "2"),
            *("--model.recompute", "full", "--learning_rate", "1e-3", "--data.prompt_dropout", "0.2"),
        ),
        (ROOT / "tools/export_checkpoint.py", "--input", "run", "--output", "exported"),
        (
            *(ROOT / "tools/sample.py", "--weights", "exported", "--output", "samples", "--dataset", "clips"),
            *(
                "--captions",
                "2",
                "--untrained",
                "0",
                "--codec",
                "dct",
                "--steps",
                "2",
                "--guidance",
                "2",
                *SIZE,
            ),
        ),
    ]
    for words in steps:
        finished = command(*words, cwd=cwd, timeout=240)
        assert finished.code == 0, f"{words}\n{finished.out[-2000:]}\n{finished.err[-4000:]}"
        (cwd / f"{Path(str(words[-1] if words[0] == '-m' else words[0])).stem}.log").write_text(finished.out)
        if words[0] == "-m":
            (cwd / "train.log").write_text(finished.out)
    return cwd


def test_training_tells_what_it_does(job: Path) -> None:
    log = (job / "train.log").read_text()
    for words in (
        "ulysses 2; ZeRO stage 3, fp32, recompute full",
        "step 3/3 | loss ",
        "| lr ",
        "grad_norm",
        "s/step",
        "tokens/s",
    ):
        assert words in log
    run = job / "run"
    assert (run / "checkpoints/latest").read_text().strip() == "step_0000003"
    assert json.loads((run / "config.json").read_text())["steps"] == 3
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_export_has_native_keys_and_says_where_it_comes_from(job: Path) -> None:
    (file,) = (job / "exported").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
    assert {"patch_embedding.weight", "blocks.5.self_attn.norm_q.weight", "head.modulation"} <= keys
    assert (metadata["variant"], metadata["step"]) == ("debug", "3")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One-step runs of both experts of a small A14B, in the folders high and low."""
    cwd = tmp_path_factory.mktemp("experts")
    for expert in ("high", "low"):
        words = ("--variant", f"debug-A14B-{expert}", "--output", expert, "--steps", "1")
        finished = command(TRAIN, *words, "--learning_rate", "1e-2", cwd=cwd)
        assert finished.code == 0, finished.err[-3000:]
        (cwd / f"{expert}.log").write_text(finished.out)
    return cwd


def test_an_expert_trains_its_own_side_of_the_boundary(experts: Path) -> None:
    assert "ids 0..416 (417 of 1000), sigma 0.875300..1" in (experts / "high.log").read_text()
    assert "ids 417..999 (583 of 1000), sigma 0.004980..0.874850" in (experts / "low.log").read_text()
    mixed = command(TRAIN, "--variant", "i2v-A14B-high", "--flow.expert", "i2v-A14B-low", cwd=experts)
    is_one_line(mixed, "--flow.expert i2v-A14B-low", "i2v-A14B-high")


def test_both_experts_of_an_a14b_become_one_model(experts: Path) -> None:
    pair = ("--input", "high", "--low_noise", "low", "--dtype", "float32")
    done = tool("export_checkpoint", *pair, "--output", "d", "--layout", "diffusers", cwd=experts)
    assert done.code == 0, done.err
    index = json.loads((experts / "d/model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and {"transformer", "transformer_2"} <= index.keys()
    wan = get_variant("debug-A14B-high").config
    inputs = random_inputs(wan, batch=1, latent=(2, 4, 6), seed=0)
    for folder, run in (("transformer", "high"), ("transformer_2", "low")):
        saved = StepWeights(experts / run / "checkpoints/step_0000001")
        model = WanModel(wan)
        model.load_state_dict({key: saved.load(key) for key in saved.keys()})
        twin = PeerModel.from_pretrained(experts / "d", subfolder=folder)
        with torch.no_grad():
            expected = inputs.ours(model)
            assert expected.abs().max() > 1e-3
            assert torch.allclose(inputs.theirs(twin), expected, atol=1e-5)
    job = ("--input", ".", "--dtype", "float32")  # the folder of a job of slurm/train_a14b.sh
    native = tool("export_checkpoint", *job, "--output", "n", cwd=experts)
    assert native.code == 0 and "step 1 of high and step 1 of low as native" in native.out, native.err
    for expert in ("high", "low"):
        saved = StepWeights(experts / expert / "checkpoints/step_0000001")
        written = open_weights(experts / f"n/{expert}_noise_model")
        assert sorted(written.keys()) == sorted(saved.keys())
        assert all(torch.equal(written.load(key), saved.load(key)) for key in saved.keys())
    twice = tool("export_checkpoint", *job, "--low_noise", "low", "--output", "twice", cwd=experts)
    is_one_line(twice, "holds both experts", "leave --low_noise out")


@pytest.mark.parametrize(
    ("high", "low", "said"),
    [
        ("low", "high", "only a high-noise expert"),
        ("high", "high", "the partner of debug-A14B-high is debug-A14B-low"),
    ],
)
def test_experts_in_the_wrong_places_are_refused(high: str, low: str, said: str, experts: Path) -> None:
    words = ("--input", high, "--low_noise", low, "--output", f"{high}-{low}")
    is_one_line(tool("export_checkpoint", *words, cwd=experts), said)
    assert not (experts / f"{high}-{low}").exists()


def test_samples_are_videos_with_a_picture_of_them(job: Path) -> None:
    entries = json.loads((job / "samples/samples.json").read_text())
    assert [entry["weights"] for entry in entries] == ["untrained", "untrained", "trained", "trained"]
    for entry in entries:
        frames, fps = read_all(job / "samples" / entry["file"])
        assert frames.shape == (9, 64, 64, 3) and fps == pytest.approx(16)
    with Image.open(job / "samples/contact_sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 200
    checked = tool("check_toy_samples", "--input", "samples", "--colour", "0", "--direction", "0", cwd=job)
    assert checked.code == 0 and "colour right in" in checked.out
    assert tool("check_toy_samples", "--input", "samples", "--colour", "3", cwd=job).code == 1


def test_the_same_command_again_resumes_and_a_finished_run_has_nothing_to_do(job: Path) -> None:
    words = (
        TRAIN,
        "--data.path",
        "store",
        "--output",
        "run",
        "--micro_batch",
        "4",
        "--learning_rate",
        "1e-3",
    )
    again = command(*words, "--steps", "3", cwd=job)
    assert again.code == 0 and "nothing to do" in again.out, again.err[-2000:]
    longer = command(*words, "--steps", "4", "--data.prompt_dropout", "0.2", cwd=job)
    assert longer.code == 0 and "resumed run/checkpoints/step_0000003, written by 2 ranks" in longer.out, (
        longer.err[-2000:]
    )
    assert "step 4/4" in longer.out and "step 3/4" not in longer.out


def test_a_second_encode_has_nothing_to_do(job: Path) -> None:
    before = {file.name: file.read_bytes() for file in (job / "store").iterdir()}
    again = tool("encode_dataset", "--input", "clips", "--output", "store", "--codec", "dct", *SIZE, cwd=job)
    assert again.code == 0 and "nothing to do, 24 kept, 0 rejected" in again.out
    assert before == {file.name: file.read_bytes() for file in (job / "store").iterdir()}


COLLECTIONS = f"""
import gc, runpy, sys
notes = open("collections", "w", buffering=1)
def note(phase, info):
    if phase == "start":
        notes.write(f"{{info['generation']}} {{gc.get_freeze_count()}}\\n")
gc.callbacks.append(note)
sys.argv = ["train.py", "--output", "run", "--steps", "1"]
runpy.run_path("{TRAIN}", run_name="__main__")
"""


def test_the_garbage_collector_rests_while_a_run_starts_and_skips_what_that_made(tmp_path: Path) -> None:
    finished = command("-c", COLLECTIONS, cwd=tmp_path)
    assert finished.code == 0, finished.err[-3000:]
    lines = (tmp_path / "collections").read_text().splitlines()
    collected = [tuple(map(int, line.split())) for line in lines]
    starting = [generation for generation, frozen in collected if frozen == 0]
    assert len(starting) < 20, "hundreds without gc.disable"
    building = [frozen for generation, frozen in collected if generation == 2 and frozen > 0]
    awake = [frozen for generation, frozen in collected if generation == 0 and frozen > 0]
    assert building[0] > 100_000, "DeepSpeed's own collection looks through all that was imported"
    assert awake and min(awake) > building[0] + 100_000, "it stays off, or looks through all that was built"


def test_bare_start_needs_nothing(tmp_path: Path) -> None:
    bare = command(
        *LAUNCHER, port() + 1, TRAIN, "--deepspeed", "ds_configs/zero3.json", "--steps", "2", cwd=tmp_path
    )
    assert bare.code == 0, bare.err[-3000:]
    assert "synthetic samples" in bare.out and "step 2/2 | loss" in bare.out
    assert len(list(tmp_path.glob("runs/debug-*/checkpoints/step_0000002"))) == 1


def test_a_world_without_a_launcher_is_one_line(tmp_path: Path) -> None:
    alone = command(TRAIN, cwd=tmp_path, env={"WORLD_SIZE": "2", "RANK": "0"})
    is_one_line(alone, "WORLD_SIZE=2", "MASTER_ADDR", "launcher")


@pytest.mark.parametrize("variant", ["debug-i2v", "debug-flf2v", "debug-control"])
def test_a_variant_with_image_conditions_trains(variant: str, tmp_path: Path) -> None:
    done = command(TRAIN, "--variant", variant, "--steps", "1", cwd=tmp_path, env=SAY_IMPORTS)
    assert done.code == 0 and "step 1/1 | loss" in done.out, done.err[-3000:]
    assert {"deepspeed", "tensorboard"} <= imported(done)
    assert not {"transformers", "diffusers"} & imported(done)  # seconds, and thousands of files on every rank
    assert "torch._dynamo.convert_frame" in done.err  # comes with torch's optimizers
    assert "torch._inductor.compile_fx" not in done.err  # another second


def test_samples_without_what_the_variant_takes_are_refused(job: Path) -> None:
    said = ("no CLIP features and no condition", "debug-i2v")
    is_one_line(command(TRAIN, "--variant", "debug-i2v", "--data.path", "store", cwd=job), *said)
    is_one_line(command(TRAIN, "--variant", "debug-vace", cwd=job), "debug-vace", "VACE")


def test_a_warning_that_reaches_one_rank_saves_on_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port() + 2, TRAIN)
    flags = ("--output", "run", "--parallel.ulysses_degree", "2", "--metrics.log_every", "1")

    def warn_rank_1(out: Path, launcher: int) -> None:
        wait_for("step 2/", out)
        os.kill(rank_process(launcher, 1), signal.SIGUSR1)

    warned = command(*words, *flags, "--steps", "100000", cwd=tmp_path, meanwhile=warn_rank_1)
    assert warned.code == 0, warned.err[-3000:]
    (stopped,) = re.findall(r"warned by SIGUSR1 at step (\d+) of 100000", warned.out)
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert latest == f"step_{int(stopped):07d}"
    last = int(stopped) + 1
    resumed = command(*words, *flags, "--steps", last, cwd=tmp_path)
    assert resumed.code == 0, resumed.err[-3000:]
    assert f"resumed run/checkpoints/{latest}" in resumed.out and f"step {last}/{last} |" in resumed.out


def test_the_lock_that_a_killed_build_left_does_not_hang_the_start(job: Path, tmp_path: Path) -> None:
    """`job` ran before, so the extension is built; DeepSpeed itself would wait for this lock for ever."""
    folder = tmp_path / "extensions"
    shutil.copytree(extension_folder(), folder)
    lock = folder / "deepspeed_shm_comm/lock"
    assert lock.parent.is_dir()
    lock.touch()
    started = command(
        TRAIN, "--steps", "1", cwd=tmp_path, timeout=60, env={"TORCH_EXTENSIONS_DIR": str(folder)}
    )
    assert started.code == 0, started.err[-2000:]


def test_an_extension_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = command(TRAIN, cwd=tmp_path, env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "file")})
    assert failed.code == 2, failed.err[-2000:]
    (line,) = (line for line in failed.err.splitlines() if "error:" in line)
    assert "CPU extension" in line and str(tmp_path / "file") in line and "g++" in line
    assert "Traceback" not in failed.err and not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path: Path) -> None:
    size = ("--num_frames", "81", "--height", "480", "--width", "832")
    words = ("-m", "megawan.train", "--dry-run", "--variant", "t2v-14B", *size)
    dry = command(*words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), **SAY_IMPORTS})
    assert dry.code == 0, dry.err[-2000:]
    assert "torch" in imported(dry)
    assert not {"deepspeed", "transformers", "diffusers", "tensorboard"} & imported(dry)
    assert "t2v-14B, 14,288,491,584 parameters, 40 heads" in dry.out and "32,760 tokens a video" in dry.out
    assert "ids 0..999" in dry.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stderr", ".stdout"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stpes", "3"), ("--stpes", "--steps")),
        (("--steps", "0"), ("--steps 0", "1 or more")),
        (("--deepspeed", "nope.json"), ("nope.json", "ds_configs/zero3.json")),
        (("--variant", "t2v-15B"), ("'t2v-15B'", "t2v-14B")),
        (("--parallel.ulysses_degree", "4"), ("ulysses_degree 4", "6 heads", "1, 2, 3, 6")),
        (("--parallel.ring_degree", "2"), ("2", "world")),
        (("--data.path", "nowhere"), ("nowhere", "latent store", "tools/encode_dataset.py")),
        (("--num_frames", "8"), ("8 frames", "4n+1")),
        (("--height", "60"), ("height 60", "multiple of 16")),
        (("--flow.shift", "0"), ("shift", "above 0")),
        (("--flow.min_sigma", "0.9", "--flow.max_sigma", "0.1"), ("min_sigma", "max_sigma")),
        (("--learning_rate", "-1"), ("learning_rate -1", "above 0")),
        (("--optim.warmup_steps", "99", "--steps", "5"), ("warmup_steps 99", "5")),
        (("--model.recompute", "most"), ("'most'", "full:K")),
        (("--model.attention", "flash9"), ("'flash9'", "sdpa")),
        (("--model.init_from", "nowhere"), ("nowhere", "no such file")),
        (("--precision", "fp16"), ("'fp16'", "'bf16'")),
        (("--config", "nope.json"), ("nope.json", "No such file")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_mistakes_of_training_are_one_line(
    words: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    is_one_line(command(TRAIN, *words, cwd=tmp_path), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stderr", ".stdout"]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("make_toy_dataset", ("--output", "full"), ("full",)),
        ("make_toy_dataset", ("--output", "new", "--frames", "8"), ("8",)),
        ("encode_dataset", ("--input", "nowhere", "--output", "o"), ("nowhere", "no such file")),
        ("encode_dataset", ("--input", "full", "--output", "o"), ("full", "metadata.csv")),
        ("encode_dataset", (*BAD, "o", "--codec", "dct", *SIZE), ("0 usable clips of 1",)),
        ("encode_dataset", (*BAD, "o", "--codec", "dct", "--num_frames", "8"), ("4n+1",)),
        ("encode_dataset", (*BAD, "o", "--codec", "wan2.1"), ("wan2.1",)),
        ("encode_dataset", (*BAD, "full", "--codec", "dct", *SIZE), ("full", "note.txt")),
        ("export_checkpoint", ("--input", "full", "--output", "o"), ("full", "no training checkpoint")),
        ("sample", ("--weights", "nowhere", "--output", "o", "--prompts", "x"), ("nowhere",)),
        ("sample", ("--weights", "nowhere", "--output", "full", "--prompts", "x"), ("full", "not empty")),
        ("sample", ("--weights", "nowhere", "--output", "o"), ("--prompts", "--dataset")),
        ("check_toy_samples", ("--input", "full"), ("full",)),
        ("quickstart", ("--output", "full"), ("full", "not an earlier quickstart")),
        ("convert_checkpoint", ("--input", "nowhere", "--output", "o"), ("missing: --layout {native",)),
        ("convert_checkpoint", ("--input", "no", "--output", "o", "--layout", "native"), ("no: ",)),
    ],
)  # fmt: skip
def test_mistakes_of_the_tools_are_one_line_and_leave_nothing(
    name: str, words: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "bad.csv").write_text("video,prompt\nbad.mp4,a cat\n")
    is_one_line(tool(name, *words, cwd=tmp_path), *said)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
    assert not (tmp_path / "o").exists() and not (tmp_path / "new").exists()
