"""Sample videos from captions, and from images where the variant takes them, into mp4 files and one contact
sheet.

    python tools/sample.py --weights Wan2.1-T2V-1.3B --vae Wan2.1_VAE.pth --text_encoder umt5.pth \\
        --prompts "a red fox in snow" --output samples
    python tools/sample.py --weights runs/high --low_weights runs/low --image first.png ...   # I2V-A14B
    torchrun --nproc_per_node 8 tools/sample.py --ulysses_degree 8 ...                 # one video, 8 GPUs

Steps, shift, guidance and size are the authors' settings for the variant unless given.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of tools/

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from megawan import dist
from megawan.cli import UserError, parse, run
from megawan.contact_sheet import Row, contact_sheet
from megawan.data.manifest import read_manifest
from megawan.data.video import BadClip, Frames, read_clip, write_mp4
from megawan.encoders.opening import open_codec
from megawan.parallel.context import ContextParallel
from megawan.parallel.topology import Topology, validate
from megawan.rng import generator_at
from megawan.sample_settings import (
    EncoderOptions,
    Images,
    SampleOptions,
    Settings,
    check_encoders,
    check_images,
    codec_name,
    encode_images,
    given_shapes,
    open_text,
    resolve,
    text_features,
)
from megawan.sampling import Experts, Given, build, random_weights, sample_latents, to_frames

PROG = "tools/sample.py"


@dataclass(frozen=True)
class Options:
    """What to sample, from which weights, and how."""

    weights: Path
    """Exported or original weights, a run folder or a step folder; of an A14B the high-noise expert, or a
    folder that holds both."""
    output: Path
    """New folder for the mp4 files, contact_sheet.png and samples.json."""
    low_weights: Path | None = None
    """The low-noise expert of an A14B."""
    variant: str | None = None
    """Which Wan the weights are, where several have one architecture (i2v-14B-480P and -720P)."""
    ema: bool = False
    """Sample the moving average that a run with --ema.decay keeps, not the trained weights."""
    prompts: tuple[str, ...] = ()
    """Captions to sample."""
    negative_prompt: str = ""
    """What guidance pushes away from; the authors of Wan give theirs in their own configuration."""
    image: tuple[Path, ...] = ()
    """First frame, for i2v, flf2v and ti2v: one for all captions, or one for each."""
    end_image: tuple[Path, ...] = ()
    """Last frame, for flf2v: one for all captions, or one for each."""
    control_video: tuple[Path, ...] = ()
    """Video that leads Fun-Control and VACE (poses, depth ...): one for all captions, or one for each."""
    dataset: Path | None = None
    """Videos with captions (metadata.csv ...): its captions are sampled, from its frames where the variant
    takes images, and each real clip is shown beside."""
    captions: int = 12
    """How many different captions of --dataset to take."""
    untrained: int | None = None
    """Seed: also sample from the random weights that a run of this seed starts from, for comparison."""
    ulysses_degree: int = 1
    """Ranks that exchange heads for tokens of one video."""
    ring_degree: int = 1
    """Ranks that pass key/value blocks of one video around; the rest of the world takes other captions."""
    dist_timeout: float = 1800.0
    """Seconds that ranks wait for each other."""
    how: Annotated[SampleOptions, tyro.conf.arg(name="")] = field(default_factory=SampleOptions)
    encoders: Annotated[EncoderOptions, tyro.conf.arg(name="")] = field(default_factory=EncoderOptions)


def main(argv: Sequence[str]) -> None:
    """Sample as `argv` says. Raises UserError naming file or flag and cause."""
    options = parse(Options, argv, prog=PROG, description=(__doc__ or "").split("\n\n")[0])
    try:
        place = dist.environment()
        device = dist.pick_device(place.local_rank)
        if options.output.exists() and any(options.output.iterdir()):
            raise ValueError(f"--output {options.output}: exists and is not empty; give a new folder")
        prompts, clips = chosen_captions(options)
        settings = resolve(options.how, options.weights, options.low_weights, options.variant, options.ema)
        validate(
            place.world_size,
            options.ulysses_degree,
            options.ring_degree,
            settings.config.num_heads,
            settings.variant.name,
        )
        if options.untrained is not None and len(settings.sources) == 2:
            raise ValueError("--untrained compares one model; two experts have none")
        images = check_images(chosen_images(options, settings, clips), settings.variant, len(prompts))
        check_encoders(options.encoders, settings.variant, bool(images.first))
        if place.world_size > 1:
            dist.initialize(place, device, options.dist_timeout)
        try:
            sample(options, settings, prompts, clips, images, device)
        finally:
            if place.world_size > 1:
                dist.shutdown()
    except (ValueError, OSError, BadClip) as error:
        raise UserError(str(error)) from None


def sample(
    options: Options,
    settings: Settings,
    prompts: list[str],
    clips: list[Path | None],
    images: Images,
    device: torch.device,
) -> None:
    """Encode, sample, decode and write. Rank 0 encodes and decodes; every rank calls it."""
    for line in settings.describe():
        dist.say(line)
    topology = Topology(world_size(), options.ulysses_degree, options.ring_degree)
    context = ContextParallel.create(topology, rank(), options.dist_timeout)
    captions = [*prompts, options.negative_prompt]
    wan = settings.config
    text = torch.zeros(len(captions), wan.text_len, wan.text_dim)
    given: dict[str, Tensor] = {
        name: torch.zeros(shape)
        for name, shape in given_shapes(settings, len(prompts), bool(images.first or images.control)).items()
    }
    codec, problem = None, ""
    if dist.is_main():
        try:
            codec = open_codec(codec_name(options.encoders, settings.variant), options.encoders.vae, device)
            told = encode_images(images, settings, codec, options.encoders, device)
            given = {name: getattr(told, name).cpu() for name in given}
            text = text_features(open_text(options.encoders, settings.variant), captions, settings.variant)
        except (ValueError, OSError, BadClip) as error:
            problem = " ".join(str(error).split())
    if world_size() > 1:
        problem = dist.share_text(problem)  # or the others would wait for what rank 0 cannot send
    if problem:
        raise ValueError(problem)
    text = shared(text).to(device)
    told = Given(**{name: shared(value).to(device) for name, value in given.items()})
    models = {"trained": settings.experts(device)}
    if options.untrained is not None:
        source, seed = random_weights(settings.variant.name, options.untrained)[0], settings.guidance
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        models = {"untrained": Experts([lambda: build(source, wan, device, dtype)], seed), **models}
    # This data-parallel group's captions.
    mine = list(range(topology.coordinates(rank())[0], len(prompts), topology.dp_size))
    sampled = {}
    for name, experts in models.items():
        latents = torch.zeros(len(prompts), *settings.latent_shape)
        if mine:
            with tqdm(
                total=settings.steps, desc=name, unit="step", disable=None if dist.is_main() else True
            ) as bar:
                latents[mine] = sample_latents(
                    experts,
                    text[mine],
                    text[-1],
                    settings.latent_shape,
                    steps=settings.steps,
                    shift=settings.shift,
                    guidance=settings.guidance[0],
                    seed=settings.seed,
                    solver=settings.solver,
                    boundary=settings.boundary,
                    given=told.only(mine),
                    context=context,
                    places=mine,
                    tick=bar.update,
                ).cpu()
        # The ranks of a context-parallel group hold the same videos; one of them gives them.
        latents = shared(latents if context.rank == 0 else torch.zeros_like(latents))
        if codec is not None:
            sampled[name] = [to_frames(codec.decode(one[None].to(device)))[0] for one in latents]
    if codec is not None:
        write(options, settings, prompts, clips, sampled)


def world_size() -> int:
    """Return the number of ranks, 1 without a launcher."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without a launcher."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def shared(value: Tensor) -> Tensor:
    """Return the sum over all ranks: rank 0's tensor, where the others hold zeros."""
    return dist.sum_over_ranks(value) if world_size() > 1 else value


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


