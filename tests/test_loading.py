"""Weights reach a sharded model part by part: no rank holds the whole, no bit is lost on the way, and wrong
ones are refused before there is a model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megawan import cli, train
from megawan.models.initial import InitialWeights
from megawan.models.keys import expected_shapes
from megawan.models.variants import WanConfig, get_variant
from megawan.models.writing import write_weights
from tests.commands import ROOT, command
from tests.distributed import run_distributed
from tests.loading_workers import CONFIGS, SEED

SHARD = 16_000_000
DTYPES = ("bfloat16", "float32")


def state(config: WanConfig, prefix: str = "") -> dict[str, Tensor]:
    weights = InitialWeights(config, SEED)
    return {prefix + key: weights.load(key) for key in weights.keys()}


def written(layout: str, shard: int = 10**9, inside: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config = CONFIGS["small"]
        weights = InitialWeights(config, SEED)
        write_weights(weights, config, folder / "w", layout, None, {}, max_shard_bytes=shard)
        return folder / "w" / inside

    return make


def prefixed(prefix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file(state(CONFIGS["small"], prefix), folder / "epoch-0.safetensors")
        return folder / "epoch-0.safetensors"

    return make


def pickled(folder: Path) -> Path:
    torch.save(state(CONFIGS["small"]), folder / "model.pth")
    return folder / "model.pth"


# What people have: (the layout that must be found, how it is made below a folder).
FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "native file": ("native", written("native", inside="diffusion_pytorch_model.safetensors")),
    "native shards": ("native", written("native", shard=100_000)),
    "diffusers folder": ("diffusers", written("diffusers", shard=100_000)),
    "comfyui file": ("comfyui", written("comfyui", inside="wan-model.safetensors")),
    "DiffSynth file": ("pipe.dit.", prefixed("pipe.dit.")),
    "pth": ("native", pickled),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks says of every case."""
    root = tmp_path_factory.mktemp("weights")
    cases: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        for name, config in CONFIGS.items():
            weights = InitialWeights(config, SEED)
            folder, kind = root / f"{name} {dtype}", getattr(torch, dtype)
            write_weights(weights, config, folder, "native", kind, {}, max_shard_bytes=SHARD)
        small = {"config": "small", "weights": str(root / f"small {dtype}"), "compare": True}
        cases |= {f"{dtype} at stage {stage}": {**small, "stage": stage} for stage in (1, 2, 3)}
    for name, (_, make) in FORMS.items():
        (root / name).mkdir()
        cases[name] = {"config": "small", "weights": str(make(root / name)), "compare": True, "stage": 3}
    for dtype in DTYPES:
        cases[dtype] = {"config": "middle", "weights": str(root / f"middle {dtype}"), "stage": 3}
    cases["whole"] = {**cases["float32"], "whole": True}
    with pytest.MonkeyPatch.context() as patch:
        # Freed tensors go back to the system at once, as they do in a 14B, whose matrices are above the 32 MB
        # up to which glibc may keep freed memory.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
        ranks = run_distributed(
            "tests.loading_workers:load", 2, arguments={"cases": list(cases.values())}, timeout=240
        )
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(cases)}


def allowed(found: dict[str, Any]) -> float:
    """Return the bytes that a rank may need at most while it builds and loads."""
    return 1.5 * float(found["share"]) + SHARD


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rank_needs_more_than_its_share_and_a_shard(dtype: str, loaded: dict[str, Any]) -> None:
    for rank, found in enumerate(loaded[dtype]):
        share = found["share"]
        print(
            f"{dtype} on disk, rank {rank}: share {share / 1e6:.0f} MB, resident peak while building"
            f" {found['building'] / 1e6:.0f} MB = {found['building'] / share:.2f} x share, while loading"
            f" {found['loading'] / 1e6:.0f} MB = {found['loading'] / share:.2f} x share; stays"
            f" {found['after'] / 1e6:.0f} MB"
        )
        parameters = sum(math.prod(shape) for shape in expected_shapes(CONFIGS["middle"]).values())
        assert share == pytest.approx(8 * parameters / 2, rel=0.01)
        assert found["unsharded"] == 0
        assert max(found["building"], found["loading"]) < allowed(found)
        # The reading itself needs little: a part of one tensor, and the pages that it comes from.
        assert found["loading"] < 1.1 * share + SHARD


