"""tools/plan.py: what it lists is legal and complete, its commands run, its numbers are those of train.py."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megawan import config, cost, planning
from megawan.dist import Environment
from megawan.hardware import GPUS
from megawan.models.variants import get_variant
from megawan.models.wan import WanModel
from megawan.parallel.topology import Topology, validate
from megawan.plan import Plan, make_plan
from megawan.planning import Question, Row, ask, rows
from megawan.planning_report import Paths, report
from megawan.sizes import describe_memory, latent_shape
from tests.commands import ROOT, Finished, command
from tests.models.activations import kept_bytes
from tests.models.peers import random_inputs

H100 = GPUS["h100"]
SD, HD = (81, 480, 832), (81, 720, 1280)


def planned(words: list[str], world: int) -> Plan:
    """Return what train.py would make of these words in a world of this size."""
    return make_plan(config.parse(words, prog="train.py", description=""), Environment(0, 0, world, world))


def agree(question: Question, row: Row, plan: Plan) -> None:
    """The dry run of a row says the row's numbers."""
    lines = plan.describe()
    (memory,) = [line for line in lines if line.startswith("memory: ")]
    assert memory.startswith(f"memory: {describe_memory(row.memory)}; recompute adds ")
    assert f"adds {row.recompute_flops / row.model_flops:.1%} FLOPs" in memory
    assert plan.topology == row.topology and plan.recompute == row.recompute
    assert plan.deepspeed.zero_stage == row.zero_stage
    assert plan.offload == row.offload_activations
    assert plan.global_batch == row.global_batch
    assert plan.checkpoint_bytes == pytest.approx(row.host.saving * question.world_size, rel=1e-6)
    assert f"cost: {row.model_flops / 1e12:,.3g} TFLOP a step" in "\n".join(lines)


def test_every_layout_that_train_takes_is_listed_and_no_other() -> None:
    for name, world in (("debug", 12), ("t2v-14B", 20), ("ti2v-5B", 24)):
        size = (9, 64, 64)
        found = {row.topology for row in rows(ask(name, *size, world, replace(H100, gpus_per_node=world)))}
        variant = get_variant(name)
        legal = set()
        for ulysses in range(1, world + 1):
            for ring in range(1, world + 1):
                try:
                    validate(world, ulysses, ring, variant.config.num_heads, name)
                except ValueError:
                    continue
                legal.add(Topology(world, ulysses, ring))
        assert found == legal


def test_each_layout_is_listed_with_every_stage_policy_and_offload() -> None:
    found = rows(ask("debug", 9, 64, 64, 2, H100))
    keys = {(row.topology, row.deepspeed, row.offload_activations, row.recompute) for row in found}
    assert len(keys) == len(found)
    for topology in (Topology(2), Topology(2, 2), Topology(2, 1, 2)):
        for name in planning.CONFIGS:
            for policy in cost.POLICIES:
                for away in (False, True) if policy != "none" else (False,):
                    assert (topology, f"ds_configs/{name}.json", away, policy) in keys


