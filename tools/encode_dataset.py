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
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan.cli import UserError, parse, run
from megawan.data.encoding import REJECTED, Report, encode
from megawan.data.manifest import read_manifest
from megawan.data.ranks import Ranks
from megawan.dist import tasks
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
        size = checked_size(options, options.variant)
        for name in ("batch", "rank_timeout"):
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
        encoders = open_encoders(
            options, options.variant, default_device(place.local_rank), options.batch > 1
        )
        rows = len(manifest.rows[share::shares])
        captions_cut: list[int] = []

        def gather(done: dict[str, Any]) -> list[dict[str, Any]] | None:
            # Ranks of one share of a job array do not meet: a last call finds what all shares made.
            told = (
                ranks.gather({**done, "captions_cut": encoders.text.truncated}) if ranks is not None else None
            )
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
                encoders.codec,
                encoders.codec_name,
                encoders.text,
                size,
                encoders.text_len,
                device=encoders.device,
                conditions=encoders.conditions,
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
        cut = sum(captions_cut) if ranks is not None else encoders.text.truncated
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


def default_device(local_rank: int) -> str:
    """Return the GPU of this rank of its machine, the CPU where there is none; ranks may share a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def parse_share(text: str) -> tuple[int, int]:
    """Return (I, N) of --shard I/N. Raises ValueError unless 0 <= I < N."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"--shard {text} must be I/N with I from 0 to N-1")
    return int(first), int(second)


def rank_of_this() -> int:
    """Return this process's rank, 0 where the launcher's variables make no sense: main will say so."""
    try:
        return tasks().rank
    except ValueError:
        return 0


if __name__ == "__main__":
    run(main, PROG, rank=rank_of_this())
