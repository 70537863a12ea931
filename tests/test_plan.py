"""A plan is a run's arithmetic, or one line that says what was given and what is legal."""

import json
import re
from pathlib import Path

import pytest
import torch

from megawan import config, cost, plan
from megawan.cli import UserError
from megawan.data.latents import LatentStore, StoreWriter
from megawan.dist import Environment
from megawan.models.initial import InitialWeights
from megawan.models.variants import VARIANTS, get_variant
from megawan.models.wan import WanModel
from megawan.models.writing import write_weights
from megawan.plan import Plan, make_plan


def planned(*argv: str, world: int = 1) -> Plan:
    """Return the plan of these flags on a world of this size."""
    return make_plan(config.parse(argv, prog="train.py", description=""), Environment(0, 0, world, world))


def refused(*argv: str, world: int = 1) -> str:
    """Return the line with which the flags are refused."""
    options = config.parse(argv, prog="train.py", description="")
    with pytest.raises(UserError) as caught:
        make_plan(options, Environment(0, 0, world, world))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store(
    path: Path,
    shapes: tuple[tuple[int, ...], ...] = ((16, 3, 8, 10),),
    codec: str = "dct",
    text_dim: int = 64,
) -> str:
    """Write a store with a sample of each latent shape and return its path."""
    settings = {"codec": codec, "latent_channels": shapes[0][0], "text_dim": text_dim}
    with StoreWriter(path, settings) as writer:
        for index, shape in enumerate(shapes):
            row = {"prompt": f"caption {index}", "source": "a.mp4", "source_sha256": f"{index:064d}"}
            writer.add(str(index), {"latents": torch.zeros(shape), "text": torch.zeros(2, text_dim)}, row)
        writer.finish([str(index) for index in range(len(shapes))], torch.zeros(1, text_dim))
    return str(path)


MISTAKES: list[tuple[tuple[str, ...], int, str]] = [
    (("--steps=0",), 1, "--steps 0 must be 1 or more"),
    (("--micro_batch=0",), 1, "--micro_batch 0 must be 1 or more"),
    (("--accumulation=-2",), 1, "--accumulation -2 must be 1 or more"),
    (("--epochs=0",), 1, "--epochs 0 must be 1 or more"),
    (("--dist_timeout=0",), 1, "--dist_timeout 0.0 must be above 0 seconds"),
    (("--dist_timeout=nan",), 1, "--dist_timeout nan must be above 0 seconds"),
    (("--model.variant=debugg",), 1, "unknown model variant 'debugg'; legal: t2v-1.3B, t2v-14B, "),
    (
        ("--parallel.ulysses_degree=4",),
        4,
        "ulysses_degree 4 does not divide the 6 heads of debug; legal ulysses_degree for 6 heads: 1, 2, 3, 6;"
        " on 4 ranks: 1, 2;",
    ),
    (("--parallel.ring_degree=3",), 4, "ulysses_degree 1 x ring_degree 3 = 3 does not divide the world of 4"),
    (("--parallel.ring_degree=0",), 4, "ring_degree 0 must be 1 or more"),
    (("--model.recompute=half",), 1, "half"),
    (("--model.attention=magic",), 1, "magic"),
    (("--model.init_from=/nowhere/at/all",), 1, "/nowhere/at/all: no such file or folder"),
    (("--data.path=/nowhere/at/all",), 1, "/nowhere/at/all: not a finished latent store"),
    (("--data.prompt_dropout=1.5",), 1, "--data.prompt_dropout 1.5 must lie between 0 and 1"),
    (("--data.prompt_dropout=nan",), 1, "--data.prompt_dropout nan must lie between 0 and 1"),
    (("--data.workers=-1",), 1, "--data.workers -1 must be 0 or more"),
    (("--data.num_frames=8",), 1, "8 frames: must be 4n+1"),
    (("--data.num_frames=0",), 1, "0 frames: must be 4n+1"),
    (("--data.height=0",), 1, "height 0 must be a multiple of 16"),
    (("--data.width=72",), 1, "width 72 must be a multiple of 16"),
    (("--model.variant=debug-ti2v", "--data.width=80"), 1, "width 80 must be a multiple of 32"),
    (
        ("--deepspeed=ds_configs/zero9.json",),
        1,
        "--deepspeed ds_configs/zero9.json: no such file; the project",
    ),
    (("--deepspeed=ds_configs/zero0.json", "--precision=bf16"), 1, "ZeRO stage 0 with bf16"),
    (("--optim.warmup_steps=21",), 1, "--optim.warmup_steps 21 must lie between 0 and --steps 20"),
    (("--optim.learning_rate=0",), 1, "--optim.learning_rate 0.0 must be above 0"),
    (("--checkpoint.keep_last=-1",), 1, "--checkpoint.keep_last -1 must be 0 or more"),
    (("--metrics.log_every=0",), 1, "--metrics.log_every 0 must be 1 or more"),
]


