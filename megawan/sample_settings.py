"""What a sampling run does, resolved from its flags: weights, variant, the authors' settings, what is
encoded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from megawan.conditions import open_clip, open_conditions
from megawan.data.batch import pad_text
from megawan.data.encoding import to_pixels
from megawan.data.video import read_clip
from megawan.encoders.codec import VideoCodec
from megawan.flow.conditioning import (
    control_condition,
    image_clip,
    image_condition,
    vace_context,
    vace_mask,
    vace_split,
)
from megawan.models.layouts import TensorSource, open_experts
from megawan.models.variants import VARIANTS, Variant, WanConfig, get_variant
from megawan.models.wan import WanModel
from megawan.plan import latent_shape
from megawan.sampling import Experts, Given, build, find_step_folder, open_model_weights
from megawan.solvers import Solver

if TYPE_CHECKING:  # these import transformers, seconds that --help does not need
    from megawan.encoders.image import ImageEncoder
    from megawan.encoders.text import TextEncoder

Number = TypeVar("Number", int, float)
DEBUG = "debug"
CONTROLLED = ("control", "vace")


@dataclass(frozen=True)
class SampleOptions:
    """How to sample. What is left out is the authors' setting for the variant, and said."""

    solver: Solver | None = None
    """euler (the specification's steps), unipc or dpm++ (diffusers')."""
    steps: int | None = None
    """Solver steps."""
    shift: float | None = None
    """Shift of the sigma grid."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off. Of two experts that of the high-noise one."""
    low_guidance: float | None = None
    """Guidance of the low-noise expert (default: its authors', or --guidance where that is given)."""
    boundary: float | None = None
    """Sigma at which two experts change over (default: 0.875 for T2V-A14B, 0.9 for I2V-A14B)."""
    num_frames: int | None = None
    """Frames, 4n+1."""
    height: int | None = None
    """Pixel height."""
    width: int | None = None
    """Pixel width."""
    fps: int | None = None
    """Frames a second of the files."""
    seed: int = 0
    """Seed of the start noise; sample i depends on (seed, i) alone."""


@dataclass(frozen=True)
class EncoderOptions:
    """What turns captions and images into what the model reads, and latents into videos."""

    codec: Literal["dct", "wan2.1", "wan2.2"] | None = None
    """Video codec of the latents (default: the variant's VAE; the weightless dct for debug variants)."""
    vae: Path | None = None
    """Weights of the codec (not for dct)."""
    text_encoder: str | None = None
    """Folder or file of a UMT5 encoder, or debug for the seeded tiny one (default for debug variants)."""
    tokenizer: Path | None = None
    """Folder of its tokenizer; default: beside the encoder."""
    image_encoder: str | None = None
    """For Wan2.1's i2v and flf2v: its CLIP file, an image_encoder folder, or debug for a seeded tiny one."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a sampling run."""

    sources: tuple[TensorSource, ...]
    """The weights; of two experts the high-noise one first."""
    variant: Variant
    guidance: tuple[float, ...]
    """One for each of `sources`."""
    boundary: float | None
    solver: Solver
    steps: int
    shift: float
    num_frames: int
    height: int
    width: int
    fps: int
    seed: int

    @property
    def config(self) -> WanConfig:
        """The architecture."""
        return self.variant.config

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a sample. Raises ValueError for sizes that the VAE does not divide."""
        variant = self.variant
        return latent_shape(
            self.num_frames,
            self.height,
            self.width,
            variant.latent_channels,
            variant.vae_stride,
            variant.config.patch_size,
        )

    def experts(self, device: torch.device) -> Experts:
        """Return the models, to be built when they are needed: bfloat16 on a GPU, float32 on a CPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def opener(source: TensorSource) -> Callable[[], WanModel]:
            return lambda: build(source, self.config, device, dtype)

        return Experts([opener(source) for source in self.sources], self.guidance)

    def describe(self) -> list[str]:
        """Return what will be sampled, and how, for the start-up lines."""
        scales = " and ".join(f"{scale:g}" for scale in self.guidance)
        lines = [
            f"model: {self.variant.name}"
            + (f", two experts, boundary {self.boundary:g}" if self.boundary else ""),
            f"sampling: {self.solver}, {self.steps} steps, shift {self.shift:g}, guidance {scales}, seed"
            f" {self.seed}; {self.num_frames} frames of {self.height} x {self.width} at {self.fps} fps",
        ]
        return lines