@pytest.mark.parametrize("name", ["debug", "debug-i2v"])
def test_every_row_is_a_run_with_these_very_numbers(name: str) -> None:
    question = ask(name, 9, 64, 64, 4, replace(H100, memory_gib=2), global_batch=4)
    found = rows(question)
    fitting = [row for row in found if row.fits]
    assert len(fitting) > 50
    for row in fitting[:: max(1, len(fitting) // 16)]:
        agree(question, row, planned(planning.flags(question, row), 4))


def test_a_row_that_does_not_fit_is_refused_by_the_run_too() -> None:
    question = ask("t2v-14B", *HD, 8, H100)
    too_large = [row for row in rows(question) if row.why_not.startswith("GPU: ")]
    for row in rows(question):
        if row.zero_stage:
            assert row.why_not.startswith("GPU: ") == (row.memory.total > 72 * 2**30)
    assert too_large
    for row in too_large[::60]:
        with pytest.raises(Exception, match="and the budget is 72 GiB"):
            planned(planning.flags(question, row), 8)


@pytest.mark.parametrize(
    ("name", "size", "gpus", "gpu"),
    [
        ("t2v-14B", SD, 8, "h100"),
        ("t2v-14B", HD, 8, "h100"),
        ("t2v-1.3B", SD, 4, "rtx4090"),
        ("i2v-14B-720P", HD, 16, "h200"),
        ("flf2v-14B", SD, 8, "mi300x"),
        ("ti2v-5B", (121, 704, 1280), 8, "a100-80"),
        ("t2v-A14B", SD, 16, "b200"),
        ("i2v-A14B", HD, 32, "gb200"),
        ("t2v-14B", SD, 1, "h100"),
    ],
)
def test_the_printed_commands_run_the_picked_row(
    name: str, size: tuple[int, int, int], gpus: int, gpu: str, tmp_path: Path
) -> None:
    question = ask(name, *size, gpus, GPUS[gpu])
    found = rows(question)
    row = planning.pick(found)
    assert row is not None
    lines = [line.strip() for line in report(question, found, Paths(), False)]
    experts = 2 if question.pair else 1
    dry = [shlex.split(line) for line in lines if line.startswith("WORLD_SIZE=")]
    launch = [shlex.split(line) for line in lines if "bash launchers/" in line]
    assert len(dry) == len(launch) == experts
    names = [f"{name}-high", f"{name}-low"] if question.pair else [name]
    for words, started, expert in zip(dry, launch, names, strict=True):
        assert words[:5] == [
            f"WORLD_SIZE={question.world_size}",
            "python",
            "-m",
            "megawan.train",
            "--dry-run",
        ]
        plan = planned(words[5:], question.world_size)
        assert plan.variant.name == expert
        agree(question, row, plan)
        place = next(index for index, word in enumerate(started) if word.startswith("launchers/"))
        assert started[place + 1 :] == words[5:] and (ROOT / started[place]).is_file()

    (batch,) = [shlex.split(line) for line in lines if " sbatch " in line]
    place = batch.index("sbatch")
    env = {"PATH": os.environ["PATH"], **dict(word.split("=", 1) for word in batch[:place])}
    options = dict(word.removeprefix("--").split("=") for word in batch[place + 1 : place + 3])
    nodes, ranks = int(options["nodes"]), int(options["gpus-per-node"])
    assert nodes * ranks == gpus
    env["MEGAWAN_RANKS_PER_NODE"] = str(ranks)
    ran = subprocess.run(
        ["bash", str(ROOT / batch[place + 3]), "--dry-run", *batch[place + 4 :]],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [shlex.split(line) for line in ran.stdout.splitlines()]
    worlds = [words for words in lines if any(word.endswith("megawan/train.py") for word in words)]
    looks = [words for words in lines if any(word.endswith("tools/preflight.py") for word in words)]
    assert len(worlds) == len(looks) == experts and len(lines) == 2 * experts
    for words, expert in zip(worlds, names, strict=True):
        place = next(index for index, word in enumerate(words) if word.endswith("megawan/train.py"))
        plan = planned([word for word in words[place + 1 :] if word != "--health_check"], question.world_size)
        assert plan.variant.name == expert
        agree(question, row, plan)


def test_the_printed_dry_run_is_answered_by_train_py(tmp_path: Path) -> None:
    question = ask("t2v-14B", *SD, 8, H100)
    found = rows(question)
    (line,) = [line for line in report(question, found, Paths(), False) if "WORLD_SIZE=" in line]
    variable, _, module, name, *words = shlex.split(line)
    done = command(
        module, name, *words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "WORLD_SIZE": variable[-1]}
    )
    assert done.code == 0, done.err
    row = planning.pick(found)
    assert row is not None and f"memory: {describe_memory(row.memory)}" in done.out


# ------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("debug", (9, 64, 64)),
        ("debug", (9, 128, 128)),
        ("debug", (17, 160, 96)),
        ("debug-i2v", (9, 128, 128)),
        ("debug-flf2v", (5, 64, 128)),
        ("debug-ti2v", (9, 256, 256)),
        ("debug-A14B-low", (5, 128, 128)),
    ],
)
def test_what_a_forward_pass_keeps_is_what_the_plan_says(name: str, size: tuple[int, int, int]) -> None:
    """All that autograd and the policies hold of a bfloat16 model, embeddings and head included."""
    variant = get_variant(name)
    latents = latent_shape(*size, variant.latent_channels, variant.vae_stride, variant.config.patch_size)
    inputs = random_inputs(variant.config, batch=1, latent=latents[1:], seed=1)
    found = rows(ask(name, *size, 1, H100))
    for policy in cost.POLICIES:
        model = WanModel(variant.config, recompute=policy).bfloat16()
        counted = kept_bytes(model, lambda model=model: inputs.ours(model))
        (row,) = [
            row
            for row in found
            if (row.zero_stage, row.recompute) == (3, policy)
            and not (row.offload_activations or row.offload_optimizer)
        ]
        assert row.memory.kept == pytest.approx(counted, rel=0.05), policy


