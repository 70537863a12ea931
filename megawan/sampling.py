"""From captions and images to latents with unsharded models: the other side of what training optimises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megawan.checkpoint import EMA, StepWeights, Weights, step_folders
from megawan.flow.solver import Velocity, guide
from megawan.models.initial import InitialWeights
from megawan.models.keys import expected_shapes
from megawan.models.layouts import TensorSource, open_weights
from megawan.models.variants import WanConfig, get_variant
from megawan.models.wan import WanModel
from megawan.parallel.context import ContextParallel
from megawan.rng import generator_at
from megawan.solvers import Solver, integrate


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


@dataclass(frozen=True)
class Given:
    """What samples are told besides their captions; each is [B, ...] or None, as the variant takes it."""

    clean: Tensor | None = None
    """Latent frame 0, kept clean (ti2v), [B, C, 1, H, W]."""
    clip: Tensor | None = None
    """CLIP rows, [B, 257 or 514, 1280]."""
    condition: Tensor | None = None
    """Channels after the noisy ones, [B, channels, T, H, W]."""
    vace: Tensor | None = None
    """VACE's context, [B, 96, T, H, W]."""

    def only(self, indices: Sequence[int]) -> "Given":
        """Return what these samples alone are told."""
        rows = list(indices)
        held = (self.clean, self.clip, self.condition, self.vace)
        return Given(*(None if each is None else each[rows] for each in held))


class Experts:
    """The models of a sampling run: one, or the two of an A14B, of which only the one in use is held."""

    def __init__(self, openers: Sequence[Callable[[], WanModel]], guidance: Sequence[float]) -> None:
        """openers: what builds each model, the high-noise expert first; guidance: the scale of each."""
        self.guidance = list(guidance)
        self._openers = list(openers)
        self._held: tuple[int, WanModel] | None = None

    def __len__(self) -> int:
        return len(self._openers)

    def __getitem__(self, index: int) -> WanModel:
        """Return model `index`; another one that was held is let go first."""
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = index, self._openers[index]()
        return self._held[1]


@torch.no_grad()
def sample_latents(
    model: WanModel | Experts,
    text: Tensor,
    empty_text: Tensor,
    latent_shape: Sequence[int],
    *,
    steps: int,
    shift: float,
    guidance: float,
    seed: int,
    solver: Solver = "euler",
    boundary: float | None = None,
    given: Given = Given(),
    context: ContextParallel | None = None,
    places: Sequence[int] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return latents [B, C, T, H, W] float32 for text [B, S, text_dim] with classifier-free guidance.

    empty_text [S, text_dim] (of the empty or a negative prompt) is what guidance pushes away from. Two
    `Experts` change over at `boundary`, with a guidance of their own each instead of `guidance`. All samples
    take a step together, each asked of the model by itself: memory is that of one, and no expert is opened
    twice. context: ranks that share each video; all get the result. `tick` is called after each step. The
    start noise of a sample depends on (seed, its place) alone, 0 .. B − 1 unless `places` says otherwise.
    """
    experts = model if isinstance(model, Experts) else Experts([lambda: model], [guidance])
    if (len(experts) == 2) != (boundary is not None):
        raise ValueError("two experts and a boundary belong together: give both or neither")
    chosen = range(len(text)) if places is None else places
    noise = torch.cat([start_noise(seed, place, latent_shape) for place in chosen]).to(text.device)
    negative = empty_text.unsqueeze(0)

    def velocity_of(expert: int) -> Velocity:
        def asked(x_t: Tensor, timestep: Tensor, one: int, rows: Tensor) -> Tensor:
            told = given.only([one])
            extras = {
                name: value
                for name in ("clip", "condition", "vace")
                if (value := getattr(told, name)) is not None
            }
            if told.clean is not None:
                extras["clean_frames"] = told.clean.shape[2]
            if context is not None:
                extras["context"] = context
            return experts[expert].velocity(x_t, timestep, rows, **extras)

        def velocity(x_t: Tensor, timestep: Tensor) -> Tensor:
            parts = []
            for one in range(len(text)):
                x, t = x_t[one : one + 1], timestep[one : one + 1]
                v = asked(x, t, one, text[one : one + 1])
                if experts.guidance[expert] != 1:
                    v = guide(v, asked(x, t, one, negative), experts.guidance[expert])
                parts.append(v.to(x))
            return torch.cat(parts)

        return velocity

    return integrate(
        velocity_of(0),
        noise,
        solver=solver,
        steps=steps,
        shift=shift,
        clean=given.clean,
        low_noise=velocity_of(1) if len(experts) == 2 else None,
        boundary=boundary,
        progress=lambda done, total: tick(),
    )


def start_noise(seed: int, place: int, shape: Sequence[int]) -> Tensor:
    """Return the noise that sample `place` starts from, float32 [1, *shape], on the CPU."""
    return torch.randn((1, *shape), generator=generator_at(seed, "sample", place))


def to_frames(pixels: Tensor) -> Tensor:
    """Return frames uint8 [B, T, H, W, 3] of decoded pixels [B, 3, T, H, W] in [-1, 1]."""
    return (
        ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
    )