def test_a_rank_that_reads_the_whole_state_dict_shows(loaded: dict[str, Any]) -> None:
    for rank, found in enumerate(loaded["whole"]):
        print(f"whole state dict first, rank {rank}: resident peak {found['loading'] / 1e6:.0f} MB")
        assert found["loading"] > allowed(found)


def require_exact(ranks: list[dict[str, Any]]) -> None:
    assert [found["wrong"] for found in ranks] == [[], []]
    whole = sum(math.prod(shape) for shape in expected_shapes(CONFIGS["small"]).values())
    assert sum(found["elements"] for found in ranks) == whole


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_what_the_disk_holds_and_weights_its_rounding(
    dtype: str, stage: int, loaded: dict[str, Any]
) -> None:
    require_exact(loaded[f"{dtype} at stage {stage}"])


@pytest.mark.parametrize("name", FORMS)
def test_every_form_lands_in_the_shards_bit_by_bit(name: str, loaded: dict[str, Any]) -> None:
    require_exact(loaded[name])
    assert [found["layout"] for found in loaded[name]] == [FORMS[name][0]] * 2


# --- a run that starts from given weights ---


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the debug variant, right and wrong ones, as a user may hand them over."""
    root = tmp_path_factory.mktemp("given")
    held = state(get_variant("debug").config)
    save_file(held, root / "good.safetensors")
    content = (root / "good.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(content[: len(content) // 2])
    save_file({**held, "head.head.bias": held["head.head.bias"][:-1]}, root / "misshapen.safetensors")
    save_file({**held, "blocks.0.extra": torch.zeros(3)}, root / "extra.safetensors")
    save_file({key: held[key] for key in held if key != "head.head.bias"}, root / "lacking.safetensors")
    torch.save([held], root / "list.pth")
    torch.save(held, root / "renamed.safetensors")
    for name in ("debug-i2v", "debug-control"):
        config = get_variant(name).config
        write_weights(
            InitialWeights(config, SEED), config, root / name, "native", None, {}, max_shard_bytes=10**7
        )
    (root / "debug-control/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    return root


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("cut.safetensors", (), "cut.safetensors: damaged safetensors file"),
        ("misshapen.safetensors", (), "head.head.bias expected (64,), found (63,) in misshapen.safetensors"),
        ("extra.safetensors", (), "unexpected keys: blocks.0.extra"),
        ("lacking.safetensors", (), "missing keys: head.head.bias"),
        ("list.pth", (), "expected a dictionary of tensors, found list"),
        ("renamed.safetensors", (), "it is a PyTorch pickle"),
        ("debug-control", (), "shard diffusion_pytorch_model-00002-of-00002.safetensors with"),
        ("debug-i2v", (), "not the model asked for but debug-i2v"),
        ("debug-i2v", ("--model.initialise_missing",), "unexpected keys"),
        ("debug-i2v", ("--variant", "debug-control"), "with --model.initialise_missing the model can start"),
        ("nowhere", (), "no such file or folder"),
    ],
)
def test_wrong_weights_are_refused_before_there_is_a_model(
    name: str, words: tuple[str, ...], said: str, given: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(cli.UserError) as caught:
        train.main(["--model.init_from", str(given / name), "--output", str(output), *words])
    assert said in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized() and not output.exists()


def test_wrong_weights_are_one_line_and_code_2(given: Path, tmp_path: Path) -> None:
    words = ("--model.init_from", given / "cut.safetensors")
    done = command(ROOT / "megawan/train.py", *words, cwd=tmp_path)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done.err[-2000:]
    assert done.err.startswith("megawan/train.py: error: ") and "cut.safetensors: damaged" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stderr", ".stdout"]


def test_the_start_says_what_the_weights_are(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--dry_run", "--model.init_from", str(given / "good.safetensors")])
    assert "weights: " in (said := capsys.readouterr().out)
    assert "good.safetensors: debug, native layout, 1 file, float32, 2,216,944 parameters" in said
    part = ["--variant", "debug-control", "--model.init_from", str(given / "debug-i2v")]
    train.main(["--dry_run", *part, "--model.initialise_missing"])
    said = capsys.readouterr().out
    assert "patch_embedding.weight: the first 16 input channels kept, the others start at 0" in said
