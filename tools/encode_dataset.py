"""Encode videos and captions into a latent store that training reads; interrupted, it goes on from there.

    python tools/encode_dataset.py --input my_videos --output my_latents --vae Wan2.1_VAE.pth \\
        --text_encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl

On several GPUs: torchrun --nproc_per_node 8 tools/encode_dataset.py ..., or srun (docs/data.md).
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan.cli import UserError, parse, run
from megawan.conditions import ImageConditions, open_conditions
from megawan.data.cutting import CODEC_STRIDES, CutOptions, clip_size
from megawan.data.encoding import REJECTED, Report, encode
from megawan.data.manifest import read_manifest
from megawan.data.ranks import Ranks
from megawan.dist import tasks
from megawan.encoders.codec import VideoCodec
from megawan.encoders.opening import open_codec
from megawan.encoders.text import TextEncoder
from megawan.models.variants import get_variant

PROG = "tools/encode_dataset.py"
ALIASES = {
    "dataset_base_path": "root",
    "dataset_metadata_path": "input",
    "output_path": "output",
    "max_pixels": "max_area",  # DiffSynth-Studio
    "frame_stride": "window_stride",  # musubi-tuner
    "target_frames": "num_frames",
    "bucket_reso_steps": "bucket_step",
    "video_sample_n_frames": "num_frames",  # VideoX-Fun
}
WAN_TEXT_LEN = 512


@dataclass(frozen=True, kw_only=True)
class Options(CutOptions):
    """Which clips, by which encoders, to which size."""

    input: Path
    """metadata.csv/.json/.jsonl, a folder that holds one, or a folder of clips with .txt captions."""
    output: Path
    """Folder of the latent store."""
    root: Path | None = None
    """Folder that relative paths start at; default: the manifest's own."""
    allow_outside_root: bool = False
    """Let the manifest name files outside that folder."""
    codec: Literal["dct", "wan2.1", "wan2.2"] = "wan2.1"
    """Video encoder: Wan's VAEs (2.2 for ti2v-5B), or dct, the weightless demo codec."""
    vae: Path | None = None
    """Weights of the VAE: Wan2.1_VAE.pth, Wan2.2_VAE.pth or a diffusers folder; not for dct."""
    vae_tile: int | None = None
    """Encode in tiles of so many pixels (64n) where memory is short; the latents differ; default none."""
    variant: str | None = None
    """The Wan that will train on this: stores what its image conditions are made of; default: text only."""
    image_encoder: str | None = None
    """For Wan2.1's i2v and flf2v: its CLIP file, an image_encoder folder, or debug for a seeded tiny one."""
    text_encoder: str = "debug"
    """Folder or file of the UMT5 encoder, or debug for the seeded tiny one of the debug variants."""
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the UMT5 encoder; bfloat16 is what Wan's authors use. The debug one is float32."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; default: in, beside or under google/umt5-xxl with the encoder."""
    text_len: int | None = None
    """Longest caption in tokens; default 512, and 32 for the debug encoder."""
    shard_mib: int = 1024
    """Size of the store's files in MiB; a kill loses at most the one that was being filled."""
    shard: str = "0/1"
    """I/N: encode only share I (from 0) of N, in a job array; a last call without it finishes the store.
    Under torchrun or srun the ranks divide the share again."""
    rank_timeout: float = 1800.0
    """Under torchrun or srun: seconds without a sign of life after which a rank counts as dead."""
    workers: int = 2
    """Threads that decode ahead of the encoders; 0 decodes in between. It changes no byte."""
    batch: int = 1
    """Samples of one size that are encoded together; above 1 their last bits differ and the store says so."""