@pytest.mark.parametrize(
    ("size", "policy", "ceiling"),
    # Seconds of the kernels alone on H100 at their published rates, as shares of the peak; where blocks are
    # recomputed less 33 ms (SD) and 76 ms (HD), their last products at 700 TFLOP/s, which are not repeated.
    [
        ((49, 480, 832), "none", 0.627),
        (SD, "none", 0.607),
        (SD, "attention", 0.550),
        (SD, "full", 0.483),
        (HD, "none", 0.576),
        (HD, "attention", 0.544),
        (HD, "full", 0.459),
    ],
)
def test_the_ceiling_of_14b(size: tuple[int, int, int], policy: str, ceiling: float) -> None:
    found = rows(ask("t2v-14B", *size, 8, H100))
    for row in (row for row in found if row.recompute == policy and row.topology.ulysses_degree == 8):
        assert row.mfu_ceiling == pytest.approx(ceiling, abs=0.006)


def test_time_and_bytes_follow_from_what_is_asked() -> None:
    found = rows(ask("t2v-14B", *SD, 16, H100, global_batch=8))
    for row in found:
        assert 0 < row.fast.total < row.slow.total
        assert row.mfu_ceiling < 0.64
    asked = {
        batch: {
            (row.topology, row.deepspeed, row.recompute, row.offload_activations): row
            for row in rows(ask("t2v-14B", *SD, 16, H100, global_batch=batch))
        }
        for batch in (16, 32)
    }
    for key, row in asked[16].items():
        twice = asked[32].get(key)
        if twice is None:
            continue
        assert twice.model_flops == 2 * row.model_flops
        assert twice.wire.ulysses_intra == pytest.approx(2 * row.wire.ulysses_intra, abs=2)
        assert twice.wire.zero_intra >= row.wire.zero_intra
        assert twice.fast.total <= 2 * row.fast.total + 1e-9  # one update for more videos


