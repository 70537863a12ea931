"""Initial weights as a pure function of (name, shape, seed): every layout, rank and device starts from the
same numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megawan.models.keys import expected_shapes
from megawan.models.variants import WanConfig
from megawan.models.wan import WanModel
from megawan.rng import generator_at

EMBEDDING_STD = 0.02


def initial_tensor(name: str, shape: Sequence[int], config: WanConfig, seed: int) -> Tensor:
    """Return the initial value of the parameter `name`, CPU float32 of `shape` (Wan's own distributions).

    Linear and patch weights Xavier-uniform, text and time embeddings normal with std 0.02, modulations
    normal / sqrt(dim), norm weights 1; biases, the output head, the CLIP position embedding and VACE's
    projections 0.
    """
    shape = tuple(shape)
    parent, _, last = name.rpartition(".")
    layer = parent.rpartition(".")[2]
    if last == "modulation":
        return torch.randn(shape, generator=generator_at(seed, name)) / math.sqrt(config.dim)
    if last == "weight" and len(shape) == 1:
        return torch.ones(shape)
    if last in ("bias", "emb_pos") or layer in ("head", "before_proj", "after_proj"):
        return torch.zeros(shape)
    generator = generator_at(seed, name)
    if name.startswith(("text_embedding.", "time_embedding.")):
        return torch.randn(shape, generator=generator) * EMBEDDING_STD
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


class InitialWeights:
    """The initial values of a whole model as a lazy source of tensors, made one at a time."""

    def __init__(self, config: WanConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._shapes = expected_shapes(config)

    def keys(self) -> list[str]:
        """Return the native parameter names in the model's order."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return float32, the dtype of every initial value."""
        return torch.float32

    def load(self, key: str) -> Tensor:
        """Return the initial value, CPU float32."""
        return initial_tensor(key, self._shapes[key], self.config, self.seed)

    def load_part(self, key: str, start: int, length: int) -> Tensor:
        """Return elements start .. start + length of the flattened initial value."""
        return self.load(key).flatten()[start : start + length]

    def describe(self) -> str:
        """Return what this is, for the start-up lines."""
        return f"initial values of seed {self.seed}"


@torch.no_grad()
def initialise_(model: WanModel, seed: int) -> None:
    """Fill every parameter of an unsharded model with its initial value, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, model.config, seed))
