"""The shell files, with stand-ins for Slurm's commands, DeepSpeed's launcher and pip on PATH.

Every path has a space, a quote and a `$()` in it: what reaches the program must be what the user wrote.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megawan import config
from megawan.models.recompute import parse_recompute
from megawan.models.variants import get_variant

ROOT = Path(__file__).resolve().parents[1]
SHELL_FILES = sorted([ROOT / ".ci/run", *ROOT.glob("launchers/*.sh"), *ROOT.glob("slurm/*.sh")])
TRAIN_SCRIPTS = ("train_1.3b", "train_5b", "train_14b", "train_a14b")
AWKWARD = "a b's $(touch oops)"


def stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def check_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1 and "error: " in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_are_clean(path: Path) -> None:
    done = run(["shellcheck", "-x", str(path)], dict(os.environ), ROOT)
    assert done.returncode == 0, done.stdout
    if path.name != "common.sh":
        assert "\nset -euo pipefail\n" in path.read_text("utf-8")


# ------------------------------------------------------------------------------------------------------ slurm


@dataclass
class Cluster:
    """A checkout with slurm/ in it, and stand-ins that write down how they were called."""

    home: Path
    root: Path
    env: dict[str, str]

    def script(self, name: str) -> Path:
        """Return a copy of a script outside the checkout, which is how sbatch runs it."""
        copy = self.home / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / f"slurm/{name}.sh", copy)
        return copy

    def calls(self, program: str) -> list[list[str]]:
        """Return the words of every call of a stand-in."""
        files = sorted((self.home / "calls").glob(f"{program}.*"))
        return [file.read_bytes().decode().split("\0")[:-1] for file in files]

    def run(self, name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run(["bash", str(self.script(name)), *words], {**self.env, **env}, self.home)

    def start(self, name: str, **env: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["bash", str(self.script(name))], env={**self.env, **env}, cwd=self.home)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    home, root = tmp_path, tmp_path / AWKWARD
    (home / "calls").mkdir()
    shutil.copytree(ROOT / "slurm", root / "slurm")
    record = f'file="$(mktemp {shlex.quote(str(home))}/calls/$(basename "$0").$(date +%s%N).XXXX)"\n'
    record += 'printf \'%s\\0\' "$@" >"$file"\n'
    # The last word is "true" when the script asks whether the nodes still answer.
    stub(
        home / "bin/srun",
        record + '[[ "${!#}" != true ]] || exit "${STUB_NODES_LOST:-0}"\neval "${STUB_SRUN:-true}"',
    )
    stub(home / "bin/scontrol", record + SCONTROL)
    stub(root / ".venv/bin/python", "true")
    env = {
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "HOME": str(home),
        "SLURM_JOB_ID": "123457",
        "SLURM_JOB_NAME": "my run",
        "SLURM_JOB_NODELIST": "gpu[1-4]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(root),
        "MEGAWAN_DATA": f"/data/{AWKWARD}",
        "MEGAWAN_INIT": "/weights/Wan 14B",
        "MEGAWAN_PREFLIGHT": "0",
    }
    return Cluster(home, root, env)


SCONTROL = """
case "$1 $2" in
    "show hostnames") seq -f 'gpu%g' 1 "${STUB_NODES:-4}" ;;
    "requeue "*) ls "$HOME" | grep -c ^saved >"$HOME/at_requeue" || true ;;
    "--oneliner show") echo "NodeName=$4 Arch=x86_64 NodeAddr=$4.cluster NodeHostName=$4" ;;