@pytest.mark.parametrize(
    ("world", "domain"), [(8, 8), (16, 8), (32, 4), (80, 8), (80, 5), (40, 16), (24, 6), (144, 72)]
)
def test_what_leaves_a_domain_is_what_the_groups_say(world: int, domain: int) -> None:
    gpu = replace(H100, domain=domain, gpus_per_node=world)
    question = replace(ask("t2v-14B", *SD, world, gpu), gpu=gpu)
    for topology in {row.topology for row in rows(question)}:
        traffic = planning._context_traffic(question, topology)
        away = [
            sum(rank // domain != other // domain for other in group) / max(1, len(group) - 1)
            for group in topology.ulysses_groups()
            for rank in group
        ]
        assert traffic.ulysses_inter == pytest.approx(max(away))
        crossing = any(
            len(group) > 1 and rank // domain != group[(place + 1) % len(group)] // domain
            for group in topology.ring_groups()
            for place, rank in enumerate(group)
        )
        assert traffic.ring_inter == crossing


def test_what_zero_sends_between_nodes_enters_each_once() -> None:
    (row,) = [
        row
        for row in rows(ask("t2v-14B", *SD, 16, H100))
        if (row.topology.cp_size, row.deepspeed, row.recompute) == (8, "ds_configs/zero3.json", "full")
        and not row.offload_activations
        and row.topology.ulysses_degree == 8
    ]
    weights = 2 * 14_288_491_584
    # Two nodes: half of the weights (and gradients) comes from the other, over eight cards; 3 passes.
    assert row.wire.zero_inter == pytest.approx(3 * weights / 2 / 8, rel=1e-6)
    assert row.wire.zero_intra + row.wire.zero_inter == pytest.approx(3 * weights * 15 / 16, rel=1e-6)


def test_offload_moves_memory_to_the_host_which_may_not_have_it() -> None:
    found = {
        (row.topology, row.deepspeed, row.recompute, row.offload_activations): row
        for row in rows(ask("t2v-14B", *HD, 8, H100))
    }
    plain = found[Topology(8), "ds_configs/zero3.json", "attention", False]
    away = found[Topology(8), "ds_configs/zero3.json", "attention", True]
    assert away.memory.kept < plain.memory.kept / 10 and away.fast.offload > 0
    ends = cost.end_bytes(ask("t2v-14B", *HD, 8, H100).shape, 75_600)
    assert away.host.activations == plain.memory.kept - ends
    optimizer = found[Topology(8), "ds_configs/zero3_offload.json", "attention", False]
    assert optimizer.memory.states * 8 == pytest.approx(plain.memory.states, rel=1e-6)
    assert optimizer.host.states == 18 * -(-14_288_491_584 // 8)
    tight = ask("t2v-14B", *HD, 8, H100, host_memory_gib=300)
    for row in rows(tight):
        assert row.why_not or planning.node_host_bytes(tight, row.host) <= 300 * 2**30
    assert any(row.why_not.startswith("host: a node needs ") for row in rows(tight))


# ------------------------------------------------------------------------------------------------ the command


def tool(*words: object, cwd: Path) -> Finished:
    return command(ROOT / "tools/plan.py", *words, cwd=cwd)


ASK = ("--variant", "t2v-14B", "--frames", 81, "--height", 480, "--width", 832)


def test_the_command_answers_for_a_thousand_gpus_without_torch(tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.argv[0] = sys.argv.pop(1)\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    words = (ROOT / "tools/plan.py", *ASK, "--gpus", 1024, "--gpu-memory", 80, "--global-batch", 256)
    done = command("-c", script, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "<- picked" in done.out and "sbatch --nodes=128 --gpus-per-node=8" in done.out
    assert not done.err


def test_json_says_what_the_table_says(tmp_path: Path) -> None:
    done = tool(*ASK, "--gpus", 8, "--gpu_memory", 80, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    found = rows(ask("t2v-14B", *SD, 8, H100))
    assert len(answer["rows"]) == len(found) and answer["tokens"] == 32_760
    picked = planning.pick(found)
    assert picked is not None
    assert answer["rows"][answer["picked"]]["gpu_bytes"]["total"] == picked.memory.total
    for values, row in zip(answer["rows"], found, strict=True):
        assert values["fits"] == row.fits and values["step_seconds"] == [row.fast.total, row.slow.total]
        parts = values["gpu_bytes"]
        backward = parts["kept"] + parts["working"] + parts["gathered"]
        assert parts["total"] == parts["states"] + parts["buckets"] + max(backward, parts["updating"])


def test_paths_and_all_rows_are_printed(tmp_path: Path) -> None:
    done = tool(*ASK, "--data", "/my data", "--init", "/w", "--all", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "--data.path '/my data' --model.init_from /w" in done.out
    assert "MEGAWAN_DATA='/my data' MEGAWAN_INIT=/w sbatch" in done.out
    legal = re.search(r"^(\d+) ways are legal", done.out, re.MULTILINE)
    assert legal is not None and f"; {legal[1]} shown" in done.out
    assert "ZeRO 0 trains in fp32 only" in done.out and "GPU: needs " in done.out
    pair = report(
        ask("t2v-A14B", *SD, 16, H100), rows(ask("t2v-A14B", *SD, 16, H100)), Paths(None, "/w/"), False
    )
    assert "--model.init_from /w/low_noise_model" in "\n".join(pair)


def test_where_nothing_fits_the_least_is_named() -> None:
    question = ask("t2v-14B", *HD, 2, GPUS["rtx4090"], host_memory_gib=64)
    lines = report(question, rows(question), Paths(), False)
    assert lines[-1].startswith("none fits: the least is ") and "and 21.6 may be planned for" in lines[-1]
    odd = ask("t2v-14B", *SD, 8, H100, global_batch=7)
    assert all(row.topology.dp_size == 1 for row in rows(odd) if row.fits)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*ASK, "--frames", 80), "80 frames: must be 4n+1; nearest: 77 or 81"),
        ((*ASK, "--height", 490), "height 490 must be a multiple of 16; nearest: 480 or 496"),
        ((*ASK, "--width", 8), "width 8 must be a multiple of 16; nearest: 16"),
        (
            (*ASK, "--variant", "ti2v-5B", "--height", 720),
            "height 720 must be a multiple of 32; nearest: 704 or 736",
        ),
        (
            (*ASK, "--variant", "flf2v-14B", "--frames", 1),
            "is given the first and the last frame; nearest: 5",
        ),
        ((*ASK, "--variant", "t2v-15B"), "unknown --variant 't2v-15B'; legal: t2v-1.3B, "),
        ((*ASK, "--variant", "vace-14B"), "VACE is read and written"),
        ((*ASK, "--gpus", 12), "--gpus 12: more than one node takes whole nodes of 8 GPUs"),
        ((*ASK, "--gpus", 0), "--gpus 0 must be above 0"),
        (
            (*ASK, "--variant", "t2v-A14B", "--gpus", 24),
            "nearest: 16 or 32; or plan one expert, --variant t2v-A14B-high",
        ),
        ((*ASK, "--gpu", "a100"), "unknown --gpu 'a100'; did you mean a100-40 or a100-80?"),
        ((*ASK, "--gpu-memory", "nan"), "--gpu_memory nan must be above 0"),
        (
            (*ASK, "--global-batch", 9, "--micro-batch", 2),
            "--global_batch 9 is no multiple of --micro_batch 2; nearest: 8",
        ),
        ((*ASK, "--hardware", "/none.json"), "--hardware /none.json: No such file"),
        ((*ASK, "--recompute", "full"), "--recompute is for --check"),
        ((*ASK, "--check"), "--check trains on a CUDA device and this machine shows none"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_mistake_is_one_line(
    words: tuple[object, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    from megawan.cli import UserError

    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools/plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    with pytest.raises(UserError) as caught:
        module.main([str(word) for word in words])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
