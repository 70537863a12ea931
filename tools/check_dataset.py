"""Look at videos and captions before GPUs are spent on them: what each clip becomes, what is wrong with it.

    python tools/check_dataset.py --input my_videos --variant t2v-14B --bucket auto --tokenizer umt5-xxl

Give it the size, length and window flags of tools/encode_dataset.py: it decides as the encoder will.

Exit code: 0 all would be encoded, 1 a clip would be dropped or a caption cut, 2 it cannot tell.

Notes (black, static, repeated, enlarged, cropped, cuts) are yours to judge; --strict makes them 1 too.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

from tqdm import tqdm

from megawan.cli import UserError, parse, run
from megawan.data.cutting import CutOptions, clip_size
from megawan.data.inspection import check
from megawan.data.inspection_report import Layout, described, draw_histogram, summarise, summary_lines, table
from megawan.data.manifest import read_manifest
from megawan.models.variants import get_variant
from megawan.plan import model_shape

PROG = "tools/check_dataset.py"
ALIASES = {
    "dataset_base_path": "root",
    "dataset_metadata_path": "input",
    "max_pixels": "max_area",
    "frame_stride": "window_stride",
    "target_frames": "num_frames",
    "bucket_reso_steps": "bucket_step",
    "video_sample_n_frames": "num_frames",
    "gradient_accumulation_steps": "accumulation",
}


@dataclass(frozen=True, kw_only=True)
class Options(CutOptions):
    """Which clips, what they shall become, and the layout that will train on them."""

    input: Path
    """metadata.csv/.json/.jsonl, a folder that holds one, or a folder of clips with .txt captions."""
    root: Path | None = None
    """Folder that relative paths start at; default: the manifest's own."""
    allow_outside_root: bool = False
    """Let the manifest name files outside that folder."""
    variant: str = "t2v-14B"
    """Which Wan will be trained: its VAE decides the multiples of sizes, its width what a step costs."""
    tokenizer: str | None = None
    """Folder of the text encoder's tokenizer, or debug; without it the length of captions is not checked."""
    micro_batch: int = 1
    """Videos of a rank in one forward pass, as the training will have them."""
    accumulation: int = 1
    """Forward passes of an optimizer step."""
    dp_size: int = 8
    """Data-parallel ranks: GPUs / (ulysses_degree x ring_degree)."""
    cp_size: int = 1
    """Ranks that share one video: ulysses_degree x ring_degree."""
    shape_group: int = 0
    """Samples in a row that have one shape (the training's --data.shape_group); 0: all of a step."""
    show: Literal["all", "problems"] = "all"
    """Rows of the table: every clip, or only those with something to say."""
    histogram: Path | None = None
    """Write the buckets as a picture to this .png."""
    json: bool = False
    """Print one JSON document instead of the tables."""
    strict: bool = False
    """Exit with 1 for notes too, not only for what would be dropped or cut."""
    workers: int = 0
    """Processes that read files at the same time; 0 reads in this one."""


def main(argv: Sequence[str]) -> None:
    """Check as `argv` says; exits with 1 when something would be dropped.

    Raises UserError when it cannot tell.
    """
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").strip(), aliases=ALIASES)
    try:
        layout = Layout(
            options.micro_batch,
            options.accumulation,
            options.dp_size,
            options.cp_size,
            options.shape_group,
        )
        if options.workers < 0:
            raise ValueError(f"--workers {options.workers} must be 0 or more")
        if options.histogram is not None and options.histogram.suffix.lower() != ".png":
            raise ValueError(f"--histogram {options.histogram} must end in .png")
        if options.histogram is not None and not options.histogram.parent.is_dir():  # not after hours
            raise ValueError(f"--histogram {options.histogram}: no folder {options.histogram.parent}")
        variant = get_variant(options.variant)
        size = clip_size(options, variant.vae_stride, still_images=variant.task != "flf2v")
        manifest = read_manifest(
            options.input, root=options.root, allow_outside_root=options.allow_outside_root
        )
        if not options.json:
            print(f"found {manifest.found}")
        with tqdm(total=len(manifest.rows), desc="check", unit="clip", disable=None) as bar:
            found = check(
                manifest,
                size,
                variant.vae_stride,
                count_tokens=token_counter(options.tokenizer),
                text_len=variant.config.text_len,
                workers=options.workers,
                tick=bar.update,
            )
        summary = {
            "input": str(options.input),
            "variant": options.variant,
            **summarise(found, layout, model_shape(variant.config)),
        }
        if options.histogram is not None:
            draw_histogram(found, str(options.input)).save(options.histogram)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    if options.json:
        clips = [described(checked) for checked in found]
        print(json.dumps({"format": "megawan-check", "version": 1, **summary, "clips": clips}, indent=2))
    else:
        print("\n".join([*table(found, options.show == "all"), *summary_lines(summary)]))
    if summary["dropped"] or summary["captions_cut"] or (options.strict and summary["noted"]):
        sys.exit(1)


def token_counter(tokenizer: str | None) -> Callable[[str], int] | None:
    """Return what counts a caption's tokens as the encoder will. Raises ValueError without the files."""
    if tokenizer is None:
        return None
    from transformers import AutoTokenizer, ByT5Tokenizer  # seconds, and only this flag needs it

    from megawan.encoders.text import clean_prompt

    if tokenizer == "debug":
        words: Any = ByT5Tokenizer()
    else:
        if not Path(tokenizer, "tokenizer_config.json").is_file():
            raise ValueError(f"--tokenizer {tokenizer}: no tokenizer_config.json there")
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return lambda text: len(words(clean_prompt(text), verbose=False).input_ids)


if __name__ == "__main__":
    run(main, PROG)
