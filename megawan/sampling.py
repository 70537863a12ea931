"""From captions to latents with a plain, unsharded model: the inference side of what training optimises."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megawan.checkpoint import EMA, StepWeights, Weights, step_folders
from megawan.flow.solver import euler_sample, guided
from megawan.models.initial import InitialWeights
from megawan.models.keys import expected_shapes
from megawan.models.layouts import TensorSource, open_weights
from megawan.models.variants import WanConfig, get_variant
from megawan.models.wan import WanModel
from megawan.rng import generator_at


def open_model_weights(path: Path, weights: Weights = "master") -> tuple[TensorSource, WanConfig, str]:
    """Return tensors, architecture and variant name of a training checkpoint (step or run folder) or of any
    weights.

    Raises ValueError or FileNotFoundError naming the path when it is neither, or when the checkpoint's
    tensors are not those of its variant.
    """
    step_folder = find_step_folder(path)
    if step_folder is not None:
        saved = StepWeights(step_folder, weights)
        variant = get_variant(str(saved.manifest.get("variant")))
        saved.require(expected_shapes(variant.config), variant.name)
        return saved, variant.config, variant.name
    if weights == EMA:
        raise ValueError(f"{path} is no training checkpoint: what it holds was chosen when it was exported")
    opened = open_weights(path)
    return opened, opened.config, opened.variants[0]


def find_step_folder(path: Path) -> Path | None:
    """Return the step folder that `path` is, or the newest one of the run folder that `path` is, else
    None."""
    if (path / "manifest.json").is_file():
        return path
    folders = step_folders(path / "checkpoints") or step_folders(path)
    return folders[0] if folders else None


def random_weights(variant: str, seed: int) -> tuple[TensorSource, WanConfig]:
    """Return the untrained weights that a run of this variant and seed starts from."""
    wan = get_variant(variant).config
    return InitialWeights(wan, seed), wan


@torch.no_grad()
def build(source: TensorSource, wan: WanConfig, device: torch.device, dtype: torch.dtype) -> WanModel:
    """Return the model in evaluation mode, filled one tensor at a time."""
    with torch.device("meta"):
        model = WanModel(wan)
    model.to_empty(device=device)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.load(name))
    return model.eval()


@torch.no_grad()
def sample_latents(
    model: WanModel,
    text: Tensor,
    empty_text: Tensor,
    latent_shape: Sequence[int],
    *,
    steps: int,
    shift: float,
    guidance: float,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return latents [B, C, T, H, W] float32 for text [B, S, text_dim] by Euler steps with classifier-free
    guidance.

    empty_text [S, text_dim] is what guidance pushes away from. `tick` is called after each step. The start
    noise of sample i depends on (seed, i) alone, so the batch size does not change a sample.
    """
    noise = torch.stack(
        [
            torch.randn(tuple(latent_shape), generator=generator_at(seed, "sample", i))
            for i in range(len(text))
        ]
    ).to(text.device)
    negative_text = empty_text.expand_as(text)

    def positive(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model.velocity(x_t, timestep, text)

    def negative(x_t: Tensor, timestep: Tensor) -> Tensor:
        return model.velocity(x_t, timestep, negative_text)

    return euler_sample(
        guided(positive, negative, guidance),
        noise,
        steps=steps,
        shift=shift,
        progress=lambda done, total: tick(),
    )


def to_frames(pixels: Tensor) -> Tensor:
    """Return frames uint8 [B, T, H, W, 3] of decoded pixels [B, 3, T, H, W] in [-1, 1]."""
    return (
        ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
    )
