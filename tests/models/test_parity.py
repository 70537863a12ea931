"""Our forward and backward beside diffusers', and beside numbers that need no library."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megawan.models.keys import to_diffusers
from megawan.models.variants import WanConfig
from megawan.models.wan import WanModel
from tests.models.peers import TINY, diffusers_twin, random_inputs, random_model

replace = dataclasses.replace
I2V = replace(TINY, model_type="i2v", in_dim=36, image_dim=64)
FLF2V = replace(I2V, model_type="flf2v", pos_embed_seq_len=514)
TI2V = replace(TINY, model_type="ti2v", in_dim=48, out_dim=48)
CONTROL = replace(I2V, in_dim=48)
VACE = replace(TINY, model_type="vace", num_layers=5, vace_layers=(0, 1, 3), vace_in_dim=20)

CASES = {
    "t2v": (TINY, 2, (3, 4, 6), 0),
    "t2v, odd grid": (TINY, 1, (5, 6, 10), 0),
    "t2v, one frame": (TINY, 3, (1, 2, 14), 0),
    "t2v, one token": (TINY, 1, (1, 2, 2), 0),
    "t2v, wide, 5 heads of 12": (
        replace(TINY, dim=60, num_heads=5, ffn_dim=100, num_layers=3),
        2,
        (3, 6, 6),
        0,
    ),
    "t2v, 3 heads of 128": (replace(TINY, dim=384, num_heads=3, num_layers=1), 1, (2, 6, 4), 0),
    "t2v, 2 heads of 16": (replace(TINY, dim=32, freq_dim=256), 2, (7, 4, 4), 0),
    "t2v, few text rows": (replace(TINY, text_len=20), 2, (3, 4, 4), 0),
    "i2v": (I2V, 2, (3, 4, 6), 0),
    "i2v, odd grid": (I2V, 1, (3, 6, 14), 0),
    "flf2v": (FLF2V, 2, (3, 4, 6), 0),
    "control": (CONTROL, 2, (2, 6, 6), 0),
    "ti2v, image": (TI2V, 2, (3, 4, 6), 1),
    "ti2v, image, odd grid": (TI2V, 1, (4, 6, 10), 1),
    "ti2v, two clean frames": (TI2V, 2, (4, 4, 4), 2),
    "ti2v, all frames clean": (TI2V, 1, (2, 4, 4), 2),
    "ti2v, text only": (TI2V, 2, (3, 4, 6), 0),
    "A14B i2v": (replace(TINY, model_type="i2v", in_dim=36), 2, (3, 4, 6), 0),
    "vace": (VACE, 2, (3, 4, 6), 0),
    "vace, odd grid": (replace(VACE, num_layers=3, vace_layers=(0, 2)), 1, (3, 6, 10), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_diffusers(case: str) -> None:
    config, batch, latent, clean_frames = CASES[case]
    ours = random_model(config, seed=1)
    theirs = diffusers_twin(ours)
    inputs = random_inputs(config, batch=batch, latent=latent, seed=2, clean_frames=clean_frames)
    got, expected = inputs.ours(ours), inputs.theirs(theirs)
    assert 1.5 < expected.abs().mean() < 4
    assert (got - expected).abs().max() <= 5e-5

    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    for out in (got, expected):
        ((out * weights).sum() / out.numel() ** 0.5).backward()  # gradients of order 1 and more
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        mine, other = parameter.grad, peers[to_diffusers(name)].grad
        assert mine is not None and other is not None, name
        assert (mine - other).abs().max() <= 5e-5 * max(1.0, float(other.abs().max())), name


def test_vace_scale_weighs_the_hints() -> None:
    model = random_model(VACE, seed=1)
    twin = diffusers_twin(model)
    x = random_inputs(VACE, batch=1, latent=(2, 4, 4), seed=2)
    ours = model.velocity(x.latents, x.timestep, x.text, vace=x.vace, vace_scale=0.3)
    theirs = twin(
        x.latents,
        x.timestep,
        x.text,
        control_hidden_states=x.vace,
        control_hidden_states_scale=torch.full((3,), 0.3),
        return_dict=False,
    )[0]
    assert (ours - theirs).abs().max() <= 5e-5


def cosine(shape: tuple[int, ...], a: float, b: float) -> Tensor:
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.cos(a * k + b).float().view(shape)


def golden_model(config: WanConfig) -> WanModel:
    """Return the model whose weights are sines, numbered by the sorted diffusers keys."""
    model = WanModel(config)
    tensors = {to_diffusers(key): tensor for key, tensor in model.state_dict().items()}
    raised = ("norm_q.weight", "norm_k.weight", "norm_added_k.weight", "norm1.weight", "norm2.weight")
    for index, key in enumerate(sorted(tensors)):
        tensor = tensors[key]
        k = torch.arange(tensor.numel(), dtype=torch.float64)
        value = (0.05 if tensor.ndim > 1 else 0.02) * torch.sin(0.37 * k + 1.3 * index)
        tensor.copy_((value.float() + (1.0 if key.endswith(raised) else 0.0)).view(tensor.shape))
    return model


GOLDEN_CONFIG = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32)


@pytest.mark.parametrize(
    ("config", "clean_frames", "parameters", "total", "mean", "first"),
    [
        (GOLDEN_CONFIG, 0, 87_376, 0.013721, 0.045564, [-0.059203, 0.05774, -0.060901, 0.047748, -0.061275]),
        (GOLDEN_CONFIG, 1, 87_376, 0.011911, 0.044628, [-0.063454, 0.051707, -0.063951, 0.041109, -0.063013]),
        (
            replace(GOLDEN_CONFIG, model_type="i2v", in_dim=36, image_dim=1280),
            0,
            1_804_544,
            -1.178914,
            0.109962,
            [0.014866, 0.183061, 0.01266, 0.179438, 0.008989],
        ),
    ],
    ids=["t2v", "ti2v", "i2v"],
)
def test_golden_outputs(
    config: WanConfig, clean_frames: int, parameters: int, total: float, mean: float, first: list[float]
) -> None:
    model = golden_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    x = cosine((1, config.in_dim, 3, 4, 6), 0.11, 0.5)
    with torch.no_grad():
        out = model.velocity(
            x[:, :16],
            torch.tensor([500.0]),
            cosine((1, 512, 32), 0.07, 0.1),
            clean_frames=clean_frames,
            clip=cosine((1, 257, 1280), 0.013, 0.2) if config.has_clip else None,
            condition=x[:, 16:] if config.in_dim > 16 else None,
        )
    assert out.flatten()[:5].tolist() == pytest.approx(first, abs=2e-6)
    assert float(out.sum()) == pytest.approx(total, abs=1e-4)
    assert float(out.abs().mean()) == pytest.approx(mean, abs=2e-6)


class DoubleSinusoid(torch.nn.Module):
    """The time's sinusoids as Wan's own code computes them, in float64; diffusers' are float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        places = torch.arange(self.dim // 2, dtype=torch.float64)
        angles = timestep.double()[..., None] * torch.pow(10_000.0, -places / (self.dim // 2))
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


@pytest.mark.parametrize("seed", range(4))
def test_most_of_what_differs_is_the_rounding_of_diffusers_sinusoids(seed: int) -> None:
    """At held-out times and weights stock diffusers is up to 7e-5 away; ours is Wan's own float64."""
    ours = random_model(replace(TINY, dim=128, num_heads=1, freq_dim=256, num_layers=3), seed=seed)
    theirs = diffusers_twin(ours)
    inputs = random_inputs(ours.config, batch=2, latent=(3, 6, 10), seed=seed)
    with torch.no_grad():
        got, stock = inputs.ours(ours), inputs.theirs(theirs)
        theirs.condition_embedder.timesteps_proj = DoubleSinusoid(256)
        exact = inputs.theirs(theirs)
    assert (got - exact).abs().max() <= 1e-5 < (got - stock).abs().max() < 2e-4