esac
"""


def flag(words: list[str], name: str) -> str:
    """Return the value of the last `--name value` or `--name=value`."""
    values = [
        words[place + 1] if word == name else word.partition("=")[2]
        for place, word in enumerate(words)
        if word == name or word.startswith(f"{name}=")
    ]
    return values[-1]


def train_flags(words: list[str]) -> list[str]:
    place = next(index for index, word in enumerate(words) if word.endswith("megawan/train.py"))
    return words[place + 1 :]


@pytest.mark.parametrize("name", [*TRAIN_SCRIPTS, "encode_dataset"])
def test_what_sbatch_is_told(name: str) -> None:
    lines = (ROOT / f"slurm/{name}.sh").read_text("utf-8").splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    log = "%x_%A_%a.out" if name == "encode_dataset" else "%x_%j.out"
    assert {"--requeue", "--open-mode=append", f"--output={log}", "--ntasks-per-node=1"} <= set(asked)
    assert any(line.startswith("--signal=B:USR1@") for line in asked)
    assert any(line.startswith("--nodes=") for line in asked)
    assert any(line.startswith("--gpus-per-node=") for line in asked)
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [
        line for line in lines[first_command:] if line.startswith("#SBATCH")
    ]  # sbatch would not see it
    # What differs between clusters comes from the environment.
    assert not [line for line in asked if line.startswith(("--partition", "--account", "--qos", "--mail"))]


@pytest.mark.parametrize("name", TRAIN_SCRIPTS)
def test_dry_run_needs_no_cluster(name: str, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "MEGAWAN_DATA": "/d", "MEGAWAN_INIT": "/w", "MEGAWAN_PREFLIGHT": "0"}
    done = run(["bash", str(ROOT / f"slurm/{name}.sh"), "--dry-run", "--steps", "7"], env, tmp_path)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == (2 if name == "train_a14b" else 1)
    for words in commands:
        assert words[0] == "srun" and "--dry-run" not in words
        assert flag(words, "--nproc_per_node") == "8" and flag(words, "--steps") == "7"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        *((name, ("MEGAWAN_DATA", "MEGAWAN_INIT")) for name in TRAIN_SCRIPTS),
        ("encode_dataset", ("MEGAWAN_VIDEOS", "MEGAWAN_DATA")),
    ],
)
def test_dry_run_without_any_setting_says_what_is_to_be_set(
    name: str, variables: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(["bash", str(ROOT / f"slurm/{name}.sh"), "--dry-run"], {"PATH": os.environ["PATH"]}, tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    notes = done.stderr.splitlines()
    assert [note.split(": note: set ")[1].split()[0] for note in notes] == list(variables)
    for line in done.stdout.splitlines():
        assert line.startswith("srun ") and {f"/path/of/{variables[0]}"} <= set(shlex.split(line))


@pytest.mark.parametrize("name", TRAIN_SCRIPTS)
def test_dry_run_inside_a_job_starts_nothing(name: str, cluster: Cluster) -> None:
    done = cluster.run(name, MEGAWAN_DRY_RUN="1")
    assert done.returncode == 0 and done.stdout.startswith("srun ")
    assert not cluster.calls("srun") and not (cluster.root / "runs").exists()


def test_words_reach_train_py_as_they_were_written(cluster: Cluster) -> None:
    extra = "--note 'one $(touch oops) word' --empty \"\""
    done = cluster.run("train_14b", "--optim.learning_rate", "3e-6", AWKWARD, MEGAWAN_EXTRA_ARGS=extra)
    assert done.returncode == 0, done.stderr
    (words,) = cluster.calls("srun")
    assert shlex.split(done.stdout) == ["srun", *words]
    assert words[words.index("torch.distributed.run") - 2] == str(cluster.root / ".venv/bin/python")
    flags = train_flags(words)
    assert str(cluster.root / "megawan/train.py") in words
    assert flags[-7:] == [
        "--note",
        "one $(touch oops) word",
        "--empty",
        "",
        "--optim.learning_rate",
        "3e-6",
        AWKWARD,
    ]
    assert flag(flags, "--data.path") == f"/data/{AWKWARD}"
    assert flag(flags, "--model.init_from") == "/weights/Wan 14B"
    assert flag(flags, "--output") == str(cluster.root / "runs/my run")
    assert not list(cluster.home.rglob("oops"))


def test_one_task_a_node_meets_at_a_port_of_the_job(cluster: Cluster) -> None:
    cluster.run("train_14b")
    (words,) = cluster.calls("srun")
    assert flag(words, "--nodes") == flag(words, "--ntasks") == flag(words, "--nnodes") == "4"
    assert flag(words, "--ntasks-per-node") == "1" and flag(words, "--nodelist") == "gpu1,gpu2,gpu3,gpu4"
    assert flag(words, "--nproc_per_node") == "8"
    assert flag(words, "--rdzv_id") == "123457-0"
    assert flag(words, "--rdzv_endpoint") == f"gpu1.cluster:{20000 + 123457 % 6000 * 2}"


def test_synthetic_data_and_random_weights_are_asked_for_by_name(cluster: Cluster) -> None:
    cluster.run("train_1.3b", MEGAWAN_DATA="synthetic", MEGAWAN_INIT="random", MEGAWAN_RANKS_PER_NODE="2")
    (words,) = cluster.calls("srun")
    assert "--data.path" not in words and "--model.init_from" not in words
    assert flag(words, "--nproc_per_node") == "2"


@pytest.mark.parametrize(("name", "worlds"), [("train_14b", 1), ("train_a14b", 2)])
def test_every_world_is_looked_at_first_with_the_same_words(name: str, worlds: int, cluster: Cluster) -> None:
    dry = cluster.run(name, "--dry-run", "--steps", "7", MEGAWAN_PREFLIGHT="1")
    assert len(dry.stdout.splitlines()) == 2 * worlds and not cluster.calls("srun")
    done = cluster.run(name, "--steps", "7", MEGAWAN_PREFLIGHT="1")
    assert done.returncode == 0 and done.stdout == dry.stdout
    calls = cluster.calls("srun")
    looks = [words for words in calls if str(cluster.root / "tools/preflight.py") in words]
    trains = [words for words in calls if str(cluster.root / "megawan/train.py") in words]
    assert len(looks) == len(trains) == worlds
    for look, train in zip(
        *(sorted(many, key=lambda words: words[3]) for many in (looks, trains)), strict=True
    ):
        assert calls.index(look) < calls.index(train)
        tool = look.index(str(cluster.root / "tools/preflight.py"))
        assert [word for word in train_flags(train) if word != "--health_check"] == look[tool + 1 :]
        ours = [word for word in look[:tool] if not word.startswith("--rdzv_id")]
        assert ours == [word for word in train[:tool] if not word.startswith("--rdzv_id")]
        assert flag(look, "--rdzv_id") == flag(train, "--rdzv_id") + "-preflight"


def test_a_failed_preflight_fails_the_job_without_training(cluster: Cluster) -> None:
    fails = '[[ "$*" != *preflight.py* ]] || exit 7'
    assert cluster.run("train_14b", MEGAWAN_PREFLIGHT="1", STUB_SRUN=fails).returncode == 7
    assert not [words for words in cluster.calls("srun") if any(word.endswith("train.py") for word in words)]
    assert not requeues(cluster)


def test_a_warning_during_the_preflight_requeues_the_job(cluster: Cluster) -> None:
    slow = '[[ "$*" != *preflight.py* ]] || { touch "$HOME/ready"; sleep 3; }'
    job = cluster.start("train_14b", MEGAWAN_PREFLIGHT="1", STUB_SRUN=slow)
    wait_for((cluster.home / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert requeues(cluster) == [["requeue", "123457"]]


def test_a_requeued_job_is_not_looked_at_again_unless_asked(cluster: Cluster) -> None:
    for asked, looks in (("1", 0), ("always", 1)):
        cluster.run("train_14b", MEGAWAN_PREFLIGHT=asked, SLURM_RESTART_COUNT="1")
        calls = [word for words in cluster.calls("srun") for word in words]
        assert sum(word.endswith("preflight.py") for word in calls) == looks


def test_both_experts_share_the_allocation(cluster: Cluster) -> None:
    env = {"STUB_NODES": "5", "MEGAWAN_HIGH_NODES": "2", "MEGAWAN_TASK": "i2v"}
    done = cluster.run("train_a14b", **env)
    assert done.returncode == 0, done.stderr
    high, low = sorted(cluster.calls("srun"), key=lambda words: flag(words, "--nodelist"))
    assert flag(high, "--nodelist") == "gpu1,gpu2" and flag(low, "--nodelist") == "gpu3,gpu4,gpu5"
    assert (flag(high, "--nnodes"), flag(low, "--nnodes")) == ("2", "3")
    port = 20000 + 123457 % 6000 * 2
    assert flag(high, "--rdzv_endpoint") == f"gpu1.cluster:{port}"
    assert flag(low, "--rdzv_endpoint") == f"gpu3.cluster:{port + 1}"
    assert flag(high, "--rdzv_id") != flag(low, "--rdzv_id")
    for words, expert in ((high, "high"), (low, "low")):
        assert flag(words, "--model.variant") == flag(words, "--flow.expert") == f"i2v-A14B-{expert}"
        assert flag(words, "--model.init_from") == f"/weights/Wan 14B/{expert}_noise_model"
        assert flag(words, "--output") == str(cluster.root / "runs/my run" / expert)


def test_both_experts_of_a_tiny_model_try_the_script(cluster: Cluster) -> None:
    cluster.run("train_a14b", MEGAWAN_TASK="debug")
    variants = [flag(words, "--model.variant") for words in cluster.calls("srun")]
    assert sorted(variants) == ["debug-A14B-high", "debug-A14B-low"]
    assert not [words for words in cluster.calls("srun") if "--flow.expert" in words]


def test_the_allocation_is_halved_by_default(cluster: Cluster) -> None:
    cluster.run("train_a14b")
    assert sorted(flag(words, "--nodelist") for words in cluster.calls("srun")) == ["gpu1,gpu2", "gpu3,gpu4"]


def test_container(cluster: Cluster) -> None:
    data = cluster.home / "latents"
    data.mkdir()
    env = {
        "MEGAWAN_CONTAINER": "registry#wan:1",
        "MEGAWAN_MOUNTS": "/scratch:/scratch",
        "MEGAWAN_DATA": str(data),
    }
    cluster.run("train_14b", **env)
    (words,) = cluster.calls("srun")
    assert flag(words, "--container-image") == "registry#wan:1"
    output = cluster.root / "runs/my run"
    assert flag(words, "--container-mounts") == (
        f"{cluster.root}:{cluster.root},{output}:{output},{data}:{data},/scratch:/scratch"
    )
    assert words[words.index("torch.distributed.run") - 2] == "python3"


@pytest.mark.parametrize(("python", "first"), [("/opt/my env/python", "/opt/my env"), ("python3", None)])
def test_the_interpreters_folder_comes_first_on_path(
    python: str, first: str | None, cluster: Cluster
) -> None:
    stub(cluster.home / "python3", "true")
    cluster.run(
        "train_14b", MEGAWAN_PYTHON=python, MEGAWAN_CONTAINER="image", STUB_SRUN='echo "$PATH" >"$HOME/path"'
    )
    assert (cluster.home / "path").read_text().split(":")[0] == (first or f"{cluster.home}/bin")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"MEGAWAN_DATA": ""}, ("MEGAWAN_DATA", "synthetic")),
        ({"MEGAWAN_INIT": ""}, ("MEGAWAN_INIT", "random")),
        ({"MEGAWAN_EXTRA_ARGS": "--a 'b"}, ("MEGAWAN_EXTRA_ARGS", "quote")),
        ({"MEGAWAN_PYTHON": "/nowhere/python"}, ("/nowhere/python", "setup.sh")),
        ({"SLURM_SUBMIT_DIR": "/"}, ("not the MegaWan checkout", "MEGAWAN_ROOT")),
        ({"SLURM_JOB_NODELIST": ""}, ("sbatch", "--dry-run")),
        ({"MEGAWAN_TASK": "ti2v"}, ("MEGAWAN_TASK=ti2v", "t2v, i2v")),
        ({"MEGAWAN_HIGH_NODES": "4"}, ("4 of 4", "MEGAWAN_HIGH_NODES")),
        ({"MEGAWAN_HIGH_NODES": "0"}, ("0 of 4", "MEGAWAN_HIGH_NODES")),
        ({"MEGAWAN_HIGH_NODES": "all"}, ("all of 4", "MEGAWAN_HIGH_NODES")),
        ({"STUB_NODES": "1"}, ("of 1 nodes", "one or more")),
    ],
)
def test_a_wrong_setting_is_one_line(env: dict[str, str], words: tuple[str, ...], cluster: Cluster) -> None:
    check_user_error(cluster.run("train_a14b", **env), *words)
    assert not cluster.calls("srun")


@pytest.mark.parametrize("name", TRAIN_SCRIPTS)
def test_train_py_understands_the_flags(name: str, cluster: Cluster) -> None:
    done = cluster.run(name, "--dry-run")
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        options = config.parse(train_flags(words), prog="train.py", description="")
        variant = get_variant(options.model.variant)
        world_size = int(flag(words, "--nnodes")) * int(flag(words, "--nproc_per_node"))
        ulysses, ring = options.parallel.ulysses_degree, options.parallel.ring_degree
        assert variant.config.num_heads % ulysses == 0 and world_size % (ulysses * ring) == 0
        parse_recompute(options.model.recompute, variant.config.num_layers)
        assert (ROOT / options.deepspeed).is_file()
        assert options.data.path == (Path(f"/data/{AWKWARD}"),)
        if variant.expert is not None:
            assert options.flow.expert == variant.name


def test_a_failed_run_fails_the_job(cluster: Cluster) -> None:
    assert cluster.run("train_14b", STUB_SRUN="exit 3").returncode == 3
    assert not [words for words in cluster.calls("scontrol") if words[0] == "requeue"]


def test_a_failure_with_a_lost_node_requeues_the_job(cluster: Cluster) -> None:
    lost = cluster.run("train_14b", STUB_SRUN="exit 3", STUB_NODES_LOST="1")
    assert lost.returncode == 0 and "a node of job 123457 does not answer any more" in lost.stdout
    assert requeues(cluster) == [["requeue", "123457"]]


def test_one_failed_expert_fails_the_job_after_the_other_finished(cluster: Cluster) -> None:
    low = 'case "$*" in *A14B-low*) sleep 1.5; touch "$HOME/low_done";; *) exit 5;; esac'
    assert cluster.run("train_a14b", STUB_SRUN=low).returncode == 5
    assert (cluster.home / "low_done").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def requeues(cluster: Cluster) -> list[list[str]]:
    return [words for words in cluster.calls("scontrol") if words[0] == "requeue"]


SAVE_ON_USR1 = """
trap 'sleep 0.3; touch "$HOME/saved.$$"; exit 0' USR1
touch "$HOME/ready.$$"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("name", "worlds"), [("train_14b", 1), ("train_a14b", 2)])
def test_a_warning_saves_every_world_then_requeues(name: str, worlds: int, cluster: Cluster) -> None:
    job = cluster.start(name, STUB_SRUN=SAVE_ON_USR1)
    wait_for(lambda: len(list(cluster.home.glob("ready.*"))) == worlds)
    assert not requeues(cluster)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (cluster.home / "at_requeue").read_text() == f"{worlds}\n"
    assert requeues(cluster) == [["requeue", "123457"]]


