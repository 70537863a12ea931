"""The text encoder: Wan's cleaning, true lengths, both formats, real tokenizers, and the guards."""

import json
import math
import os
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from megawan.data.batch import pad_text
from megawan.data.toy import CAPTIONS
from megawan.encoders.text import TextEncoder, check_embeddings, check_tokenizer, clean_prompt


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.debug(seed=0, dim=64)


def saved(folder: Path, encoder: TextEncoder) -> tuple[Path, Path]:
    encoder._model.save_pretrained(folder / "text_encoder")
    encoder._tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "text_encoder", folder / "tokenizer"


NATIVE_NAMES = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
}


def native(encoder: TextEncoder) -> dict[str, Tensor]:
    """The tensors under the names of Wan's file: one table, and every block's parts under short names."""
    file = {}
    for key, value in encoder._model.state_dict().items():
        if key == "encoder.embed_tokens.weight":
            continue
        block, _, rest = key.removeprefix("encoder.block.").partition(".")
        inner = key.startswith("encoder.block.")
        file[f"blocks.{block}.{NATIVE_NAMES[rest]}" if inner else NATIVE_NAMES[key]] = value.clone()
    return file


def native_features(file: dict[str, Tensor], ids: list[int]) -> Tensor:
    """UMT5's encoder as the facts describe Wan's, on its names: no scaling, a bias of each layer's own."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * file[f"{name}.weight"]

    def bucket(distance: int) -> int:
        far, side = abs(distance), 16 if distance > 0 else 0
        large = 8 + int(math.log(max(far, 1) / 8) / math.log(128 / 8) * 8) if far >= 8 else far
        return side + min(large, 15)

    places = [[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))]
    x = file["token_embedding.weight"][ids]
    for block in range(2):
        part = f"blocks.{block}"
        y = norm(x, f"{part}.norm1")
        q, k, v = ((y @ file[f"{part}.attn.{name}.weight"].T).unflatten(-1, (4, -1)) for name in "qkv")
        logits = torch.einsum("inc,jnc->nij", q, k)
        logits = logits + file[f"{part}.pos_embedding.embedding.weight"][places].permute(2, 0, 1)
        mixed = torch.einsum("nij,jnc->inc", logits.softmax(dim=-1), v).flatten(1)
        x = x + mixed @ file[f"{part}.attn.o.weight"].T
        y = norm(x, f"{part}.norm2")
        gate = functional.gelu(y @ file[f"{part}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ file[f"{part}.ffn.fc1.weight"].T)) @ file[f"{part}.ffn.fc2.weight"].T
    return norm(x, "norm")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tred \n circle ", "a red circle"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        (
            "1 &lt; 2 < 3 &amp;amp;amp; 4",
            "1 < 2 < 3 &amp; 4",
        ),  # where there is a <, ftfy leaves entities alone
        ("schÃ¶n", "schön"),
        ("a\u3000b", "a b"),
        ("", ""),
        ("&nbsp;", ""),
    ],
)
def test_captions_are_cleaned_as_wan_does(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_features_have_the_true_length_and_depend_on_no_other_caption(encoder: TextEncoder) -> None:
    texts = ["", "a red circle", "é"]
    features = encoder.encode(texts, 64)
    assert [tuple(rows.shape) for rows in features] == [(1, 64), (13, 64), (3, 64)]  # bytes and the end
    for text, rows in zip(texts, features, strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, encoder.encode([text], 64)[0], atol=1e-5, rtol=0)
    assert encoder.encode([], 64) == []


def test_features_are_those_of_transformers(encoder: TextEncoder) -> None:
    ids = ByT5Tokenizer()("a red circle", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder._model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(["a  red circle "], 64)[0], expected, atol=1e-5, rtol=0)


def test_long_captions_are_cut_and_counted() -> None:
    encoder = TextEncoder.debug()
    features = encoder.encode(["x" * 7, "x" * 8, "x" * 100], 8)
    assert [len(rows) for rows in features] == [8, 8, 8]
    assert encoder.truncated == 2
    encoder.encode(["y" * 9], 8)
    assert encoder.truncated == 3


def test_the_toy_captions_have_clearly_different_features(encoder: TextEncoder) -> None:
    pooled = torch.stack([rows.mean(dim=0) for rows in encoder.encode(CAPTIONS, 64)])
    distance = torch.cdist(pooled, pooled) + 100 * torch.eye(len(CAPTIONS))
    assert distance.min() > 0.2 * pooled.norm(dim=1).mean()
    first, second = encoder.encode(["a red cat and a blue dog", "a blue dog and a red cat"], 64)
    assert (first.mean(dim=0) - second.mean(dim=0)).norm() > 0.2 * pooled.norm(dim=1).mean()


def test_the_debug_encoder_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = TextEncoder.debug(3, 32), TextEncoder.debug(3, 32), TextEncoder.debug(4, 32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.encode(["a"], 8)[0], again.encode(["a"], 8)[0])
    assert first.dim == 32
    with pytest.raises(ValueError, match="multiple of 4"):
        TextEncoder.debug(dim=30)


def test_saved_folders_open_to_the_same_encoder(tmp_path: Path, encoder: TextEncoder) -> None:
    opened = TextEncoder.open(*saved(tmp_path, encoder))
    assert opened.fingerprint == encoder.fingerprint
    assert torch.equal(opened.encode(["a red circle"], 64)[0], encoder.encode(["a red circle"], 64)[0])


def test_an_embedding_table_that_was_not_loaded_is_refused() -> None:
    model = TextEncoder.debug()._model
    check_embeddings(model)
    untied = TextEncoder.debug()._model
    untied.encoder.embed_tokens = torch.nn.Embedding(*untied.shared.weight.shape)
    with pytest.raises(ValueError, match="not tied"):
        check_embeddings(untied)
    with torch.no_grad():
        model.shared.weight.zero_()
    with pytest.raises(ValueError, match="empty"):
        TextEncoder(model, ByT5Tokenizer())


def test_folders_that_are_no_encoder_are_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    model, tokenizer = saved(tmp_path, encoder)
    with pytest.raises(ValueError, match="no text encoder folder"):
        TextEncoder.open(tmp_path / "nowhere", tokenizer)
    with pytest.raises(ValueError, match="no text tokenizer folder"):
        TextEncoder.open(model, tmp_path)
    weights = UMT5EncoderModel.from_pretrained(model).state_dict()
    del weights["encoder.final_layer_norm.weight"]
    encoder._model.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(ValueError, match="lacks 1 tensors.*final_layer_norm"):
        TextEncoder.open(tmp_path / "partial", tokenizer)
    (model / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot open") as caught:
        TextEncoder.open(model, tokenizer)
    assert "\n" not in str(caught.value)


def test_wans_file_gives_the_features_of_its_own_formula(tmp_path: Path, encoder: TextEncoder) -> None:
    file = native(encoder)
    assert len(file) == 2 + 10 * 2  # the released one has 2 + 10 * 24 = 242
    _, tokenizer = saved(tmp_path, encoder)
    torch.save(file, tmp_path / "t5.pth")
    save_file({f"model.{key}": value for key, value in file.items()}, tmp_path / "t5.safetensors")
    text = "a red circle and a blue square, seen from far away"
    expected = native_features(file, ByT5Tokenizer()(text).input_ids)
    torch.testing.assert_close(encoder.encode([text], 64)[0], expected, atol=1e-4, rtol=1e-4)
    for name in ("t5.pth", "t5.safetensors"):
        opened = TextEncoder.open(tmp_path / name, tokenizer)
        assert opened.fingerprint == encoder.fingerprint, name
        assert torch.equal(opened.encode([text], 64)[0], encoder.encode([text], 64)[0]), name


def test_the_file_is_read_in_another_precision_with_one_table(tmp_path: Path, encoder: TextEncoder) -> None:
    _, tokenizer = saved(tmp_path, encoder)
    torch.save({key: value.bfloat16() for key, value in native(encoder).items()}, tmp_path / "t5.pth")
    opened = TextEncoder.open(tmp_path / "t5.pth", tokenizer, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in opened._model.parameters()} == {torch.bfloat16}
    assert opened._model.encoder.embed_tokens.weight is opened._model.shared.weight
    (rough,), (fine,) = opened.encode(["a red circle"], 64), encoder.encode(["a red circle"], 64)
    assert rough.dtype == torch.float32
    assert 0 < (rough - fine).abs().mean() < 0.05 * fine.abs().mean()


@pytest.mark.parametrize(
    ("remove", "add", "said"),
    [
        ("norm.weight", "", r"lacks 1 tensors, first encoder\.final_layer_norm"),
        ("token_embedding.weight", "", r"lacks 1 tensors, first shared\.weight"),
        ("blocks.1.ffn.gate.0.weight", "", r"block\.1\.layer\.1\.DenseReluDense\.wi_0"),
        ("", "blocks.0.cross_attn.q.weight", "1 tensors too many"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, encoder: TextEncoder, remove: str, add: str, said: str
) -> None:
    _, tokenizer = saved(tmp_path, encoder)
    file = native(encoder)
    file.pop(remove, None)
    if add:
        file[add] = torch.zeros(1)
    torch.save(file, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match=said):
        TextEncoder.open(tmp_path / "t5.pth", tokenizer)


def test_a_file_with_a_tensor_of_another_shape_is_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    _, tokenizer = saved(tmp_path, encoder)
    file = native(encoder)
    file["blocks.1.norm1.weight"] = torch.ones(63)
    torch.save(file, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match=r"block\.1\.layer\.0\.layer_norm\.weight.*63") as caught:
        TextEncoder.open(tmp_path / "t5.pth", tokenizer)
    assert "\n" not in str(caught.value)


def test_a_file_of_zeros_is_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    _, tokenizer = saved(tmp_path, encoder)
    file = native(encoder)
    file["token_embedding.weight"].zero_()
    torch.save(file, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match="table is empty"):
        TextEncoder.open(tmp_path / "t5.pth", tokenizer)


def test_a_pth_that_would_run_code_is_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    _, tokenizer = saved(tmp_path, encoder)
    torch.save({"token_embedding.weight": Trap()}, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        TextEncoder.open(tmp_path / "t5.pth", tokenizer)
    assert not (tmp_path / "ran").exists()


def test_rows_past_the_true_length_are_zero_and_what_pads_a_batch_is_not_seen(encoder: TextEncoder) -> None:
    short, long = encoder.encode(["a cat", "a red circle and a blue square"], 64)
    beside_long, _ = encoder.encode(["a cat", "b" * 60], 64)
    torch.testing.assert_close(beside_long, short, atol=1e-5, rtol=0)
    padded = pad_text(short, 64)
    assert padded.shape == (64, 64) and torch.equal(padded[: len(short)], short)
    assert padded[len(short) :].eq(0).all() and short[-1].abs().max() > 0.1
    with pytest.raises(ValueError, match="does not fit the model's 8"):
        pad_text(long, 8)


def spiece(folder: Path, words: int = 60) -> Path:
    """A tokenizer folder as google/umt5-xxl's is: a sentencepiece model with padding 0, end 1."""
    folder.mkdir(parents=True)
    (folder.parent / "corpus.txt").write_text("\n".join([*CAPTIONS, "schön und gut", "12 3 4"] * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=words,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    names = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "extra_ids": 4}))
    return folder


