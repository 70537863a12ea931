"""The text encoder: Wan's cleaning, true lengths, features that tell captions apart, and the guards."""

from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, UMT5EncoderModel

from megawan.data.toy import CAPTIONS
from megawan.encoders.text import TextEncoder, check_embeddings, clean_prompt


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.debug(seed=0, dim=64)


def saved(folder: Path, encoder: TextEncoder) -> tuple[Path, Path]:
    encoder._model.save_pretrained(folder / "text_encoder")
    encoder._tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "text_encoder", folder / "tokenizer"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tred \n circle ", "a red circle"),
        ("cats &amp;amp; dogs", "cats & dogs"),
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
