"""Writing weights: round trips, peers that open them, and what is left when it fails."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megawan.models.initial import InitialWeights
from megawan.models.keys import expected_shapes, to_diffusers
from megawan.models.layouts import open_experts, open_weights, provenance, write_weights, written_bytes
from megawan.models.variants import WanConfig, get_variant
from megawan.models.wan import WanModel
from tests.models.peers import PeerModel, PeerVaceModel, random_inputs, random_model

ROOT = Path(__file__).resolve().parents[2]
replace = dataclasses.replace
SMALL = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32)
PEERS = {
    "t2v": SMALL,
    "i2v": replace(SMALL, model_type="i2v", in_dim=36, image_dim=64),
    "flf2v": replace(SMALL, model_type="flf2v", in_dim=36, image_dim=64, pos_embed_seq_len=514),
    "ti2v": replace(SMALL, model_type="ti2v", in_dim=48, out_dim=48),
    "vace": replace(SMALL, model_type="vace", num_layers=4, vace_layers=(0, 2), vace_in_dim=20),
}


class ModelWeights:
    """The tensors of a model as a source."""

    def __init__(self, model: WanModel) -> None:
        self.state = model.state_dict()

    def keys(self) -> list[str]:
        return list(self.state)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.state[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.state[key].dtype

    def load(self, key: str) -> Tensor:
        return self.state[key]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("shard_bytes", [10**9, 150_000])
def test_diffusers_opens_our_export_and_gives_our_output(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    config = PEERS[kind]
    model = random_model(config, seed=1)
    files = write_weights(
        ModelWeights(model),
        config,
        tmp_path / "out",
        "diffusers",
        torch.float32,
        {},
        max_shard_bytes=shard_bytes,
    )
    assert (len(files) > 1) == (shard_bytes < 10**9)
    peer = PeerVaceModel if config.vace_layers else PeerModel
    twin = peer.from_pretrained(tmp_path / "out", subfolder="transformer")
    inputs = random_inputs(config, batch=1, latent=(2, 4, 6), seed=2, clean_frames=int(kind == "ti2v"))
    with torch.no_grad():
        assert (inputs.ours(model) - inputs.theirs(twin)).abs().max() <= 5e-5
    # And what diffusers saves, we open: the way back.
    twin.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    opened = open_weights(tmp_path / "theirs", config)
    assert all(torch.equal(opened.load(key), value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_to_another_layout_and_back_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    config = PEERS["flf2v"]
    model = random_model(config, seed=1).to(dtype)
    with torch.no_grad():  # bit patterns that a conversion through another dtype would not survive
        model.head.head.bias[:4] = torch.tensor([-0.0, float("inf"), 1e-40, float("nan")]).to(dtype)
    write_weights(ModelWeights(model), config, tmp_path / "0", "native", None, {}, max_shard_bytes=200_000)
    for step, layout in enumerate(("diffusers", "comfyui", "native")):
        opened = open_weights(tmp_path / str(step))
        write_weights(
            opened, opened.config, tmp_path / str(step + 1), layout, None, {}, max_shard_bytes=200_000
        )
    first, last = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "3")
    assert list(first) == list(last)
    for key, value in first.items():
        assert value.dtype == last[key].dtype == dtype
        assert torch.equal(value.contiguous().view(torch.uint8), last[key].contiguous().view(torch.uint8)), (
            key
        )
    for file in sorted((tmp_path / "0").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "3" / file.name).read_bytes()


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    source = InitialWeights(SMALL, 3)
    write_weights(source, SMALL, tmp_path / "n", "native", torch.bfloat16, {})
    for key, value in tensors_of(tmp_path / "n").items():
        assert torch.equal(value, source.load(key).bfloat16()), key
    assert written_bytes(source, torch.bfloat16) == 2 * sum(
        value.numel() for value in tensors_of(tmp_path / "n").values()
    )


@pytest.mark.parametrize(("layout", "spell"), [("native", str), ("diffusers", to_diffusers)])
def test_an_index_lists_every_tensor_once(layout: str, spell: object, tmp_path: Path) -> None:
    source, seen = InitialWeights(SMALL, 3), []
    files = write_weights(
        source, SMALL, tmp_path / "n", layout, torch.float32, {}, max_shard_bytes=100_000, tick=seen.append
    )
    index = json.loads((files[0].parent / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {spell(key) for key in expected_shapes(SMALL)}  # type: ignore[operator]
    assert index["metadata"]["total_size"] == sum(seen) == written_bytes(source, torch.float32)
    largest = max(tensor.nbytes for tensor in tensors_of(tmp_path / "n").values())
    for file in files:
        held = load_file(file)
        assert {key for key, name in index["weight_map"].items() if name == file.name} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= max(100_000, largest)


def test_a_native_export_is_what_diffsynth_recognises(tmp_path: Path) -> None:
    # The same fingerprint rule as its loader's, on the written file instead of on the list of shapes.
    write_weights(InitialWeights(SMALL, 0), SMALL, tmp_path / "n", "native", torch.bfloat16, {})

    def fingerprint(shapes: dict[str, tuple[int, ...]]) -> str:
        words = [
            word for key, shape in shapes.items() for word in (f"{key}:{'_'.join(map(str, shape))}", key)
        ]
        return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()

    written = {key: tuple(value.shape) for key, value in tensors_of(tmp_path / "n").items()}
    assert fingerprint(written) == fingerprint(expected_shapes(SMALL))


def test_metadata_goes_into_every_file_and_the_model_card(tmp_path: Path) -> None:
    about = {
        "variant": "debug",
        "base": "Wan-AI/Wan2.1-T2V-1.3B",
        "step": "1200",
        "data": "sha256:ab|cd",
        "command": "train.py --steps 3\n--x",
        "commit": "0123abc",
    }
    config = get_variant("debug").config
    files = write_weights(
        InitialWeights(config, 0), config, tmp_path / "n", "comfyui", None, about, max_shard_bytes=10
    )
    assert [file.name for file in files] == ["wan-debug.safetensors"]  # ComfyUI opens single files only
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **about}
        assert all(key.startswith("model.diffusion_model.") for key in opened.keys())
    card = (tmp_path / "n" / "README.md").read_text()
    assert card.startswith('---\npipeline_tag: text-to-video\nbase_model: "Wan-AI/Wan2.1-T2V-1.3B"\n---\n')
    for word in ("| step | `1200` |", "sha256:ab\\|cd", "--steps 3 --x", "0123abc", "wan-debug.safetensors"):
        assert word in card
    opened_again = open_weights(tmp_path / "n")
    assert opened_again.variants == ("debug",)
    assert provenance([opened_again], "again") == about | {"converted_by": "again"}


@pytest.mark.parametrize("layout", ["native", "diffusers", "comfyui"])
def test_both_experts_are_written_together(layout: str, tmp_path: Path) -> None:
    high, low = InitialWeights(SMALL, 0), InitialWeights(SMALL, 1)
    files = write_weights(high, SMALL, tmp_path / "pair", layout, torch.bfloat16, {}, low_noise=low)
    names = {
        "native": ["high_noise_model/diffusion_pytorch_model", "low_noise_model/diffusion_pytorch_model"],
        "diffusers": ["transformer/diffusion_pytorch_model", "transformer_2/diffusion_pytorch_model"],
        "comfyui": ["wan-model-high", "wan-model-low"],
    }[layout]
    assert [str(file.relative_to(tmp_path / "pair")) for file in files] == [
        f"{name}.safetensors" for name in names
    ]
    if layout != "comfyui":
        for opened, source in zip(open_experts(tmp_path / "pair").values(), (high, low), strict=True):
            key = "blocks.0.ffn.0.weight"
            assert torch.equal(opened.load(key), source.load(key).bfloat16())


class Shapes:
    """Sources of a published architecture, for what is decided before a tensor is read."""

    def __init__(self, config: WanConfig) -> None:
        self.shapes = expected_shapes(config)

    def keys(self) -> list[str]:
        return list(self.shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return torch.bfloat16

    def load(self, key: str) -> Tensor:
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("config", "layout", "variant", "expected"),
    [
        (
            SMALL,
            "diffusers",
            "t2v-A14B-low",
            {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]},
        ),
        (
            SMALL,
            "diffusers",
            "i2v-A14B-high",
            {"boundary_ratio": 0.9, "transformer": ["diffusers", "WanTransformer3DModel"]},
        ),
        (PEERS["ti2v"], "diffusers", "", {"boundary_ratio": None, "expand_timesteps": True}),
        (
            PEERS["i2v"],
            "diffusers",
            "",
            {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": False},
        ),
        (PEERS["vace"], "diffusers", "", {"transformer": ["diffusers", "WanVACETransformer3DModel"]}),
    ],
)
def test_the_model_index_knows_experts_and_tasks(
    config: WanConfig, layout: str, variant: str, expected: dict, tmp_path: Path
) -> None:
    write_weights(InitialWeights(config, 0), config, tmp_path / "x", layout, None, {"variant": variant})
    index = json.loads((tmp_path / "x" / "model_index.json").read_text())
    assert expected.items() <= index.items()


# --- when it fails ---


def test_every_file_is_on_the_disk_before_the_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync, replace_name = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        replace_name(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_weights(
        InitialWeights(SMALL, 0), SMALL, tmp_path / "x", "native", None, {}, max_shard_bytes=100_000
    )
    order = {event: place for place, event in enumerate(events)}
    for file in (tmp_path / "x").iterdir():
        name = file.name + (".partial" if file.suffix == ".safetensors" else ".tmp")
        assert order["sync", name] < order["rename", "x"]
    assert events[-1] == ("sync", tmp_path.name)


def failing(key: str) -> InitialWeights:
    source = InitialWeights(SMALL, 0)
    load = source.load

    def broken(name: str) -> Tensor:
        if name == key:
            raise ValueError(f"x.safetensors: {key} cannot be read")
        return load(name)

    source.load = broken  # type: ignore[method-assign]
    return source


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head.head.bias cannot be read"):
        write_weights(
            failing("head.head.bias"), SMALL, tmp_path / "x", "native", None, {}, max_shard_bytes=100_000
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "gguf"}, "layout 'gguf' is unknown; legal: native, diffusers, comfyui"),
        ({"dtype": torch.float16}, "dtype torch.float16 is not written"),
        ({"max_shard_bytes": 0}, "max_shard_bytes 0 must be at least 1"),
        (
            {"config": replace(SMALL, num_layers=3)},
            "blocks.2.[a-z0-9_.]+ is missing from the weights to write",
        ),
        (
            {"config": replace(SMALL, num_layers=1)},
            "blocks.1.[a-z0-9_.]+ is unexpected in the weights to write",
        ),
        (
            {"config": replace(SMALL, ffn_dim=95)},
            r"blocks.0.ffn.0.weight to write: expected shape \(95, 48\), found \(96",
        ),
        (
            {"source": Shapes(get_variant("t2v-14B").config), "config": get_variant("t2v-14B").config},
            "GB are free|gone",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    change: dict, message: str, tmp_path: Path
) -> None:
    call = {
        "source": InitialWeights(SMALL, 0),
        "config": SMALL,
        "layout": "native",
        "dtype": None,
        "metadata": {},
    }
    with pytest.raises((ValueError, OSError), match=message):
        write_weights(out_dir=tmp_path / "x", **(call | change))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_weights(InitialWeights(SMALL, 0), SMALL, tmp_path / "empty", "native", None, {})
    before = tensors_of(tmp_path / "empty")
    for out in (tmp_path / "empty", tmp_path / "empty" / "README.md"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            write_weights(InitialWeights(SMALL, 1), SMALL, out, "native", None, {})
    after = tensors_of(tmp_path / "empty")
    assert all(torch.equal(before[key], after[key]) for key in before)


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        env=environment,
    )


DYING = """
    import os, signal, sys
    from pathlib import Path
    from megawan.models.initial import InitialWeights
    from megawan.models.layouts import write_weights
    from megawan.models.variants import WanConfig
    config = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32)
    class Dying(InitialWeights):
        def load(self, key):
            if key == "blocks.1.ffn.2.weight":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().load(key)
    write_weights(Dying(config, 0), config, Path(sys.argv[1]), "native", None, {}, max_shard_bytes=100_000)