def encoder_of(vocabulary: int) -> TextEncoder:
    """The debug encoder with a table of another length, as saved with a sentencepiece vocabulary."""
    encoder = TextEncoder.debug(dim=32)
    table = encoder._model.shared.weight
    rows = torch.nn.Parameter(table.detach()[:vocabulary].clone(), requires_grad=False)
    encoder._model.shared.weight = encoder._model.encoder.embed_tokens.weight = rows
    encoder._model.config.vocab_size = vocabulary
    return encoder


@pytest.mark.parametrize("place", ["google/umt5-xxl", "umt5-xxl", "."])
def test_a_sentencepiece_folder_beside_wans_file_is_found_and_read_as_sentencepiece_does(
    tmp_path: Path, place: str
) -> None:
    folder = spiece(tmp_path / "made")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (tmp_path / place / file.name).write_bytes(file.read_bytes())
    torch.save(native(encoder_of(48)), tmp_path / "t5.pth")
    opened = TextEncoder.open(tmp_path / "t5.pth")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for text in ("", *CAPTIONS[:3], "Schön, 12 Ｃｉｒｃｌｅｓ", "一只猫"):
        assert opened._tokenizer(text).input_ids == [*pieces.encode(text), 1], text
        assert len(opened.encode([text], 64)[0]) == len(pieces.encode(text)) + 1


def test_the_tokenizer_beside_a_diffusers_folder_is_found(tmp_path: Path, encoder: TextEncoder) -> None:
    model, _ = saved(tmp_path, encoder)
    assert TextEncoder.open(model).fingerprint == encoder.fingerprint
    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save(native(encoder), alone / "t5.pth")
    with pytest.raises(ValueError, match="no tokenizer with .*--tokenizer"):
        TextEncoder.open(alone / "t5.pth")


def test_another_models_tokenizer_is_refused(tmp_path: Path, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"\d\d words and the text encoder 384: they do not belong together"):
        TextEncoder.open(saved(tmp_path, encoder)[0], spiece(tmp_path / "made", 60))
    model = UMT5EncoderModel(UMT5Config(vocab_size=300, d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="384 words and the text encoder 300"):
        check_tokenizer(model, ByT5Tokenizer())
    odd = ByT5Tokenizer(eos_token="<unk>")
    with pytest.raises(ValueError, match=r"not UMT5's: an empty text gives \[2\]"):
        check_tokenizer(encoder._model, odd)