@pytest.mark.parametrize(("argv", "world", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_with_what_is_legal(argv: tuple[str, ...], world: int, words: str) -> None:
    assert words in refused(*argv, world=world)


def test_a_ds_config_that_contradicts_a_flag_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"gradient_accumulation_steps": 4}))
    assert f"{file}: gradient_accumulation_steps is 4 but --accumulation is 2" in refused(
        f"--deepspeed={file}", "--accumulation=2"
    )
    file.write_text("{")
    assert f"--deepspeed {file}: not JSON" in refused(f"--deepspeed={file}")


@pytest.mark.parametrize(("ulysses", "ring", "dp"), [(1, 1, 12), (2, 1, 6), (3, 2, 2), (6, 2, 1), (1, 12, 1)])
def test_the_global_batch_counts_data_parallel_groups_not_ranks(ulysses: int, ring: int, dp: int) -> None:
    found = planned(
        "--micro_batch=3",
        "--accumulation=2",
        f"--parallel.ulysses_degree={ulysses}",
        f"--parallel.ring_degree={ring}",
        world=12,
    )
    assert found.topology.dp_size == dp and found.global_batch == 3 * 2 * dp
    sizes = found.deepspeed.config
    # DeepSpeed is told of 12 data-parallel ranks and checks this product itself.
    assert sizes["train_batch_size"] == 3 * 2 * 12
    assert (sizes["train_micro_batch_size_per_gpu"], sizes["gradient_accumulation_steps"]) == (3, 2)


@pytest.mark.parametrize(
    ("argv", "steps"),
    [
        (("--steps=7",), 7),
        (("--epochs=1",), 32),
        (("--epochs=1", "--micro_batch=32"), 1),
        (("--epochs=1", "--micro_batch=33"), 1),
        (("--epochs=3", "--micro_batch=5"), 20),  # 96 samples, 19.2 batches of 5: the last of them counts
        (("--epochs=3", "--micro_batch=5", "--accumulation=4"), 5),
        (("--epochs=2", "--steps=1"), 64),
    ],
    ids=str,
)
def test_epochs_become_the_steps_that_pass_every_sample(argv: tuple[str, ...], steps: int) -> None:
    assert planned(*argv).steps == steps


def test_warm_up_is_checked_against_the_steps_of_the_epochs() -> None:
    assert planned("--epochs=1", "--optim.warmup_steps=32").steps == 32
    assert "--optim.warmup_steps 33" in refused("--epochs=1", "--optim.warmup_steps=33")


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_plans_the_same(world: int) -> None:
    options = config.parse(("--parallel.ulysses_degree=2",), prog="train.py", description="")
    lines = [make_plan(options, Environment(rank, rank, world, world)).describe() for rank in range(world)]
    assert all(line == lines[0] for line in lines)


# --- stores ---


def test_a_store_that_fits_is_taken(tmp_path: Path) -> None:
    path = store(tmp_path / "s")
    sizes = ("--data.num_frames=9", "--data.height=64", "--data.width=80")
    found = planned(f"--data.path={path}", *sizes)
    assert isinstance(found.data, LatentStore) and len(found.data) == 1
    assert "60 tokens a video" in "\n".join(found.describe())


@pytest.mark.parametrize(
    ("shape", "text_dim", "variant", "has", "takes"),
    [
        ((48, 3, 4, 4), 64, "debug", "48 channels and text of 64", "debug takes 16 and 64"),
        ((16, 3, 4, 4), 64, "debug-ti2v", "16 channels and text of 64", "debug-ti2v takes 48 and 64"),
        ((16, 3, 4, 4), 64, "t2v-1.3B", "16 channels and text of 64", "t2v-1.3B takes 16 and 4096"),
    ],
)
def test_a_store_of_other_channels_or_text_is_refused_with_the_difference(
    shape: tuple[int, ...], text_dim: int, variant: str, has: str, takes: str, tmp_path: Path
) -> None:
    path = store(tmp_path / "s", (shape,), text_dim=text_dim)
    message = refused(f"--data.path={path}", f"--model.variant={variant}")
    assert path in message and has in message and takes in message