"""
LIMITED = """
    import resource, sys
    from pathlib import Path
    from megawan.models.initial import InitialWeights
    from megawan.models.layouts import write_weights
    from megawan.models.variants import WanConfig
    config = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        write_weights(InitialWeights(config, 0), config, Path(sys.argv[1]), "native", None, {})
    except OSError as error:
        print("refused:", error.strerror)
"""


def test_a_kill_leaves_no_weights(tmp_path: Path) -> None:
    done = python(DYING, tmp_path / "x")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    write_weights(
        InitialWeights(SMALL, 0), SMALL, tmp_path / "x", "native", None, {}
    )  # and the next try works
    assert open_weights(tmp_path / "x", SMALL)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    done = python(LIMITED, tmp_path / "x")
    assert done.returncode == 0 and "refused: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the command ---

# VmHWM is this process's own; ru_maxrss of a child starts at what its parent had.
PEAK = """
    import re, runpy, sys
    from pathlib import Path
    sys.argv = ["tools/convert_checkpoint.py", "--input", sys.argv[1], "--output", sys.argv[2], *sys.argv[3:]]
    import torch, tqdm, tyro  # what the command imports does not count
    from megawan.models import layouts
    def memory(field):
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    try:
        runpy.run_path("tools/convert_checkpoint.py", run_name="__main__")
    except SystemExit as end:
        print("peak", memory("VmHWM") - before, "code", end.code)