def test_a_run_that_does_not_stop_is_requeued_all_the_same(cluster: Cluster) -> None:
    stuck = """trap 'touch "$HOME/heard"' USR1; echo $$ >"$HOME/pid"; for _ in {1..200}; do sleep 0.1; done"""
    job = cluster.start("train_14b", STUB_SRUN=stuck, MEGAWAN_GRACE="1")
    wait_for((cluster.home / "pid").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(10) == 0
    assert (cluster.home / "heard").exists()
    assert requeues(cluster) == [["requeue", "123457"]]
    os.kill(int((cluster.home / "pid").read_text()), signal.SIGKILL)


def test_torchrun_itself_ignores_the_warning(cluster: Cluster) -> None:
    # Slurm signals every process of a step, torchrun among them, which would die of USR1 and take the workers
    # along.
    stub(
        cluster.root / ".venv/bin/python",
        'grep SigIgn /proc/self/status >"$HOME/ignored"; echo "$@" >"$HOME/words"',
    )
    run_command = 'while [[ "$1" != bash ]]; do shift; done; "$@"'
    assert cluster.run("train_14b", STUB_SRUN=run_command).returncode == 0
    mask = int((cluster.home / "ignored").read_text().split()[1], 16)
    assert mask & 1 << (signal.SIGUSR1 - 1)
    assert (cluster.home / "words").read_text().startswith("-m torch.distributed.run --nnodes=4 ")


ENCODE = {"MEGAWAN_VIDEOS": f"/videos/{AWKWARD}", "SLURM_ARRAY_TASK_ID": "5"}


def test_an_array_task_encodes_its_share(cluster: Cluster) -> None:
    done = cluster.run("encode_dataset", "--num_frames", "81", **ENCODE)
    assert done.returncode == 0, done.stderr
    (words,) = cluster.calls("srun")
    place = words.index(str(cluster.root / "tools/encode_dataset.py"))
    assert words[place - 1] == str(cluster.root / ".venv/bin/python")
    assert words[place + 1 :] == [
        *("--input", f"/videos/{AWKWARD}", "--output", f"/data/{AWKWARD}"),
        *("--shard", "5/8", "--num_frames", "81"),
    ]


def test_resubmitted_array_tasks_keep_their_shares(cluster: Cluster) -> None:
    # sbatch --array=3,5 makes SLURM_ARRAY_TASK_COUNT 2; the shares stay eighths.
    cluster.run("encode_dataset", SLURM_ARRAY_TASK_COUNT="2", **ENCODE)
    cluster.run("encode_dataset", MEGAWAN_SHARDS="16", **ENCODE)
    assert [flag(words, "--shard") for words in cluster.calls("srun")] == ["5/8", "5/16"]
    wrong = cluster.run("encode_dataset", **{**ENCODE, "SLURM_ARRAY_TASK_ID": "8"})
    check_user_error(wrong, "task 8", "8 shares", "MEGAWAN_SHARDS")
    check_user_error(cluster.run("encode_dataset", **ENCODE, MEGAWAN_SHARDS="all"), "all", "MEGAWAN_SHARDS")
    check_user_error(cluster.run("encode_dataset"), "MEGAWAN_VIDEOS")


# -------------------------------------------------------------------------------------------------- launchers


def launcher_env(home: Path, has_gpu: bool = False) -> dict[str, str]:
    """Return an environment whose python3 writes its words to `words`, and says whether torch sees a GPU."""
    answer = "0" if has_gpu else "1"
    stub(home / "bin/python3", f'[[ "$1" != -c ]] || exit {answer}\nprintf \'%s\\0\' "$@" >"$HOME/words"')
    return {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home), "MEGAWAN_SYSTEM_PYTHON": "1"}