def resolve(
    options: SampleOptions,
    weights: Path,
    low_weights: Path | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> Settings:
    """Return the settings of a run; only headers of the weights are read.

    Raises ValueError or FileNotFoundError naming path or flag: weights that are none, of another variant,
    one expert alone, options that do not fit.
    """
    sources, names = _open(weights, low_weights, ema)
    chosen = _variant(names[0], variant, pair=len(sources) == 2)
    preset, pair = chosen.sampling, len(sources) == 2
    if options.low_guidance is not None and not pair:
        raise ValueError("--low_guidance is the low-noise expert's; give its --low_weights")
    if options.boundary is not None and not pair:
        raise ValueError("--boundary is where two experts change over; give --low_weights")
    guidance = [_either(options.guidance, preset.guidance)]
    boundary = None
    if pair:
        low = get_variant(chosen.name.replace("-high", "-low")).sampling.guidance
        guidance.append(_either(options.low_guidance, _either(options.guidance, low)))
        boundary = _either(options.boundary, chosen.boundary or 0.0)
        if not 0 < boundary < 1:
            raise ValueError(f"--boundary {boundary} must lie between 0 and 1")
    settings = Settings(
        tuple(sources),
        chosen,
        tuple(guidance),
        boundary,
        options.solver or preset.solver,
        _either(options.steps, preset.steps),
        _either(options.shift, preset.shift),
        _either(options.num_frames, preset.num_frames),
        _either(options.height, preset.height),
        _either(options.width, preset.width),
        _either(options.fps, preset.fps),
        options.seed,
    )
    for name in ("steps", "fps"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} {getattr(settings, name)} must be 1 or more")
    if not (settings.shift > 0 and math.isfinite(settings.shift)):
        raise ValueError(f"--shift {settings.shift} must be above 0")
    settings.latent_shape  # noqa: B018 - raises for a size that does not fit
    return settings


def _either(given: Number | None, otherwise: Number) -> Number:
    return otherwise if given is None else given


def _open(weights: Path, low_weights: Path | None, ema: bool) -> tuple[list[TensorSource], list[str]]:
    """Return one or two sources, the high-noise expert first, and the names of the variants they may be."""
    if low_weights is None and find_step_folder(weights) is None and not ema:
        opened = open_experts(weights)
        if None not in opened:
            both = [opened["high"], opened["low"]]
            return list(both), [both[0].variants[0], both[1].variants[0]]
    paths = [weights] if low_weights is None else [weights, low_weights]
    found = [open_model_weights(path, "ema" if ema else "master") for path in paths]
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise ValueError(
            f"--low_weights {low_weights}: another architecture than that of --weights {weights}"
        )
    names = [name for _, _, name in found]
    for name, path, expert in zip(names, paths, ("high", "low"), strict=False):
        is_one = get_variant(name).expert
        if len(found) == 2 and is_one not in (None, expert):
            raise ValueError(f"{path}: is the {is_one}-noise expert; the {expert}-noise one belongs here")
    return [source for source, _, _ in found], names


def _variant(found: str, asked: str | None, pair: bool) -> Variant:
    """Return the variant of the (first) weights: `asked`, whose architecture must be the same, or `found`.

    Raises ValueError for one expert alone: it knows only its own noise levels.
    """
    variant = get_variant(found)
    if asked is not None:
        named = get_variant(asked)
        if named.config != variant.config:
            raise ValueError(f"--variant {asked}: the weights are of another architecture, that of {found}")
        variant = named
    if pair and variant.expert != "high":
        shape = variant.config
        twins = [each for each in VARIANTS.values() if each.expert == "high" and each.config == shape]
        if not twins:
            raise ValueError(f"--low_weights: {variant.name} is one model, not two experts; leave it out")
        variant = twins[0]
    if not pair and variant.expert is not None:
        raise ValueError(
            f"{variant.name} is one expert of two, which makes no video alone; give both: --weights HIGH"
            " --low_weights LOW"
        )
    return variant


def check_encoders(options: EncoderOptions, variant: Variant, with_image: bool = True) -> None:
    """Raise ValueError or FileNotFoundError naming the flag of an encoder that is missing, needless or not
    there; nothing is opened, so that every rank can ask before the first of them loads."""
    codec, clip = codec_name(options, variant), variant.config.has_clip and with_image
    if options.text_encoder is None and variant.repository:
        raise ValueError(_text_encoder_needed(variant))
    if codec != "dct" and options.vae is None:
        raise ValueError(f"--vae is needed, the weights of the codec {codec}")
    if codec == "dct" and options.vae is not None:
        raise ValueError("--vae: the codec dct has no weights; leave it out")
    if clip != (options.image_encoder is not None):
        said = "reads CLIP features: give" if clip else "reads no CLIP features here: leave out"
        raise ValueError(f"{variant.name} {said} --image_encoder")
    for name in ("vae", "text_encoder", "tokenizer", "image_encoder"):
        path = getattr(options, name)
        if path not in (None, DEBUG) and not Path(path).exists():
            raise FileNotFoundError(f"--{name} {path}: no such file or folder")


def _text_encoder_needed(variant: Variant) -> str:
    return (
        f"--text_encoder is needed: {variant.name} reads UMT5-XXL (models_t5_umt5-xxl-enc-bf16.pth, or a"
        " text_encoder folder)"
    )


def open_text(options: EncoderOptions, variant: Variant) -> "TextEncoder":
    """Return the text encoder. Raises ValueError where none is given for weights that are not debug's."""
    name = options.text_encoder or (None if variant.repository else DEBUG)
    if name is None:
        raise ValueError(_text_encoder_needed(variant))
    from megawan.encoders.text import TextEncoder

    if name == DEBUG:
        return TextEncoder.debug(dim=variant.config.text_dim)
    return TextEncoder.open(Path(name), options.tokenizer)


def text_features(encoder: "TextEncoder", captions: Sequence[str], variant: Variant) -> Tensor:
    """Return the features of captions, float32 [B, text_len, text_dim], zero past each one's end."""
    length = variant.config.text_len
    return torch.stack([pad_text(rows, length) for rows in encoder.encode(list(captions), length)])


def codec_name(options: EncoderOptions, variant: Variant) -> str:
    """Return the codec: the one asked for, else the variant's VAE, or dct for a debug variant it fits."""
    if options.codec is not None:
        return options.codec
    weightless = not variant.repository and variant.vae == "2.1" and options.vae is None
    return "dct" if weightless else f"wan{variant.vae}"


@dataclass(frozen=True)
class Images:
    """The images and videos that the samples are told: one path a sample, or none."""

    first: Sequence[Path] = ()
    last: Sequence[Path] = ()
    control: Sequence[Path] = ()
    """Videos that lead Fun-Control and VACE."""


def check_images(images: Images, variant: Variant, samples: int) -> Images:
    """Return the images, a lone one repeated for all samples. Raises ValueError naming the flag for too many,
    too few, needless and missing ones."""
    needs_first, takes_first = variant.task in ("i2v", "flf2v"), variant.task not in ("t2v", "vace")
    led = variant.task in CONTROLLED
    spread = []
    for flag, paths, needed, takes in (
        ("--image", images.first, needs_first, takes_first),
        ("--end_image", images.last, variant.task == "flf2v", variant.task == "flf2v"),
        ("--control_video", images.control, led, led),
    ):
        if paths and not takes:
            raise ValueError(f"{flag}: {variant.name} is {variant.task} and takes none")
        if needed and not paths:
            raise ValueError(f"{variant.name} needs {flag}, one for all captions or one for each")
        if len(paths) not in (0, 1, samples):
            raise ValueError(f"{flag}: {len(paths)} files for {samples} captions; give one, or one for each")
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{flag} {path}: no such file")
        spread.append(list(paths) * samples if len(paths) == 1 else list(paths))
    return Images(*spread)


def encode_images(
    images: Images, settings: Settings, codec: VideoCodec, options: EncoderOptions, device: torch.device
) -> Given:
    """Return what the variant is told of its images, as tools/encode_dataset.py tells it in training.

    Raises BadClip for an image that cannot be read, ValueError for an encoder that is missing or another's.
    """
    variant, parts = settings.variant, []
    if variant.task in CONTROLLED:
        eyes = open_clip(variant, options.image_encoder, device) if images.first else None
        for place, led_by in enumerate(images.control):
            frames = read_clip(
                led_by, settings.num_frames, settings.height, settings.width, float(settings.fps)
            )
            first = _picture(images.first[place], settings).to(device)[None] if images.first else None
            parts.append(_controlled(to_pixels(frames).to(device), first, settings, codec, eyes))
    else:
        conditions = open_conditions(variant, codec, options.image_encoder, device)
        for place, path in enumerate(images.first):
            pixels = torch.zeros(1, 3, settings.num_frames, settings.height, settings.width, device=device)
            pixels[:, :, 0] = _picture(path, settings).to(device)
            if images.last:
                pixels[:, :, -1] = _picture(images.last[place], settings).to(device)
            if conditions is None:
                parts.append(Given(clean=codec.encode(pixels[:, :, :1])))
            else:
                told = conditions.encode(pixels)
                parts.append(Given(clip=told.get("clip"), condition=told["condition"]))

    def together(each: Sequence[Tensor | None]) -> Tensor | None:
        held = [one.float() for one in each if one is not None]
        return torch.cat(held) if held else None

    return Given(
        together([part.clean for part in parts]),
        together([part.clip for part in parts]),
        together([part.condition for part in parts]),
        together([part.vace for part in parts]),
    )


def _controlled(
    video: Tensor, first: Tensor | None, settings: Settings, codec: VideoCodec, eyes: "ImageEncoder | None"
) -> Given:
    """Return what Fun-Control or VACE is told of a control video [1, 3, T, H, W] and maybe a first frame.

    Without one, Fun-Control's image latent and CLIP rows are zeros. VACE makes every pixel of the video.
    """
    variant = settings.variant
    if variant.task == "vace":
        mask = torch.ones_like(video[:, :1])
        inactive, reactive = (codec.encode(part) for part in vace_split(video, mask))
        return Given(vace=vace_context(inactive, reactive, vace_mask(mask)))
    image, channels = None, variant.condition_channels - variant.latent_channels
    rows = torch.zeros(1, variant.config.clip_tokens or 0, variant.config.image_dim or 0, device=video.device)
    if first is not None:
        image = image_condition(codec.encode(image_clip(first, settings.num_frames)))
        if eyes is not None:
            rows = eyes.encode(first)
    condition = control_condition(codec.encode(video), image, image_channels=channels)
    return Given(clip=rows if variant.config.has_clip else None, condition=condition)


def given_shapes(settings: Settings, samples: int, with_images: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that `encode_images` gives, by its name in `Given`."""
    variant, (channels, frames, height, width) = settings.variant, settings.latent_shape
    if not with_images:
        return {}
    if variant.task == "vace":
        return {"vace": (samples, variant.config.vace_in_dim, frames, height, width)}
    if variant.task == "ti2v":
        return {"clean": (samples, channels, 1, height, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "condition": (samples, variant.condition_channels, frames, height, width)
    }
    if variant.config.clip_tokens and variant.config.image_dim:
        shapes["clip"] = (samples, variant.config.clip_tokens, variant.config.image_dim)
    return shapes


def _picture(path: Path, settings: Settings) -> Tensor:
    frames = read_clip(path, 1, settings.height, settings.width, None)
    return to_pixels(frames).reshape(3, settings.height, settings.width)