"""


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_a_conversion_holds_less_than_two_shards(layout: str, tmp_path: Path) -> None:
    config = WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=6, text_dim=512)
    shard = 48 * 10**6
    write_weights(
        InitialWeights(config, 0), config, tmp_path / "n", "native", torch.float32, {}, max_shard_bytes=shard
    )
    total = sum(file.stat().st_size for file in (tmp_path / "n").glob("*.safetensors"))
    assert total > 4 * shard
    options = ("--layout", layout, "--max_shard_gb", shard / 1e9, "--dtype", "bfloat16")
    done = python(PEAK, tmp_path / "n", tmp_path / "out", *options)
    words = done.stdout.split()
    assert words[-2:] == ["code", "0"], done.stderr
    peak = int(words[-3])
    print(
        f"{layout}: peak {peak / 1e6:.0f} MB beside {total / 1e6:.0f} MB of weights in shards of"
        f" {shard / 1e6:.0f} MB"
    )
    assert peak < 2 * shard


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd="/",
    )


def test_the_command_converts_from_anywhere(tmp_path: Path) -> None:
    config = get_variant("debug").config
    write_weights(InitialWeights(config, 0), config, tmp_path / "in put", "native", None, {"step": "7"})
    done = convert(
        "--input",
        tmp_path / "in put",
        "--output",
        tmp_path / "o",
        "--layout",
        "diffusers",
        "--dtype",
        "bfloat16",
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "debug, native layout, 1 file, float32, 2,216,944 parameters" in done.stdout
    assert "wrote 1 file, 0.00 GB, diffusers layout" in done.stdout
    opened = open_weights(tmp_path / "o")
    assert opened.layout == "diffusers" and opened.dtype("head.head.bias") == torch.bfloat16
    assert opened.metadata["step"] == "7" and opened.metadata["variant"] == "debug"


def test_the_command_reports_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x01" * 40)
    write_weights(InitialWeights(SMALL, 0), SMALL, tmp_path / "n", "native", None, {})
    for arguments, message in (
        (
            ("--input", tmp_path / "bad.safetensors", "--output", tmp_path / "o"),
            "bad.safetensors: damaged safetensors",
        ),
        (("--input", tmp_path / "n", "--output", tmp_path / "n"), "exists and is not an empty folder"),
        (("--input", tmp_path / "n", "--output", tmp_path / "o", "--max_shard_gb", "inf"), "must be above 0"),
    ):
        done = convert(*arguments, "--layout", "comfyui")
        assert done.returncode == 2 and done.stdout.count("\n") <= 1
        assert done.stderr.startswith("tools/convert_checkpoint.py: error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()