def main(argv: Sequence[str]) -> None:
    """Encode as `argv` says. Raises UserError naming file or flag and cause."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0], aliases=ALIASES)
    ranks: Ranks | None = None
    try:
        place = tasks()
        size = clip_size(
            options, CODEC_STRIDES[options.codec], still_images=takes_still_images(options.variant)
        )
        for name in ("shard_mib", "batch", "rank_timeout"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)} must be 1 or more")
        if options.workers < 0:
            raise ValueError(f"--workers {options.workers} must be 0 or more")
        share, shares = parse_share(options.shard)
        finishes = shares == 1  # a share of a job array leaves the index to a last call
        share, shares = share + shares * place.rank, shares * place.world_size
        manifest = read_manifest(
            options.input, root=options.root, allow_outside_root=options.allow_outside_root
        )
        if place.rank == 0:
            print(f"found {manifest.found}", flush=True)
        if place.world_size > 1 and finishes:
            ranks = Ranks(options.output, place.rank, place.world_size, options.rank_timeout)
        device = pick_device(place.local_rank)
        codec = open_codec(options.codec, options.vae, device, options.vae_tile, options.batch > 1)
        conditions = open_image(options, codec, device)
        text, text_len = open_text(options, device)
        rows = len(manifest.rows[share::shares])
        captions_cut: list[int] = []

        def gather(done: dict[str, Any]) -> list[dict[str, Any]] | None:
            # Ranks of one share of a job array do not meet: a last call finds what all shares made.
            told = ranks.gather({**done, "captions_cut": text.truncated}) if ranks is not None else None
            captions_cut.extend(one["captions_cut"] for one in told or [])
            return told

        begun = time.monotonic()
        with tqdm(total=rows, desc="encode", unit="clip", disable=True if place.rank else None) as bar:

            def tick(report: Report) -> None:
                made, rejected = report.encoded + report.kept, len(report.rejected)
                bar.set_postfix(samples=made, rejected=rejected, refresh=False)
                bar.update()
                if ranks is not None:
                    ranks.beat()

            report = encode(
                manifest,
                options.output,
                codec,
                options.codec,
                text,
                size,
                text_len,
                device=device,
                conditions=conditions,
                share=(share, shares),
                gather=gather if place.world_size > 1 else None,
                shard_bytes=options.shard_mib << 20,
                batch=options.batch,
                workers=options.workers,
                tick=tick,
            )
    except (ValueError, OSError) as error:
        if ranks is not None:
            with contextlib.suppress(OSError):
                ranks.fail(str(error))
        raise UserError(str(error)) from None
    if ranks is None or place.rank == 0:
        cut = sum(captions_cut) if ranks is not None else text.truncated
        where = f"share {share}/{shares} of {options.output}, no index yet"
        print(summary(options, report, where, cut, time.monotonic() - begun))


def summary(options: Options, report: Report, where: str, captions_cut: int, seconds: float) -> str:
    """Return the last lines: what was made, `where` if it is no whole store, how fast, and what was not."""
    done = f"{report.encoded} encoded" if report.encoded else "nothing to do"
    end = report.store.describe() if report.store else where
    lines = [
        f"{done}, {report.kept} kept, {len(report.rejected)} rejected, {captions_cut} captions cut; {end}"
    ]
    if report.encoded:
        rate = f"{report.encoded / seconds:.3g} samples/s"
        lines.append(f"{seconds:.1f} s, {rate}; the encoders waited {report.waited:.1f} s for frames")
    if report.cut_short:
        lines.append(f"{len(report.cut_short)} clips are damaged behind their last sample")
    if report.store and (report.rejected or report.cut_short):
        lines.append(f"the rejected clips and why: {options.output / REJECTED}")
    return "\n".join(lines)


def pick_device(local_rank: int) -> torch.device:
    """Return the GPU of this rank of its machine, the CPU where there is none; ranks may share a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def parse_share(text: str) -> tuple[int, int]:
    """Return (I, N) of --shard I/N. Raises ValueError unless 0 <= I < N."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"--shard {text} must be I/N with I from 0 to N-1")
    return int(first), int(second)


def takes_still_images(variant: str | None) -> bool:
    """Return whether a model can learn from one frame: not one that is given the first and the last."""
    return variant is None or get_variant(variant).task != "flf2v"


def open_image(options: Options, codec: VideoCodec, device: torch.device) -> ImageConditions | None:
    """Return what makes the image conditions of --variant, None where it has none."""
    if options.variant is None:
        if options.image_encoder is not None:
            raise ValueError("--image_encoder is for image-to-video models: name one with --variant")
        return None
    return open_conditions(get_variant(options.variant), codec, options.image_encoder, device)


def open_text(options: Options, device: torch.device) -> tuple[TextEncoder, int]:
    """Return the text encoder and its longest caption in tokens."""
    if options.text_encoder == "debug":
        wan = get_variant("debug").config
        text, default = TextEncoder.debug(dim=wan.text_dim), wan.text_len
    else:
        dtype = getattr(torch, options.text_dtype)
        text = TextEncoder.open(Path(options.text_encoder), options.tokenizer, device, dtype)
        default = WAN_TEXT_LEN
    length = options.text_len or default
    if length < 1:
        raise ValueError(f"--text_len {length} must be 1 or more")
    return text, length


def rank_of_this() -> int:
    """Return this process's rank, 0 where the launcher's variables make no sense: main will say so."""
    try:
        return tasks().rank
    except ValueError:
        return 0


if __name__ == "__main__":
    run(main, PROG, rank=rank_of_this())
