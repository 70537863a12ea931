"""Sample videos from captions: Euler steps with classifier-free guidance, decoded to mp4, with one contact
sheet.

    python tools/sample.py --weights my_model --prompts "a red circle moving right" --output samples
    python tools/sample.py --weights my_model --store my_latents --captions 12 --dataset my_videos \\
        --untrained --output samples

Give --store to take size, codec and text encoder from the latents that the model was trained on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
from tqdm import tqdm

from megawan.cli import UserError, parse, run
from megawan.contact_sheet import Row, contact_sheet
from megawan.data.batch import pad_text
from megawan.data.manifest import read_manifest
from megawan.data.video import BadClip, Frames, read_clip, write_mp4
from megawan.encoders.codec import VideoCodec
from megawan.encoders.opening import open_codec
from megawan.encoders.text import TextEncoder
from megawan.plan import latent_shape
from megawan.rng import generator_at
from megawan.sampling import build, open_model_weights, random_weights, sample_latents, to_frames

PROG = "tools/sample.py"


@dataclass(frozen=True)
class Options:
    """What to sample, from which weights, and how."""

    weights: Path
    """Exported or original weights, a run folder or a step folder."""
    output: Path
    """Folder for the mp4 files, contact_sheet.png and samples.json."""
    ema: bool = False
    """Sample the moving average that a run with --ema.decay keeps, not the trained weights."""
    prompts: tuple[str, ...] = ()
    """Captions to sample."""
    dataset: Path | None = None
    """Videos with captions (metadata.csv ...): its captions are sampled, and each real clip is shown
    beside."""
    captions: int = 12
    """How many different captions of --dataset to take."""
    untrained: int | None = None
    """Seed: also sample from the random weights that a run of this seed starts from, for comparison."""
    codec: Literal["dct", "wan2.1", "wan2.2"] = "wan2.1"
    """Video codec of the latents; dct is the weightless demo codec."""
    vae: Path | None = None
    """Weights of the codec (not for dct)."""
    text_encoder: str = "debug"
    """Folder of a UMT5 encoder, or debug for the seeded tiny one."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; default: beside the encoder."""
    num_frames: int = 81
    """Frames, 4n+1."""
    height: int = 480
    """Pixel height."""
    width: int = 832
    """Pixel width."""
    fps: int = 16
    """Frames a second of the files."""
    steps: int = 50
    """Euler steps."""
    shift: float = 5.0
    """Shift of the sigma grid."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 turns it off."""
    seed: int = 0
    """Seed of the start noise; sample i depends on (seed, i) alone."""


def main(argv: Sequence[str]) -> None:
    """Sample as `argv` says. Raises UserError naming file or flag and cause."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        sample(options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


def sample(options: Options) -> None:
    """Sample, write and say where. Raises ValueError or OSError for whatever does not fit."""
    if options.output.exists() and any(options.output.iterdir()):
        raise ValueError(f"--output {options.output}: exists and is not empty; give a new folder")
    prompts, clips = chosen_captions(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, wan, variant = open_model_weights(options.weights, "ema" if options.ema else "master")
    codec = open_codec(options.codec, options.vae, device)
    if codec.latent_channels != wan.out_dim:
        raise ValueError(
            f"--codec {options.codec} has {codec.latent_channels} channels, the model {wan.out_dim}"
        )
    shape = latent_shape(
        options.num_frames, options.height, options.width, codec.latent_channels, codec.stride, wan.patch_size
    )
    text, empty = text_features(options, prompts, wan.text_len, wan.text_dim, device)
    models = {"trained": source}
    if options.untrained is not None:
        models = {"untrained": random_weights(variant, options.untrained)[0], **models}
    sampled = {}
    for name, weights in models.items():
        model = build(weights, wan, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        with tqdm(total=options.steps, desc=name, unit="step", disable=None) as bar:
            latents = sample_latents(
                model,
                text,
                empty,
                shape,
                steps=options.steps,
                shift=options.shift,
                guidance=options.guidance,
                seed=options.seed,
                tick=bar.update,
            )
        sampled[name] = decode(codec, latents)
    write(options, prompts, clips, sampled)


def chosen_captions(options: Options) -> tuple[list[str], list[Path | None]]:
    """Return the captions and, for those of a dataset, a real clip each."""
    if bool(options.prompts) == (options.dataset is not None):
        raise ValueError("give either --prompts or --dataset")
    if options.dataset is None:
        return list(options.prompts), [None] * len(options.prompts)
    first_clip: dict[str, Path] = {}
    for row in read_manifest(options.dataset).rows:
        first_clip.setdefault(row.prompt, row.path)
    captions = sorted(first_clip)
    # A fixed shuffle: evenly spaced captions of a sorted list can all share a word.
    shuffle = torch.randperm(len(captions), generator=generator_at(0, "captions")).tolist()
    picked = [captions[index] for index in sorted(shuffle[: options.captions])]
    return picked, [first_clip[caption] for caption in picked]


def text_features(
    options: Options, prompts: list[str], text_len: int, text_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [B, S, text_dim] of the captions and [S, text_dim] of the empty one, zero-padded."""
    if options.text_encoder == "debug":
        encoder = TextEncoder.debug(dim=text_dim)
    else:
        encoder = TextEncoder.open(Path(options.text_encoder), options.tokenizer)
    features = [pad_text(rows, text_len) for rows in encoder.encode([*prompts, ""], text_len)]
    return torch.stack(features[:-1]).to(device), features[-1].to(device)


def decode(codec: VideoCodec, latents: torch.Tensor) -> list[torch.Tensor]:
    """Return each sample's frames, uint8 [T, H, W, 3], decoded one at a time."""
    return [to_frames(codec.decode(one.unsqueeze(0)))[0] for one in latents]


def write(
    options: Options, prompts: list[str], clips: list[Path | None], sampled: dict[str, list[torch.Tensor]]
) -> None:
    """Write an mp4 a sample, the contact sheet and samples.json, and say where they are."""
    options.output.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, videos in sampled.items():
        for index, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
            file = options.output / f"{name}_{index:02d}.mp4"
            write_mp4(file, frames.numpy(), options.fps)
            entries.append({"weights": name, "prompt": prompt, "file": file.name})
    columns = [*(["real"] if any(clips) else []), *sampled]
    rows = []
    for index, prompt in enumerate(prompts):
        shown: list[Frames | None] = [videos[index].numpy() for videos in sampled.values()]
        if any(clips):
            shown.insert(0, real_clip(clips[index], options))
        rows.append(Row(prompt, shown))
    sheet = options.output / "contact_sheet.png"
    contact_sheet(columns, rows).save(sheet)
    (options.output / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print(f"sampled {len(entries)} videos into {options.output}; look at {sheet}")


def real_clip(path: Path | None, options: Options) -> Frames | None:
    """Return the real clip at the samples' size, None where it cannot be read."""
    if path is None:
        return None
    try:
        return read_clip(path, options.num_frames, options.height, options.width, options.fps)
    except BadClip:
        return None


if __name__ == "__main__":
    run(main, PROG)