def checkout(home: Path) -> Path:
    root = home / AWKWARD
    shutil.copytree(ROOT / "launchers", root / "launchers")
    return root


@pytest.mark.parametrize(
    ("has_gpu", "env", "ranks"),
    [
        (False, {}, ["--num_gpus", "2"]),
        (True, {}, []),
        (True, {"NUM_GPUS": "4"}, ["--num_gpus", "4"]),
        (False, {"NUM_GPUS": "1"}, ["--num_gpus", "1"]),
    ],
)
def test_train_on_one_machine(has_gpu: bool, env: dict[str, str], ranks: list[str], tmp_path: Path) -> None:
    root = checkout(tmp_path)
    command = ["bash", str(root / "launchers/train.sh"), "--output", AWKWARD, "--steps", "3"]
    done = run(command, {**launcher_env(tmp_path, has_gpu), **env}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_bytes().decode().split("\0")[:-1] == [
        "-m",
        "deepspeed.launcher.runner",
        *ranks,
        str(root / "megawan/train.py"),
        "--output",
        AWKWARD,
        "--steps",
        "3",
    ]


@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh"])
def test_a_launcher_looks_first_when_asked(script: str, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launchers", root / "launchers")
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    env = {
        **launcher_env(tmp_path, has_gpu=True),
        "HOSTFILE": str(tmp_path / "hosts"),
        "MEGAWAN_PREFLIGHT": "1",
    }
    write = (
        'printf \'%s\\n\' "$*" >>"$HOME/lines"; [[ "$*" != *preflight.py* ]] || exit "${STUB_PREFLIGHT:-0}"'
    )
    stub(tmp_path / "bin/python3", f'[[ "$1" != -c ]] || exit 0\n{write}')
    command = ["bash", str(root / f"launchers/{script}"), "--steps", "3"]
    assert run(command, env, tmp_path).returncode == 0
    look, train = (tmp_path / "lines").read_text().splitlines()
    assert look.replace("tools/preflight.py", "megawan/train.py") == train != look
    (tmp_path / "lines").unlink()
    assert run(command, {**env, "STUB_PREFLIGHT": "1"}, tmp_path).returncode == 1
    assert len((tmp_path / "lines").read_text().splitlines()) == 1


def test_train_without_setup_says_so(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    check_user_error(run(["bash", str(root / "launchers/train.sh")], env, tmp_path), "setup.sh")


def test_train_over_a_hostfile(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launchers", root / "launchers")
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    command = ["bash", str(root / "launchers/train_multinode.sh"), "--steps", "3"]
    done = run(command, {**launcher_env(tmp_path), "HOSTFILE": str(hosts)}, tmp_path)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert words[:6] == [
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hosts),
        "--master_port",
        "29500",
    ]
    assert words[6:] == [str(root / "megawan/train.py"), "--steps", "3"]


@pytest.mark.parametrize(
    ("hostfile", "words"), [(None, ("HOSTFILE", "slots=8")), ("nowhere", ("nowhere", "not a file"))]
)
def test_a_missing_hostfile_is_one_line(hostfile: str | None, words: tuple[str, ...], tmp_path: Path) -> None:
    env = launcher_env(tmp_path) | ({"HOSTFILE": hostfile} if hostfile else {})
    done = run(["bash", str(ROOT / "launchers/train_multinode.sh")], env, tmp_path)
    check_user_error(done, *words)


def test_a_hostfile_run_refuses_a_path_that_ssh_would_split(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=8\n")
    env = {**launcher_env(tmp_path), "HOSTFILE": "hosts"}
    done = run(["bash", str(root / "launchers/train_multinode.sh")], env, tmp_path)
    check_user_error(done, "space")


# ------------------------------------------------------------------------------------------------------ setup

FAKE_PYTHON = """
case "$1" in
    -m) if [[ "$2" == venv ]]; then
            mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"
        else
            printf '%s\\n' "$*" >>"$HOME/$2"
        fi ;;
    -V) echo Python 3.11.9 ;;
    *) exit "${STUB_ANSWER:-0}" ;;
esac
"""


def setup_checkout(home: Path) -> tuple[Path, dict[str, str]]:
    root = checkout(home)
    for name in ("constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    stub(home / "bin/mypython", FAKE_PYTHON)
    for compiler in ("gcc", "g++"):
        stub(home / f"bin/{compiler}", "true")
    return root, {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home), "PYTHON": "mypython"}


def test_setup_installs_torch_first_and_only_once(tmp_path: Path) -> None:
    root, env = setup_checkout(tmp_path)
    command = ["bash", str(root / "launchers/setup.sh")]
    assert run(command, env, tmp_path).returncode == 0
    calls = (tmp_path / "pip").read_text().splitlines()
    constraints = f"-c {root}/constraints.txt"
    assert len(calls) == 2
    assert calls[0].endswith(f"torch {constraints}") and calls[1].endswith(f"{constraints} -e {root}[dev]")
    assert all("--no-compile" in call for call in calls)  # since on all cores
    assert (tmp_path / "compileall").read_text() == f"-m compileall -q -j 0 {root}/.venv/lib\n"

    again = run(command, env, Path("/"))
    assert again.returncode == 0 and "up to date" in again.stdout
    assert len((tmp_path / "pip").read_text().splitlines()) == 2

    with (root / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert run(command, env, tmp_path).returncode == 0
    assert len((tmp_path / "pip").read_text().splitlines()) == 4


def test_a_setup_that_was_interrupted_is_not_taken_for_done(tmp_path: Path) -> None:
    root, env = setup_checkout(tmp_path)
    stub(tmp_path / "bin/mypython", FAKE_PYTHON.replace("printf", "exit 1; printf"))
    command = ["bash", str(root / "launchers/setup.sh")]
    assert run(command, env, tmp_path).returncode != 0
    assert not (root / ".venv/megawan-setup").exists()


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_setup_without_a_compiler_is_one_line(compiler: str, tmp_path: Path) -> None:
    root, env = setup_checkout(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mypython", "gcc", "g++"):
        if name != compiler:
            (tools / name).symlink_to(shutil.which(name, path=env["PATH"]) or "")
    done = run(["/bin/bash", str(root / "launchers/setup.sh")], {**env, "PATH": str(tools)}, tmp_path)
    check_user_error(done, f"no {compiler} ", "apt-get install g++")


def test_setup_without_python_is_one_line(tmp_path: Path) -> None:
    root, env = setup_checkout(tmp_path)
    command = ["bash", str(root / "launchers/setup.sh")]
    check_user_error(run(command, {**env, "PYTHON": "python9.9"}, tmp_path), "no python9.9 ")
    old = run(command, {**env, "STUB_ANSWER": "1"}, tmp_path)
    check_user_error(old, "mypython is Python 3.11.9", "3.10 or newer")


def test_setup_in_a_container_keeps_its_torch(tmp_path: Path) -> None:
    root, env = setup_checkout(tmp_path)
    fake = 'if [[ "$1" == -c && "$2" == *torch* ]]; then echo 2.14.0a0+cu; exit; fi\n' + FAKE_PYTHON
    fake = 'grep -s ^torch== "$7" >>"$HOME/torch"\n' + fake  # -m pip install -qq --disable... -c FILE
    stub(tmp_path / "bin/mypython", fake)
    done = run(["bash", str(root / "launchers/setup.sh")], {**env, "MEGAWAN_SYSTEM_PYTHON": "1"}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "keeping torch 2.14.0a0+cu" in done.stdout and not (root / ".venv").exists()
    assert (tmp_path / "torch").read_text() == "torch==2.14.0a0+cu\n"
    assert len((tmp_path / "pip").read_text().splitlines()) == 1