def test_released_weights_are_not_tuned_on_another_codecs_latents(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    flags = (f"--model.init_from={weights}", "--model.variant=t2v-1.3B")
    demo = store(tmp_path / "demo", text_dim=4096)
    message = refused(f"--data.path={demo}", *flags)
    assert "latents of codec dct" in message and "encode with --codec wan2.1" in message
    planned(f"--data.path={demo}", "--model.variant=t2v-1.3B")  # from random weights any latents will do
    # Latents of its own codec are fine: what is refused then is the empty file of weights.
    own = store(tmp_path / "real", codec="wan2.1", text_dim=4096)
    assert "an empty file" in refused(f"--data.path={own}", *flags)


@pytest.mark.parametrize(
    ("flag", "held"),
    [
        ("num_frames=13", "9"),
        ("num_frames=10", "9"),
        ("num_frames=0", "9"),
        ("height=80", "64"),
        ("height=70", "64"),
        ("width=64", "80"),
        ("width=87", "80"),
    ],
)
def test_clips_of_another_size_than_asked_are_refused(flag: str, held: str, tmp_path: Path) -> None:
    path = store(tmp_path / "s")
    message = refused(f"--data.path={path}", f"--data.{flag}")
    assert message == f"--data.{flag.replace('=', ' ')}: the store {path} has clips of {held}"


def test_a_store_of_mixed_sizes_fits_no_single_one_but_trains(tmp_path: Path) -> None:
    path = store(tmp_path / "s", ((16, 3, 8, 10), (16, 1, 8, 10), (16, 3, 4, 4)))
    assert "12 to 60 tokens a video" in "\n".join(planned(f"--data.path={path}").describe())
    assert refused(f"--data.path={path}", "--data.num_frames=9").endswith("has clips of 1, 9")


def test_latents_that_the_patches_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "s", ((16, 3, 7, 8),))
    assert "7" in refused(f"--data.path={path}")


# --- what the plan says ---


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("debug")])
def test_the_lines_of_a_plan_hold_its_arithmetic(name: str) -> None:
    found = planned(
        f"--model.variant={name}",
        "--parallel.ulysses_degree=2",
        "--parallel.ring_degree=2",
        "--micro_batch=2",
        "--accumulation=3",
        "--steps=8",
        world=8,
    )
    model, data, layout, batch, flow, cost_line, memory = found.describe()
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in WanModel(get_variant(name).config).parameters())
    assert model == f"model: {name}, {parameters:,} parameters, 6 heads, from random weights of seed 0"
    extras = {
        "debug-i2v": ", condition [20, 3, 8, 8], clip [257, 1280]",
        "debug-i2v-A14B-high": ", condition [20, 3, 8, 8]",
        "debug-i2v-A14B-low": ", condition [20, 3, 8, 8]",
        "debug-flf2v": ", condition [20, 3, 8, 8], clip [514, 1280]",
        "debug-control": ", condition [32, 3, 8, 8], clip [257, 1280]",
    }.get(name, "")
    channels, side, tokens = (48, 4, 12) if name == "debug-ti2v" else (16, 8, 48)
    assert data == (
        f"data: 32 synthetic samples of latent shape [{channels}, 3, {side}, {side}]{extras};"
        f" {tokens} tokens a video"
    )
    assert re.match(
        r"layout: 8 ranks = dp 2 x ring 2 x ulysses 2; ZeRO stage 3, (fp32|bf16), recompute none", layout
    )
    assert batch == (
        "batch: 12 videos a step = micro_batch 2 x accumulation 3 x dp 2; 8 steps = 3.0 passes over"
        " 32 samples"
    )
    assert flow.startswith("flow: shift 5, 1000 timesteps, sampling uniform_index")
    flops = 12 * 3 * cost.forward_flops(plan.model_shape(get_variant(name).config), tokens)
    assert cost_line.startswith(f"cost: {flops / 1e12:,.3g} TFLOP a step")
    # Masters, moments, weights and gradients over 8 ranks: 16 (bf16) to 20 (fp32) bytes a parameter.
    gib = float(re.search(r"([\d.e-]+) GiB a rank", cost_line)[1])
    assert 15 < gib * 2**30 * 8 / parameters < 21
    assert memory.startswith("memory: ") and memory.endswith("recompute adds 0.0% FLOPs")
    assert found.clean_frames == (1 if name == "debug-ti2v" else 0)


def test_given_weights_are_named(tmp_path: Path) -> None:
    wan = get_variant("debug").config
    write_weights(InitialWeights(wan, 0), wan, tmp_path / "w", "native", None, {})
    found = planned(f"--model.init_from={tmp_path / 'w'}")
    assert found.describe()[0].endswith(f"heads, from weights of {tmp_path / 'w'}")


def test_the_run_folder_is_the_given_one_or_a_new_one_by_name() -> None:
    given = config.parse(("--output=x/y",), prog="train.py", description="")
    assert plan.run_folder(given) == Path("x/y")
    named = plan.run_folder(config.parse((), prog="train.py", description=""))
    assert re.fullmatch(r"runs/debug-\d{8}-\d{6}", str(named))
