"""The image encoder at tiny widths and random weights: native pixels and formula, both formats, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from megawan.encoders.image import ImageEncoder, preprocess
from megawan.rng import generator_at

WIDTH, LAYERS, SIZE, PATCH, HEADS = 32, 3, 28, 14, 16


def tiny(activation: str = "gelu", layers: int = LAYERS) -> Any:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act=activation,
    )
    model = CLIPVisionModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator_at(0, "clip", name))
    return model.eval()


def native(model: Any) -> dict[str, Tensor]:
    """The tensors in the names and shapes of Wan's file, with its text half and shared projection."""
    own = {key.removeprefix("vision_model."): value.clone() for key, value in model.state_dict().items()}
    file = {
        "visual.cls_embedding": own["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": own["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": own["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(WIDTH, 8),
        "textual.token_embedding.weight": torch.zeros(10, 4),
        "textual.blocks.0.norm1.weight": torch.zeros(4),
        "log_scale": torch.zeros(()),
    }
    for kind in ("weight", "bias"):
        file[f"visual.pre_norm.{kind}"] = own[f"pre_layrnorm.{kind}"]
        file[f"visual.post_norm.{kind}"] = own[f"post_layernorm.{kind}"]
        for layer in range(LAYERS):
            ours, theirs = f"encoder.layers.{layer}", f"visual.transformer.{layer}"
            qkv = [own[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            file[f"{theirs}.attn.to_qkv.{kind}"] = torch.cat(qkv)
            file[f"{theirs}.attn.proj.{kind}"] = own[f"{ours}.self_attn.out_proj.{kind}"]
            file[f"{theirs}.norm1.{kind}"] = own[f"{ours}.layer_norm1.{kind}"]
            file[f"{theirs}.norm2.{kind}"] = own[f"{ours}.layer_norm2.{kind}"]
            file[f"{theirs}.mlp.0.{kind}"] = own[f"{ours}.mlp.fc1.{kind}"]
            file[f"{theirs}.mlp.2.{kind}"] = own[f"{ours}.mlp.fc2.{kind}"]
    return file


def native_features(file: dict[str, Tensor], square: Tensor) -> Tensor:
    """ViT as the facts describe Wan's: pre-norm, all blocks but the last, exact GELU, no norm at the end."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, file[f"{name}.weight"], file[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), file[f"{name}.weight"], file[f"{name}.bias"], 1e-5)

    patches = functional.conv2d(square, file["visual.patch_embedding.weight"], stride=PATCH)
    first = file["visual.cls_embedding"].expand(len(square), -1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + file["visual.pos_embedding"]
    x = norm(x, "visual.pre_norm")
    for layer in range(LAYERS - 1):
        block = f"visual.transformer.{layer}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.to_qkv")
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")), f"{block}.mlp.2")
    return x


def pictures() -> Tensor:
    return torch.rand(2, 3, 40, 56, generator=generator_at(0, "pictures")) * 2 - 1


def test_features_are_those_of_the_native_formula_one_block_before_the_last() -> None:
    model = tiny()
    encoder = ImageEncoder(model)
    features = encoder.encode(pictures())
    assert (encoder.tokens, encoder.dim) == (5, WIDTH)
    assert features.shape == (2, 5, WIDTH) and features.dtype == torch.float32
    expected = native_features(native(model), preprocess(pictures(), SIZE))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        last = model(pixel_values=preprocess(pictures(), SIZE)).last_hidden_state
    assert (features - last).abs().mean() > 0.1


def test_the_whole_picture_is_squeezed_and_normalised() -> None:
    flat = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 40, 56)
    wanted = ((0.0 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711)
    torch.testing.assert_close(preprocess(flat, 28)[0, :, 5, 9], torch.tensor(wanted), atol=1e-6, rtol=1e-6)
    # Nothing is cut off: what is only at the far left and right of a wide picture is seen.
    wide = torch.zeros(1, 3, 28, 112)
    wide[..., :8], wide[..., -8:] = 1, -1
    square = preprocess(wide, 28)[0, 0] - preprocess(torch.zeros(1, 3, 28, 112), 28)[0, 0]
    assert square[14, 0] > 1 and square[14, -1] < -1
    # Bicubic without antialiasing: every fourth column counts hardly at all, unlike with antialiasing.
    comb = torch.zeros(1, 3, 28, 112)
    comb[..., 0::4] = 1
    assert (preprocess(comb, 28) - preprocess(torch.zeros(1, 3, 28, 112), 28)).max() < 0
    same = preprocess(pictures()[..., :28, :28], 28) * torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    ).view(1, 3, 1, 1)
    back = (same + torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)) * 2 - 1
    torch.testing.assert_close(back, pictures()[..., :28, :28], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_folders_and_wans_file_give_equal_features(tmp_path: Path, prefix: str) -> None:
    model = tiny()
    expected = ImageEncoder(model)
    model.save_pretrained(tmp_path / "image_encoder")
    shard = tmp_path / "image_encoder/model.safetensors"  # both generations of transformers' names
    named = {prefix + key.removeprefix("vision_model."): value for key, value in load_file(shard).items()}
    save_file(named, shard, metadata={"format": "pt"})
    file = native(model)
    torch.save(file, tmp_path / "clip.pth")
    save_file(
        {f"model.{key}": value.contiguous() for key, value in file.items()}, tmp_path / "clip.safetensors"
    )
    for path in ("image_encoder", "clip.pth", "clip.safetensors"):
        opened = ImageEncoder.open(tmp_path / path)
        assert opened.fingerprint == expected.fingerprint, path
        assert torch.equal(opened.encode(pictures()), expected.encode(pictures())), path


def test_the_published_names_are_those_of_the_file() -> None:
    keys = set(native(tiny()))
    assert {
        "visual.transformer.2.attn.to_qkv.bias",
        "visual.pos_embedding",
        "visual.post_norm.weight",
    } <= keys
    assert sum(key.startswith("visual.") for key in keys) == 8 + 12 * LAYERS


def test_the_debug_encoder_has_the_released_ones_shape_and_depends_on_its_seed() -> None:
    before = torch.random.get_rng_state()
    first, again, other = ImageEncoder.debug(1), ImageEncoder.debug(1), ImageEncoder.debug(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    features = first.encode(pictures())
    assert features.shape == (2, 257, 1280)
    assert features.std() > 0.1 and (features[0] - features[1]).abs().mean() > 0.01


def test_other_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation is quick_gelu"):
        ImageEncoder(tiny("quick_gelu"))
    with pytest.raises(ValueError, match="needs 2"):
        ImageEncoder(tiny(layers=1))
    file = native(tiny())
    del file["visual.transformer.1.mlp.0.bias"]
    torch.save(file, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first encoder\.layers\.1\.mlp\.fc1\.bias"):
        ImageEncoder.open(tmp_path / "partial.pth")
    torch.save({"textual.norm.weight": torch.zeros(3)}, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="no CLIP of Wan's"):
        ImageEncoder.open(tmp_path / "text.pth")
    model = tiny()
    model.save_pretrained(tmp_path / "folder")
    tensors = load_file(tmp_path / "folder/model.safetensors")
    removed = next(key for key in tensors if key.endswith("layers.0.mlp.fc1.weight"))
    del tensors[removed]
    save_file(tensors, tmp_path / "folder/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first .*layers\.0\.mlp\.fc1\.weight"):
        ImageEncoder.open(tmp_path / "folder")


def test_what_is_no_encoder_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "clip.pth").write_bytes(b"no weights")
    (tmp_path / "clip.bin").write_bytes(b"no weights")
    for path, said in (("clip.pth", "cannot open"), ("clip.bin", "ends in"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=said) as caught:
            ImageEncoder.open(tmp_path / path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no config.json"):
        ImageEncoder.open(tmp_path)
    with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
        ImageEncoder(tiny()).encode(torch.zeros(3, 8, 8))
