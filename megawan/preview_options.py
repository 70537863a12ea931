"""What to sample while training, and whether it can be: known before anything that samples is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Codec = Literal["auto", "dct", "wan2.1", "wan2.2"]


@dataclass(frozen=True)
class PreviewOptions:
    """Videos sampled while training."""

    every: int = 0
    """Optimizer steps between two samplings, the end included; 0: none."""
    prompts: tuple[str, ...] = ()
    """Captions to sample (text-to-video; needs --sample.text_encoder); default: captions, and images where
    the variant takes them, of stored samples: the held-out ones if there are any."""
    count: int = 4
    """How many stored samples to take."""
    steps: int = 20
    """Euler steps."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 turns it off."""
    shift: float | None = None
    """Shift of the sigma grid (default: --flow.shift)."""
    seed: int = 0
    """Seed of the start noise, of which each video has its own."""
    codec: Codec = "auto"
    """Video codec that decodes; auto: the one that made the latents."""
    vae: Path | None = None
    """Its weights (not for dct)."""
    text_encoder: str | None = None
    """UMT5 folder or file for --sample.prompts, or debug for the seeded tiny one; rank 0 loads it once, on
    its CPU, before the first step."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; default: beside the encoder."""
    fps: int = 16
    """Frames a second of the files."""


def check(
    options: PreviewOptions, *, codec: str, channels: int, text_only: bool, expert: str | None, variant: str
) -> None:
    """Raise ValueError for what could not be sampled or decoded. `codec`: the one that made the latents;
    `channels`: latent channels; `text_only`: whether captions are all that the variant takes."""
    if options.every < 0:
        raise ValueError(f"--sample.every {options.every} must be 0 (none) or more")
    if not options.every:
        if options.prompts:
            raise ValueError("--sample.prompts has no effect without --sample.every N")
        return
    for name in ("count", "steps", "fps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--sample.{name} {getattr(options, name)} must be 1 or more")
    if expert is not None:
        raise ValueError(
            f"--sample.every: {variant} is one expert of two, which makes no video alone; sample both from"
            " their checkpoints with tools/sample.py"
        )
    if options.prompts and not text_only:
        raise ValueError(
            f"--sample.prompts: {variant} takes images too; leave it out and stored samples are taken"
        )
    if options.prompts and options.text_encoder is None:
        raise ValueError("--sample.prompts needs --sample.text_encoder, the UMT5 that encoded the store")
    for name in ("text_encoder", "tokenizer", "vae"):
        path = getattr(options, name)
        if path not in (None, "debug") and not Path(path).exists():
            raise ValueError(f"--sample.{name} {path}: no such file or folder")
    chosen = chosen_codec(options, codec)
    if chosen == "dct" and channels != 16:
        raise ValueError(f"--sample.codec dct decodes 16 latent channels, {variant} has {channels}")
    if chosen != "dct" and options.vae is None:
        raise ValueError(f"--sample.every needs --sample.vae, the weights of the codec {chosen}")
    if chosen == "dct" and options.vae is not None:
        raise ValueError("--sample.vae: the codec dct has no weights; leave it out")


def chosen_codec(options: PreviewOptions, codec: str) -> str:
    """Return the codec that decodes what `codec` made (synthetic latents count as dct)."""
    return codec if options.codec == "auto" else options.codec