def chosen_images(options: Options, settings: Settings, clips: list[Path | None]) -> Images:
    """Return the images given, or a dataset's clips, whose first frame is theirs."""
    held = [clip for clip in clips if clip is not None]
    if options.image or not held or settings.variant.task not in ("i2v", "ti2v"):
        return Images(options.image, options.end_image, options.control_video)
    return Images(held, options.end_image, options.control_video)


def write(
    options: Options,
    settings: Settings,
    prompts: list[str],
    clips: list[Path | None],
    sampled: dict[str, list[Tensor]],
) -> None:
    """Write an mp4 a sample, the contact sheet and samples.json; the folder appears whole or not at all."""
    aside = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        write_into(aside, settings, prompts, clips, sampled)
        if options.output.exists():
            options.output.rmdir()  # it is empty
        aside.rename(options.output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(
        f"sampled {len(prompts) * len(sampled)} videos into {options.output};"
        f" look at {options.output / 'contact_sheet.png'}"
    )


def write_into(
    folder: Path,
    settings: Settings,
    prompts: list[str],
    clips: list[Path | None],
    sampled: dict[str, list[Tensor]],
) -> None:
    """Write the files of all samples into a folder."""
    entries = []
    for name, videos in sampled.items():
        for index, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
            file = folder / f"{name}_{index:02d}.mp4"
            write_mp4(file, frames.numpy(), settings.fps)
            entries.append({"weights": name, "prompt": prompt, "file": file.name})
    columns = [*(["real"] if any(clips) else []), *sampled]
    rows = []
    for index, prompt in enumerate(prompts):
        shown: list[Frames | None] = [videos[index].numpy() for videos in sampled.values()]
        if any(clips):
            shown.insert(0, real_clip(clips[index], settings))
        rows.append(Row(prompt, shown))
    contact_sheet(columns, rows).save(folder / "contact_sheet.png")
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def real_clip(path: Path | None, settings: Settings) -> Frames | None:
    """Return the real clip at the samples' size, None where it cannot be read."""
    if path is None:
        return None
    try:
        return read_clip(path, settings.num_frames, settings.height, settings.width, settings.fps)
    except BadClip:
        return None


if __name__ == "__main__":
    run(main, PROG, rank=dist.environment().rank, leave=dist.leave)
