"""Opening weights: every layout, every variant, and everything that can be wrong with a file."""

import dataclasses
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megawan.models.detect import inferred_config, native_tensors, variant_names
from megawan.models.initial import InitialWeights, initial_tensor
from megawan.models.keys import expected_shapes, to_diffusers
from megawan.models.layouts import open_experts, open_weights, write_weights
from megawan.models.tensor_files import StoredTensor
from megawan.models.variants import VARIANTS, WanConfig, get_variant

replace = dataclasses.replace
SMALL = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32, text_len=20)
WEIGHTS = InitialWeights(SMALL, seed=7)
STEM = "diffusion_pytorch_model"


def state() -> dict[str, Tensor]:
    return {key: WEIGHTS.load(key) for key in WEIGHTS.keys()}


def renamed(rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(key): tensor for key, tensor in state().items()}


def write_config(folder: Path, changes: dict | None = None) -> None:
    names = ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers", "eps", "text_len")
    content = {name: getattr(SMALL, name) for name in names} | {"model_type": "t2v"} | (changes or {})
    (folder / "config.json").write_text(json.dumps(content))


def native_folder(folder: Path, shard_bytes: int = 10**9) -> Path:
    write_weights(WEIGHTS, SMALL, folder, "native", None, {}, max_shard_bytes=shard_bytes)
    return folder


