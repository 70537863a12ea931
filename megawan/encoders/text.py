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
from megawan.encoders.original import load_renamed, read_tensors, require_complete
from megawan.rng import generator_at

# The real encoder's table has a standard deviation near 1; a table that was never filled has exactly 0.
SMALLEST_STD = 1e-6
# Where the tokenizer is: in Wan's repositories beside the encoder's file, in diffusers' beside its folder.
BESIDE_FILE = ("google/umt5-xxl", "umt5-xxl", ".")
BESIDE_FOLDER = (".", "../tokenizer")
# The debug encoder's bias by relative position: wide enough that each head looks at few places, so that
# features depend on the order of letters and not only on which letters there are.
DEBUG_POSITION_STD = 3.0


class TextEncoder:
    """UMT5's encoder with its tokenizer; `truncated` counts the captions that were longer than max_length."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` is a UMT5EncoderModel; ValueError when its embedding table was not loaded, or when the
        tokenizer is another's."""
        check_embeddings(model)
        check_tokenizer(model, tokenizer)
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
        tokenizer: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        """Return the encoder of a transformers folder or of Wan's models_t5_umt5-xxl-enc-bf16.pth.

        `tokenizer` is a folder (spiece.model or tokenizer.json); None looks where Wan's repositories and
        diffusers' folders have it. Nothing is fetched and no code in a .pth is run. Raises ValueError when
        one of them is not there, holds something else or incomplete weights.
        """
        if not encoder.exists():
            raise ValueError(f"{encoder} is no text encoder folder or file: it does not exist")
        words = _open_tokenizer(tokenizer or _find_tokenizer(encoder))
        try:
            model = _from_folder(encoder, dtype) if encoder.is_dir() else _from_file(encoder)
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"cannot open the text encoder {encoder}: {' '.join(str(error).split())}"
            ) from error
        return cls(model.to(device=device, dtype=dtype), words)

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


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raise ValueError unless `tokenizer` can be the UMT5EncoderModel's: vocabulary, padding, end of text."""
    rows, words = model.config.vocab_size, len(tokenizer)
    if not rows // 2 < words <= rows:
        raise ValueError(
            f"the tokenizer has {words} words and the text encoder {rows}: they do not belong together"
        )
    if tokenizer.pad_token_id != 0 or tokenizer("").input_ids != [1]:
        raise ValueError(
            "the tokenizer is not UMT5's: an empty text gives"
            f" {tokenizer('').input_ids} padded by {tokenizer.pad_token_id}, not [1] padded by 0"
        )


def rename_key(key: str) -> str:
    """Return transformers' name for the tensor `key` of Wan's UMT5 file."""
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)
TIED = "encoder.embed_tokens.weight"  # the second name of shared.weight; a file need hold only one


def _from_folder(path: Path, dtype: torch.dtype) -> Any:
    if not (path / "config.json").is_file():
        raise ValueError("the folder has no config.json (give the text_encoder/ folder of a diffusers model)")
    model, report = UMT5EncoderModel.from_pretrained(
        path, local_files_only=True, dtype=dtype, output_loading_info=True
    )
    # check_embeddings proves that the two names are one table.
    require_complete(sorted(set(report["missing_keys"]) - {TIED}), [])
    return model


def _from_file(path: Path) -> Any:
    """Return the encoder of Wan's UMT5 file, whose sizes are read off its tensors: it has no config."""
    tensors = {rename_key(key): value for key, value in read_tensors(path).items()}
    first = "encoder.block.0.layer"
    sizes = (
        "shared.weight",
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    require_complete([key for key in sizes if key not in tensors], [])
    words, width = tensors[sizes[0]].shape
    buckets, heads = tensors[sizes[1]].shape
    config = UMT5Config(
        vocab_size=words,
        d_model=width,
        d_kv=len(tensors[sizes[2]]) // heads,
        d_ff=len(tensors[sizes[3]]),
        num_layers=1 + max(int(key.split(".")[2]) for key in tensors if ".block." in key),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    load_renamed(model, {**tensors, TIED: tensors["shared.weight"]})
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _find_tokenizer(encoder: Path) -> Path:
    folder = encoder if encoder.is_dir() else encoder.parent
    for place in BESIDE_FOLDER if encoder.is_dir() else BESIDE_FILE:
        if (folder / place / "tokenizer_config.json").is_file():
            return folder / place
    raise ValueError(f"there is no tokenizer with {encoder}; name its folder with --tokenizer")


def _open_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} is no text tokenizer folder: it has no tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"cannot open the tokenizer {folder}: {' '.join(str(error).split())}") from error


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
