"""Videos from the weights in training, at the same captions and noise every time, without taking them apart:
every rank runs the sharded model, and rank 0 decodes."""

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megawan import dist
from megawan.contact_sheet import Frames, Row, contact_sheet
from megawan.data.batch import Sample, pad_text
from megawan.data.video import write_mp4
from megawan.encoders.opening import open_codec
from megawan.flow.solver import euler_sample, guided
from megawan.preview_options import PreviewOptions
from megawan.rng import generator_at
from megawan.sampling import start_noise, to_frames

SHOWN_HEIGHT = 160
"""Pixels of a video in TensorBoard; the mp4 files have its own size."""


class Store(Protocol):
    """What previews take of a latent store."""

    @property
    def empty_text(self) -> Tensor:
        """Features of the empty prompt, float32 [S, text_dim]."""
        ...

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Latent shape of each sample."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Sample: ...


@dataclass(frozen=True)
class Preview:
    """What one video starts from; a batch of one."""

    caption: str
    noise: Tensor
    """float32 [1, C, T, H, W]."""
    text: Tensor
    """float32 [1, S, text_dim]."""
    x0: Tensor | None
    """The stored sample's latents, [1, C, T, H, W]: what the video could look like, and its clean frames."""
    clip: Tensor | None = None
    condition: Tensor | None = None

    def to(self, device: torch.device) -> "Preview":
        """Return the preview with its tensors on `device`."""
        moved = {
            name: value.to(device)
            for name in ("noise", "text", "x0", "clip", "condition")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


# (preview, x_t [1, C, T, H, W], timestep [1], text [1, S, text_dim]) -> velocity float32 [1, C, T, H, W],
# the same on every rank of a context-parallel group
PreviewVelocity = Callable[[Preview, Tensor, Tensor, Tensor], Tensor]


class Previews:
    """The previews of a run, divided among its data-parallel groups."""

    def __init__(
        self,
        options: PreviewOptions,
        previews: Sequence[Preview],
        empty_text: Tensor,
        *,
        shift: float,
        codec: str,
        clean_frames: int,
        dp_rank: int,
        dp_size: int,
        first: bool,
    ) -> None:
        """empty_text [S, text_dim]: what guidance pushes away from. first: whether this rank is the first of
        its context-parallel group, whose ranks all hold the same video."""
        self._options = options
        self._previews = list(previews)
        self._empty_text = empty_text
        self._shift = shift if options.shift is None else options.shift
        self._codec = codec
        self._clean_frames = clean_frames
        self._first = first
        # Sharded weights are gathered by all ranks together: each runs as many previews as the others.
        self._mine = range(dp_rank, -(-len(self._previews) // dp_size) * dp_size, dp_size)

    def sample(self, velocity: PreviewVelocity, device: torch.device) -> list[Tensor]:
        """Return the latents [C, T, H, W] of every preview, on every rank; collective."""
        mine: dict[int, Tensor] = {}
        for turn in self._mine:
            latents = self._one(self._previews[turn % len(self._previews)], velocity, device)
            if turn < len(self._previews) and self._first:
                mine[turn] = latents
        found = []
        for number, preview in enumerate(self._previews):
            part = mine.get(number, torch.zeros_like(preview.noise))
            found.append(dist.sum_over_ranks(part.float())[0])
        return found

    @torch.no_grad()
    def _one(self, preview: Preview, velocity: PreviewVelocity, device: torch.device) -> Tensor:
        here = preview.to(device)
        empty = self._empty_text.to(device)[None]
        clean = None
        if self._clean_frames:
            assert here.x0 is not None
            clean = here.x0[:, :, : self._clean_frames]
        return euler_sample(
            guided(
                lambda x_t, timestep: velocity(here, x_t, timestep, here.text),
                lambda x_t, timestep: velocity(here, x_t, timestep, empty),
                self._options.guidance,
            ),
            here.noise,
            steps=self._options.steps,
            shift=self._shift,
            clean=clean,
        )

    def decode(self, latents: Sequence[Tensor], device: torch.device) -> list[Frames]:
        """Return the videos' frames, uint8 [T, H, W, 3]; on one rank. The codec is opened for this alone:
        its weights do not take memory from the training."""
        codec = open_codec(self._codec, self._options.vae, device)
        return [to_frames(codec.decode(one[None].to(device)))[0].numpy() for one in latents]

    def stored(self) -> list[Tensor] | None:
        """Return the latents of the stored samples that the previews were taken from, None for prompts."""
        found = [preview.x0[0] for preview in self._previews if preview.x0 is not None]
        return found if len(found) == len(self._previews) else None

    def write(self, folder: Path, columns: Mapping[str, Sequence[Frames]]) -> Image.Image:
        """Write an mp4 of each video and a contact sheet into `folder`, which appears whole or not at all;
        return the sheet. `columns`: a title and the videos, one a preview."""
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for title, videos in columns.items():
            for number, frames in enumerate(videos):
                write_mp4(aside / f"{title}_{number:02d}.mp4", frames, self._options.fps)
        rows = [
            Row(preview.caption, [videos[number] for videos in columns.values()])
            for number, preview in enumerate(self._previews)
        ]
        sheet = contact_sheet(list(columns), rows)
        sheet.save(aside / "contact_sheet.png")
        shutil.rmtree(folder, ignore_errors=True)  # of a step that is taken again after a resume
        aside.rename(folder)
        return sheet

    def animation(self, frames: Frames) -> bytes:
        """Return a small GIF of one video, for TensorBoard."""
        height = min(SHOWN_HEIGHT, frames.shape[1])
        size = max(1, round(frames.shape[2] * height / frames.shape[1])), height
        pictures = [Image.fromarray(np.ascontiguousarray(one)).resize(size) for one in frames]
        buffer = io.BytesIO()
        pictures[0].save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=max(20, round(1000 / self._options.fps)),
            loop=0,
        )
        return buffer.getvalue()


def stored_previews(store: Store, options: PreviewOptions, text_len: int) -> list[Preview]:
    """Return previews of `options.count` samples of a store, spread over it and always the same.

    Raises ValueError naming what cannot be read.
    """
    order = torch.randperm(len(store), generator=generator_at(0, "previews")).tolist()
    previews = []
    for number, sample_id in enumerate(sorted(order[: options.count])):
        sample = store[sample_id]
        previews.append(
            Preview(
                sample.prompt,
                start_noise(options.seed, number, tuple(sample.latents.shape)),
                pad_text(sample.text, text_len)[None],
                sample.latents[None],
                None if sample.clip is None else sample.clip[None],
                None if sample.condition is None else sample.condition[None],
            )
        )
    return previews


def prompted_previews(
    options: PreviewOptions, shape: tuple[int, ...], text_len: int, text_dim: int
) -> tuple[list[Preview], Tensor]:
    """Return previews of --sample.prompts at latent shape (C, T, H, W), and the features of the empty prompt;
    collective: rank 0 encodes, the others get its numbers.

    Raises RuntimeError on every rank where the encoder cannot be opened.
    """
    from megawan.encoders.text import TextEncoder  # transformers, 2 s that stored captions do not need

    captions, problem = [*options.prompts, ""], ""
    features = torch.zeros(len(captions), text_len, text_dim)
    if dist.is_main():
        try:
            assert options.text_encoder is not None
            if options.text_encoder == "debug":
                encoder = TextEncoder.debug(dim=text_dim)
            else:
                encoder = TextEncoder.open(Path(options.text_encoder), options.tokenizer)
            rows = encoder.encode(captions, text_len)
            features = torch.stack([pad_text(one.float(), text_len) for one in rows])
        except (ValueError, OSError, RuntimeError) as error:
            problem = str(error)
    problem = dist.share_text(problem)
    if problem:
        raise RuntimeError(f"--sample.text_encoder {options.text_encoder}: {problem}")
    features = dist.sum_over_ranks(features)
    previews = [
        Preview(prompt, start_noise(options.seed, number, shape), features[number][None], None)
        for number, prompt in enumerate(options.prompts)
    ]
    return previews, features[-1]


def png(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