def refused(path: Path, config: WanConfig | None = SMALL, **options: bool) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_weights(path, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_prefix(prefix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file(renamed(lambda key: prefix + key), folder / "model.safetensors")
        write_config(folder)
        return folder / "model.safetensors"

    return make


def pickled(nested: bool, name: str = "model.pth", legacy: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        content = {"state_dict": state(), "step": 3} if nested else state()
        torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)
        write_config(folder)
        return folder

    return make


def diffusers_folder(folder: Path) -> Path:
    write_weights(WEIGHTS, SMALL, folder / "d", "diffusers", None, {}, max_shard_bytes=100_000)
    return folder / "d"


def shards_without_index(folder: Path) -> Path:
    native_folder(folder / "n", 100_000)
    (folder / "n" / f"{STEM}.safetensors.index.json").unlink()
    return folder / "n"


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "one native file": ("native", lambda folder: native_folder(folder / "n") / f"{STEM}.safetensors"),
    "native folder": ("native", lambda folder: native_folder(folder / "n")),
    "native shards": ("native", lambda folder: native_folder(folder / "n", 100_000)),
    "native index": (
        "native",
        lambda folder: native_folder(folder / "n", 1) / f"{STEM}.safetensors.index.json",
    ),
    "native shards without index": ("native", shards_without_index),
    "diffusers pipeline": ("diffusers", diffusers_folder),
    "diffusers transformer": ("diffusers", lambda folder: diffusers_folder(folder) / "transformer"),
    "comfyui": ("comfyui", with_prefix("model.diffusion_model.")),
    "model.": ("model.", with_prefix("model.")),
    "pipe.dit.": ("pipe.dit.", with_prefix("pipe.dit.")),
    "pth": ("native", pickled(nested=False)),
    "pth in a dictionary": ("native", pickled(nested=True, name="model.pt")),
    "pth of the old format": ("native", pickled(nested=False, legacy=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_the_same(name: str, tmp_path: Path) -> None:
    layout, make = LAYOUTS[name]
    path = make(tmp_path)
    for opened in (open_weights(path, SMALL), open_weights(path)):
        assert opened.layout == layout
        assert opened.keys() == WEIGHTS.keys()
        for key in opened.keys():
            value = opened.load(key)
            assert torch.equal(value, WEIGHTS.load(key)), key
            assert opened.shape(key) == tuple(value.shape) and opened.dtype(key) == value.dtype
            for start, length in ((0, value.numel()), (value.numel() // 3, value.numel() // 2), (1, 0)):
                part = opened.load_part(key, start, length)
                assert torch.equal(part, value.flatten()[start : start + length]), (key, start, length)
        assert f"{layout} layout" in opened.describe() and "parameters" in opened.describe()
    found = open_weights(path).config
    # A diffusers config.json has no text_len and no model_type: Wan's own values stand in.
    assert found == (replace(SMALL, text_len=512) if layout == "diffusers" else SMALL)


def test_what_is_loaded_belongs_to_the_caller(tmp_path: Path) -> None:
    for path in (native_folder(tmp_path / "n"), pickled(nested=False)(tmp_path)):
        opened = open_weights(path, SMALL)
        opened.load("head.head.weight").fill_(3)
        assert torch.equal(opened.load("head.head.weight"), WEIGHTS.load("head.head.weight"))


def test_what_is_loaded_outlives_its_file(tmp_path: Path) -> None:
    # A tensor that is still mapped from its file turns into a bus error when the file is cut or replaced.
    path = native_folder(tmp_path / "n")
    held = open_weights(path, SMALL).load("head.head.weight")
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(held, WEIGHTS.load("head.head.weight"))


def test_of_a_part_only_its_rows_are_read() -> None:
    value, asked = torch.arange(60.0).view(10, 3, 2), []

    def read(rows: slice) -> Tensor:
        asked.append((rows.start, rows.stop))
        return value[rows].clone()

    stored = StoredTensor(Path("x.safetensors"), (10, 3, 2), torch.float32, read)
    for start, length, rows in ((0, 6, (0, 1)), (7, 4, (1, 2)), (11, 2, (1, 3)), (30, 30, (5, 10))):
        assert torch.equal(stored.load_part(start, length), value.flatten()[start : start + length])
        assert asked.pop() == rows


def stored_shapes(config: WanConfig, spell: Callable[[str], str] = str) -> dict[str, StoredTensor]:
    return {
        spell(key): StoredTensor(Path("x.safetensors"), shape, torch.float32, lambda rows: torch.empty(0))
        for key, shape in expected_shapes(config).items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_told_from_its_shapes_alone(name: str) -> None:
    config = VARIANTS[name].config
    for layout, spell in (
        ("native", str),
        ("diffusers", to_diffusers),
        ("comfyui", "model.diffusion_model.{}".format),
    ):
        found_layout, native = native_tensors(stored_shapes(config, spell), Path("x"))
        found = inferred_config(native, Path("x"), None)
        assert found_layout == layout
        # i2v-14B and Fun-InP share every shape, so the kind of task may be another's.
        assert replace(found, model_type="") == replace(config, model_type="")
        assert name in variant_names(found, None, None)
        assert variant_names(found, name, None) == (name,)


def test_the_folder_tells_the_expert() -> None:
    config = get_variant("t2v-A14B-high").config
    assert variant_names(config, None, None) == ("t2v-14B", "t2v-A14B-high", "t2v-A14B-low")
    assert variant_names(config, None, "low") == ("t2v-A14B-low",)


# config.json files as the published repositories have them: fields are missing, and others are there besides.
PUBLISHED_CONFIGS = {
    "t2v-1.3B": {"_class_name": "WanModel", "model_type": "t2v", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960}
    | {"freq_dim": 256, "in_dim": 16, "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512},
    "flf2v-14B": {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": 5120,
        "attention_head_dim": 128,
    }
    | {"cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256, "image_dim": 1280}
    | {
        "in_channels": 36,
        "num_attention_heads": 40,
        "num_layers": 40,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
    }
    | {
        "pos_embed_seq_len": 514,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    },
    "ti2v-5B": {"_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "image_dim": None}
    | {"in_channels": 48, "num_attention_heads": 24, "out_channels": 48, "pos_embed_seq_len": None},
    "vace-1.3B": {"model_type": "vace", "dim": 1536, "vace_layers": list(range(0, 30, 2)), "vace_in_dim": 96},
}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configurations_are_understood(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED_CONFIGS[name]))
    config = get_variant(name).config
    assert inferred_config(stored_shapes(config), tmp_path, file) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dim": 64}, "dim is 64, but the weights show 48"),
        ({"num_layers": 30}, "num_layers is 30, but the weights show 2"),
        ({"num_heads": 5}, "48 over 5 heads"),
        ({"num_heads": "2"}, "num_heads is '2'; expected a value like 40"),
        ({"num_heads": True}, "num_heads is True"),
        ({"model_type": "t2v\x1b[2J"}, r"model_type is 't2v\\x1b\[2J'; expected a value"),
        ({"num_heads": "9" * 10**6}, "num_heads is '9{79}; expected a value"),
        ({"eps": "x"}, "eps is 'x'; expected a value like 1e-06"),
        ({"vace_layers": [0, 1]}, r"vace_layers is \(0, 1\), but the weights show no"),
        ({"num_attention_heads": 3, "attention_head_dim": 128}, "dim is 384, but the weights show 48"),
        ([1], "expected a JSON object, found list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(
    content: object, message: str, tmp_path: Path
) -> None:
    native_folder(tmp_path / "n")
    file = tmp_path / "n" / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    found = refused(tmp_path / "n", None)
    assert re.search(message, found) and str(file) in found


def test_without_a_configuration_the_heads_may_be_unknown(tmp_path: Path) -> None:
    native_folder(tmp_path / "n")
    (tmp_path / "n" / "config.json").unlink()
    assert "no config.json tells num_heads" in refused(tmp_path / "n", None)


def test_other_heads_are_another_model(tmp_path: Path) -> None:
    # Every shape agrees; only config.json can tell, and the outputs would be wrong.
    path = native_folder(tmp_path / "n")
    assert "num_heads expected 4, found 2" in refused(path, replace(SMALL, num_heads=4))
    assert "eps expected 0.1, found 1e-06" in refused(path, replace(SMALL, eps=0.1))


# --- wrong files ---


def break_file(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def header(content: object, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "damaged safetensors file"),
        (lambda content: content[:-1], "damaged safetensors file"),
        (lambda content: content + b"\0", "damaged safetensors file"),
        (lambda content: content[:5], "damaged safetensors file"),
        (lambda content: b"", "an empty file"),
        (lambda content: b"\xff" * 64, "damaged safetensors file"),
        (lambda content: struct.pack("<Q", 2**62) + content[8:], "damaged safetensors file"),
        (lambda content: header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}), "damaged"),
        (lambda content: header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "damaged"),
        (
            lambda content: header({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"0" * 8),
            "a is I64",
        ),
        (lambda content: header({}), "holds no tensors"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (lambda content: b"PK\x03\x04" + content, "it is a PyTorch pickle"),
        (lambda content: b"\x80\x02}q\x00.", "it is a PyTorch pickle"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    file = native_folder(tmp_path / "n") / f"{STEM}.safetensors"
    break_file(file, change)
    for path in (file, file.parent):
        for config in (SMALL, None):
            found = refused(path, config)
            assert message in found and str(file) in found


@pytest.mark.parametrize("name", ["x\x1b[2J", "x\ny", "x" * 10**5, "x\u202e"])
def test_a_name_that_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    held = state() | {name: torch.zeros(2)}
    save_file(held, tmp_path / "x.safetensors")
    torch.save(held, tmp_path / "x.pth")
    path = native_folder(tmp_path / "n", 100_000)
    index = path / f"{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {name: "y.safetensors"}}))
    for file in (tmp_path / "x.safetensors", tmp_path / "x.pth", index):
        message = refused(file)
        assert message.startswith(f"{file}: a tensor is named 'x") and message.isprintable()
        assert len(message) < len(str(file)) + 200


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_never_run(name: str, legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "PWNED"
    content = state() | {"patch_embedding.bias": Payload(f"touch {mark}")}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / name)
    assert not mark.exists()
    assert ("posix.system" in message) == (name != "model.safetensors")
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary of tensors, found list"),
        ({}, "expected a dictionary of tensors, found dict"),
        ({"a": 3}, "'a' is a int"),
        ({1: torch.zeros(1)}, "1 is a Tensor"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a is torch.int64"),
        ({"a": torch.eye(2).to_sparse()}, "dense tensors"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert message in refused(tmp_path / "x.pth")


def test_a_safetensors_file_under_a_pickle_name_is_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.pth")
    assert "it is a safetensors file" in refused(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"not a pickle at all")
    assert "refused: this pickle is damaged or holds more" in refused(tmp_path / "y.pth")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = native_folder(tmp_path / "n", 100_000)
    count = len(list(path.glob("*.safetensors")))
    name = f"{STEM}-00002-of-{count:05d}.safetensors"
    (path / name).unlink()
    assert re.search(rf"shard {name} with \d+ of 69 tensors is missing", refused(path))
    (path / f"{STEM}.safetensors.index.json").unlink()
    assert f"{name}: this shard of {count} is missing" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["weight_map"].update({"head.head.bias": "../evil.safetensors"}),
            "of the same folder",
        ),
        (lambda index: index["weight_map"].update({"head.head.bias": "/etc/passwd"}), "of the same folder"),
        (lambda index: index["weight_map"].update({"head.head.bias": 3}), "of the same folder"),
        (
            lambda index: index["weight_map"].update({"head.head.bias": "\0\n.safetensors"}),
            "of the same folder",
        ),
        (
            lambda index: index["weight_map"].update({"extra": index["weight_map"]["head.head.bias"]}),
            "expected extra",
        ),
        (lambda index: index["weight_map"].pop("head.head.bias"), "found head.head.bias, which"),
        (lambda index: index.pop("weight_map"), "expected a weight_map"),
        (lambda index: index.update(weight_map={}), "expected a weight_map"),
        (lambda index: index.update(weight_map=[1]), "expected a weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    change: Callable[[dict], object], message: str, tmp_path: Path
) -> None:
    path = native_folder(tmp_path / "n", 100_000)
    index = path / f"{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    assert message in refused(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file(state(), tmp_path / f"{STEM}-{number:05d}-of-00002.safetensors")
    assert f"is in {STEM}-00001-of-00002.safetensors too" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("blocks.1.ffn.2.bias"), "missing keys: blocks.1.ffn.2.bias"),
        (lambda held: held.pop("patch_embedding.weight"), "expected patch_embedding.weight"),
        (lambda held: held.update(ref_conv=torch.zeros(1)), "unexpected keys: ref_conv"),
        (
            lambda held: held.update({"blocks.0.self_attn.q.weight": torch.zeros(48, 47)}),
            r"blocks.0.self_attn.q.weight expected \(48, 48\), found \(48, 47\) in model.safetensors",
        ),
        (
            lambda held: held.update({"blocks.0.modulation": torch.zeros(6, 48)}),
            r"expected \(1, 6, 48\), found \(6, 48\)",
        ),
        (
            lambda held: held.update({"head.head.bias": torch.zeros(0)}),
            "head.head.bias has shape .0,., no elements",
        ),
        (lambda held: held.update({"patch_embedding.weight": torch.zeros(48, 16, 2, 2)}), "expected 5 axes"),
        (
            lambda held: [held.pop(key) for key in list(held) if key.startswith("blocks.0.")],
            "missing|blocks.0 is missing",
        ),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(
    change: Callable[[dict], object], message: str, tmp_path: Path
) -> None:
    held = state()
    change(held)
    save_file(held, tmp_path / "model.safetensors")
    write_config(tmp_path)
    for config in (SMALL, None):
        found = refused(tmp_path, config)
        assert re.search(message, found), found
        assert str(tmp_path) in found


def test_a_wrong_variant_says_what_it_is(tmp_path: Path) -> None:
    config = get_variant("debug").config
    write_weights(InitialWeights(config, 0), config, tmp_path / "n", "native", None, {})
    message = refused(tmp_path / "n", get_variant("t2v-1.3B").config)
    assert "not the model asked for but debug: dim expected 1536, found 144" in message
    message = refused(tmp_path / "n", get_variant("debug-i2v").config)
    assert (
        "in_dim expected 36, found 16" in message
        and "missing keys: blocks.0.cross_attn.k_img.weight" in message
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA"),
        ("encoder.conv1.weight", "a VAE"),
        ("token_embedding.weight", "a text encoder"),
        ("visual.conv1.weight", "a CLIP image encoder"),
        ("something.else", "expected patch_embedding.weight, found something.else"),
    ],
)
def test_weights_of_something_else_are_recognised(key: str, message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    found = refused(tmp_path / "x.safetensors")
    assert "not a Wan transformer" in found and message in found


def test_a_folder_must_hold_one_model(tmp_path: Path) -> None:
    assert "no weights; expected" in refused(tmp_path)
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    for name in ("epoch-0.safetensors", "epoch-1.safetensors"):
        save_file(state(), tmp_path / name)
    assert "several weights (epoch-0.safetensors, epoch-1.safetensors)" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "not a name of weights" in refused(tmp_path / "notes.txt")
    (tmp_path / "folder.safetensors").mkdir()
    assert "no weights" in refused(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe.safetensors")


def test_a_damaged_file_is_no_base_to_start_from(tmp_path: Path) -> None:
    weights = state()
    del weights["blocks.1.ffn.0.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    write_config(tmp_path)
    said = refused(tmp_path, None)  # a conversion asks for no model, and has no flag to fill one
    assert "missing keys: blocks.1.ffn.0.weight" in said and "initialise_missing" not in said
    assert "initialise_missing" in refused(tmp_path, SMALL)


def test_a_training_checkpoint_is_told_from_weights(tmp_path: Path) -> None:
    step = tmp_path / "run/checkpoints/step_0000001"
    step.mkdir(parents=True)
    save_file({"master/head.head.bias": torch.zeros(3)}, step / "rank_00000.safetensors")
    (step / "manifest.json").write_text("{}")
    for path in (step, tmp_path / "run"):
        assert f"export_checkpoint.py --input {path} makes weights of it" in refused(path)


def test_norm_added_q_of_published_diffusers_files_is_ignored(tmp_path: Path) -> None:
    held = renamed(to_diffusers) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    save_file(held, tmp_path / "x.safetensors")
    assert open_weights(tmp_path / "x.safetensors", SMALL).keys() == WEIGHTS.keys()
    held["blocks.0.attn2.norm_added_x.weight"] = torch.ones(48)
    save_file(held, tmp_path / "y.safetensors")
    assert "unexpected keys in the diffusers layout: blocks.0.attn2.norm_added_x" in refused(
        tmp_path / "y.safetensors"
    )


# --- the two experts of an A14B ---


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_two_experts_are_never_confused(layout: str, tmp_path: Path) -> None:
    low = InitialWeights(SMALL, seed=8)
    path = tmp_path / "pair"
    write_weights(WEIGHTS, SMALL, path, layout, None, {}, low_noise=low)
    assert "holds both experts of an A14B; give one of them" in refused(path)
    for expert, source in (("high", WEIGHTS), ("low", low)):
        opened = open_weights(path, SMALL, expert=expert)
        assert torch.equal(opened.load("blocks.1.ffn.0.weight"), source.load("blocks.1.ffn.0.weight"))
    pair = open_experts(path)
    assert list(pair) == ["high", "low"]
    with pytest.raises(ValueError, match="is the low-noise expert; the high-noise one was asked for"):
        open_weights(pair["low"].path, SMALL, expert="high")
    low_folder = pair["low"].path.parent
    assert list(open_experts(low_folder)) == [None]
    shutil.rmtree(low_folder)
    assert list(open_experts(path if layout == "diffusers" else pair["high"].path)) == [None]


# --- weights for only a part of a model ---


def test_a_part_is_filled_only_when_asked(tmp_path: Path) -> None:
    path = native_folder(tmp_path / "n")
    wider = replace(SMALL, model_type="flf2v", in_dim=36, image_dim=24, pos_embed_seq_len=514)
    assert "missing keys: blocks.0.cross_attn.k_img" in refused(path, wider)
    opened = open_weights(path, wider, initialise_missing=True, seed=5)
    text = opened.describe()
    assert "initialised anew with seed 5: blocks.*.cross_attn.k_img.weight x2" in text
    assert "img_emb.emb_pos" in text and "patch_embedding.weight: the first 16 input channels kept" in text
    embedding = opened.load("patch_embedding.weight")
    assert (
        torch.equal(embedding[:, :16], WEIGHTS.load("patch_embedding.weight"))
        and (embedding[:, 16:] == 0).all()
    )
    key = "blocks.1.cross_attn.k_img.weight"
    assert torch.equal(opened.load(key), initial_tensor(key, (48, 48), wider, 5))
    assert torch.equal(opened.load("head.head.bias"), WEIGHTS.load("head.head.bias"))
    for key in ("patch_embedding.weight", "blocks.1.cross_attn.k_img.weight", "head.head.weight"):
        assert torch.equal(opened.load_part(key, 5, 300), opened.load(key).flatten()[5:305])
    assert {key: opened.shape(key) for key in opened.keys()} == expected_shapes(wider)


def test_a_control_model_starts_from_an_image_model(tmp_path: Path) -> None:
    image = replace(SMALL, model_type="i2v", in_dim=36, image_dim=24)
    source = InitialWeights(image, 1)
    write_weights(source, image, tmp_path / "n", "native", None, {})
    control = replace(image, in_dim=48)
    assert "with --model.initialise_missing the model can start from them" in refused(tmp_path / "n", control)
    opened = open_weights(tmp_path / "n", control, initialise_missing=True)
    # What follows the noisy latent (mask and image there, control here) means something else: it starts at 0.
    assert torch.equal(
        opened.load("patch_embedding.weight")[:, :16], source.load("patch_embedding.weight")[:, :16]
    )
    assert (opened.load("patch_embedding.weight")[:, 16:] == 0).all()
    assert opened.filled is not None and opened.filled.new == ()
    # Nothing is dropped: a model without an image branch does not start from one with it.
    for flag in (False, True):
        found = refused(tmp_path / "n", SMALL, initialise_missing=flag)
        assert "unexpected keys: blocks.0.cross_attn.k_img" in found and "--model" not in found


def test_a_vace_branch_starts_anew_beside_its_base(tmp_path: Path) -> None:
    path = native_folder(tmp_path / "n")
    vace = replace(SMALL, model_type="vace", vace_layers=(0, 1), vace_in_dim=20)
    opened = open_weights(path, vace, initialise_missing=True)
    assert "vace_blocks.*.after_proj.weight x2" in opened.describe()
    assert (opened.load("vace_blocks.0.after_proj.weight") == 0).all()


def test_filling_does_not_excuse_another_architecture(tmp_path: Path) -> None:
    path = native_folder(tmp_path / "n")
    assert "num_layers expected 3" in refused(path, replace(SMALL, num_layers=3), initialise_missing=True)
    assert "dim expected 96" in refused(path, replace(SMALL, dim=96), initialise_missing=True)
    assert open_weights(path, SMALL, initialise_missing=True).filled is None
