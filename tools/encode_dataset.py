"""Encode videos and captions into a latent store that training reads; interrupted, it goes on from there.

    python tools/encode_dataset.py --input my_videos --output my_latents --vae Wan2.1_VAE.pth \\
        --text_encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan.cli import UserError, parse, run
from megawan.data.encoding import REJECTED, Report, encode
from megawan.data.manifest import read_manifest
from megawan.encode_options import EncodeOptions, checked_size, open_encoders

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


@dataclass(frozen=True, kw_only=True)
class Options(EncodeOptions):
    """Which clips, by which encoders, to which size."""

    input: Path
    """metadata.csv/.json/.jsonl, a folder that holds one, or a folder of clips with .txt captions."""
    output: Path
    """Folder of the latent store."""
    variant: str | None = None
    """The Wan that will train on this: stores what its image conditions are made of; default: text only."""
    shard: str = "0/1"
    """I/N: encode only share I (from 0) of N, in a job array; a last call without it finishes the store."""


def main(argv: Sequence[str]) -> None:
    """Encode as `argv` says. Raises UserError naming file or flag and cause."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0], aliases=ALIASES)
    try:
        size = checked_size(options)
        share = parse_share(options.shard)
        manifest = read_manifest(
            options.input, root=options.root, allow_outside_root=options.allow_outside_root
        )
        print(f"found {manifest.found}")
        encoders = open_encoders(options, options.variant, "cuda" if torch.cuda.is_available() else "cpu")
        rows = len(manifest.rows[share[0] :: share[1]])
        with tqdm(total=rows, desc="encode", unit="clip", disable=None) as bar:

            def tick(report: Report) -> None:
                made, rejected = report.encoded + report.kept, len(report.rejected)
                bar.set_postfix(samples=made, rejected=rejected, refresh=False)
                bar.update()

            report = encode(
                manifest,
                options.output,
                encoders.codec,
                encoders.codec_name,
                encoders.text,
                size,
                encoders.text_len,
                device=encoders.device,
                conditions=encoders.conditions,
                share=share,
                shard_bytes=options.shard_mib << 20,
                tick=tick,
            )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    done = f"{report.encoded} encoded" if report.encoded else "nothing to do"
    end = (
        report.store.describe()
        if report.store
        else f"share {options.shard} of {options.output}, no index yet"
    )
    cut = encoders.text.truncated
    print(f"{done}, {report.kept} kept, {len(report.rejected)} rejected, {cut} captions cut; {end}")
    if report.cut_short:
        print(f"{len(report.cut_short)} clips are damaged behind their last sample")
    if report.store and (report.rejected or report.cut_short):
        print(f"the rejected clips and why: {options.output / REJECTED}")


def parse_share(text: str) -> tuple[int, int]:
    """Return (I, N) of --shard I/N. Raises ValueError unless 0 <= I < N."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"--shard {text} must be I/N with I from 0 to N-1")
    return int(first), int(second)


if __name__ == "__main__":
    run(main, PROG)
