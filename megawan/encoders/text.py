"""Captions to text features, as Wan was trained with them: UMT5's encoder after Wan's cleaning."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from megawan.encoders.fingerprint import fingerprint
from megawan.rng import generator_at

# The real encoder's table has a standard deviation near 1; a table that was never filled has exactly 0.
SMALLEST_STD = 1e-6
# The debug encoder's bias by relative position: wide enough that each head looks at few places, so that
# features depend on the order of letters and not only on which letters there are.
DEBUG_POSITION_STD = 3.0


class TextEncoder:
    """UMT5's encoder with its tokenizer; `truncated` counts the captions that were longer than max_length."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` is a UMT5EncoderModel; ValueError when its embedding table was not loaded."""
        check_embeddings(model)
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.truncated = 0
        self.dim: int = model.config.d_model
        # What the tokenizer makes of a text that uses all kinds of characters stands for its vocabulary.
        probe = tokenizer(["A cat, 一只猫 №7 \u00e9\U0001f600", ""]).input_ids
        settings = f"{type(tokenizer).__name__} {len(tokenizer)} {probe}"
        self.fingerprint = fingerprint("umt5", model.state_dict(), settings)

    @classmethod
    def open(
        cls,
        encoder: Path,
        tokenizer: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        """Return the encoder of two local folders (weights with config.json; tokenizer); nothing is fetched.

        Raises ValueError when a folder is not there, holds something else or holds incomplete weights.
        """
        for folder, kind, needed in (
            (encoder, "encoder", "config.json"),
            (tokenizer, "tokenizer", "tokenizer_config.json"),
        ):
            if not (folder / needed).is_file():
                raise ValueError(f"{folder} is no text {kind} folder: it has no {needed}")
        try:
            model, report = UMT5EncoderModel.from_pretrained(
                encoder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
            words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"cannot open the text encoder {encoder}: {' '.join(str(error).split())}"
            ) from error
        # The table has two names and a file need hold only one; check_embeddings proves that they are tied.
        missing = sorted(set(report["missing_keys"]) - {"encoder.embed_tokens.weight"})
        if missing:
            raise ValueError(f"{encoder} lacks {len(missing)} tensors of UMT5's encoder, first {missing[0]}")
        return cls(model.to(device), words)

    @classmethod
    def debug(cls, seed: int = 0, dim: int = 64) -> "TextEncoder":
        """Return a tiny encoder of random weights (2 layers, 4 heads, tokens are bytes); no download.

        A pure function of (seed, dim). Raises ValueError unless dim is a positive multiple of 4.
        """
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a positive multiple of 4; given: {dim}")
        tokenizer = ByT5Tokenizer()
        config = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=dim,
            d_kv=dim // 4,
            d_ff=2 * dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
        with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
            model = UMT5EncoderModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                    continue
                parameter.normal_(generator=generator_at(seed, "debug text", name))
                parameter.mul_(_debug_std(name, parameter, config))
        return cls(model, tokenizer)

    def encode(self, texts: Sequence[str], max_length: int) -> list[Tensor]:
        """Return each caption's features, float32 [S_true, dim] on the CPU; S_true counts tokens and end.

        Captions are cleaned by `clean_prompt` and cut to `max_length` tokens (512 for Wan); the empty one
        gives one row. A caption's features do not depend on the others.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1; given: {max_length}")
        if not texts:
            return []
        cleaned = [clean_prompt(text) for text in texts]
        self.truncated += sum(
            len(ids) > max_length for ids in self._tokenizer(cleaned, verbose=False).input_ids
        )
        tokens = self._tokenizer(
            cleaned, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            hidden = self._model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [rows[:length].float().cpu().clone() for rows, length in zip(hidden, lengths, strict=True)]


def clean_prompt(text: str) -> str:
    """Return `text` as Wan's tokenizer wants it: repaired (ftfy), HTML entities undone twice, one line."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", repaired).strip()


def check_embeddings(model: Any) -> None:
    """Raise ValueError unless the UMT5EncoderModel's embedding table is filled and its encoder reads it.

    transformers 5 can load Wan's text encoder with a table of zeros, because the checkpoint stores it under
    one of its two names; captions would then hardly differ.
    """
    table = model.shared.weight
    if model.encoder.embed_tokens.weight.data_ptr() != table.data_ptr():
        raise ValueError(
            "the text encoder reads another embedding table than shared.weight: its weights were not tied"
        )
    spread = table.float().std().item()
    if not spread > SMALLEST_STD:
        raise ValueError(f"the text encoder's embedding table is empty (standard deviation {spread:g})")


def _debug_std(name: str, parameter: Tensor, config: Any) -> float:
    """Return the scale of a random weight: every layer keeps the size of what it is given."""
    if "shared" in name or "embed_tokens" in name:
        return 1.0
    if "relative_attention_bias" in name:
        return DEBUG_POSITION_STD
    if name.endswith("SelfAttention.q.weight"):
        # UMT5 does not divide the logits by sqrt(d_kv), so its queries are smaller by that.
        return float((config.d_model * config.d_kv) ** -0.5)
    return float(parameter.shape[1] ** -0.5)
