"""Sampling against diffusers: its own pipeline with one model and with two experts, its schedulers in a loop
for images; and the same videos over ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from megawan.models.variants import WanConfig
from megawan.models.wan import WanModel
from megawan.sampling import Experts, Given, sample_latents
from megawan.solvers import integrate, multistep
from tests.distributed import run_distributed
from tests.models.peers import TINY, Inputs, diffusers_twin, random_inputs, random_model
from tests.sampling_workers import sampled

GRID = (2, 4, 6)  # latent frames, height, width: 5 frames of 32 x 48 pixels
STEPS, SEED = 10, 5


def inputs(config: WanConfig, seed: int) -> Inputs:
    return random_inputs(config, batch=1, latent=GRID, seed=seed)


def noise(channels: int = 16) -> Tensor:
    """Return what sampling starts from, as sample_latents draws it."""
    asked: list[Tensor] = []

    class Still:
        def velocity(self, x_t: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            asked.append(x_t)
            return torch.zeros_like(x_t)

    text = torch.zeros(1, 1, 1)
    sample_latents(
        Still(),  # type: ignore[arg-type]
        text,
        text[0],
        (channels, *GRID),
        steps=1,
        shift=1,
        guidance=1,
        seed=SEED,
    )
    return asked[0]


def euler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, STEPS + 1)[:-1])
    return scheduler


@torch.no_grad()
def by_loop(scheduler: Any, model: WanModel, told: Inputs, empty: Tensor, guidance: float) -> Tensor:
    """Return diffusers' twin in a plain loop of a diffusers scheduler."""
    twin, x = diffusers_twin(model).eval(), noise(model.config.out_dim)
    clean = told.latents[:, :, :1]
    for timestep in scheduler.timesteps:
        if told.clean_frames:
            x = torch.cat((clean, x[:, :, 1:]), dim=2)
        velocities = [
            Inputs(x, timestep.float().view(1), text, told.clean_frames, told.clip, told.condition).theirs(
                twin
            )
            for text in (told.text, empty)
        ]
        v = velocities[1] + guidance * (velocities[0] - velocities[1])
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return torch.cat((clean, x[:, :, 1:]), dim=2) if told.clean_frames else x


CONFIGS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": {"model_type": "i2v", "in_dim": 36, "image_dim": 1280},
    "i2v-A14B": {"model_type": "i2v", "in_dim": 36},
    "ti2v": {"model_type": "ti2v", "in_dim": 48, "out_dim": 48},
}


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ten_steps_are_those_of_diffusers(name: str, solver: str) -> None:
    import dataclasses

    config = dataclasses.replace(TINY, **CONFIGS[name])
    model = random_model(config, 1).eval()
    told = dataclasses.replace(inputs(config, 2), clean_frames=int(name == "ti2v"))
    empty = inputs(config, 3).text
    if solver == "euler":
        scheduler = euler(shift=3.0)
    else:
        scheduler = multistep(solver, 3.0)
        scheduler.set_timesteps(STEPS)
    wanted = by_loop(scheduler, model, told, empty, guidance=2.5)
    found = sample_latents(
        model,
        told.text,
        empty[0],
        (config.out_dim, *GRID),
        steps=STEPS,
        shift=3.0,
        guidance=2.5,
        seed=SEED,
        solver=solver,  # type: ignore[arg-type]
        given=Given(
            clean=told.latents[:, :, :1] if told.clean_frames else None,
            clip=told.clip,
            condition=told.condition,
        ),
    )
    assert (found - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    if told.clean_frames:
        assert torch.equal(found[:, :, :1], told.latents[:, :, :1])
    assert (wanted - noise(config.out_dim)).abs().max() > 1


@pytest.mark.parametrize("experts", [1, 2])
@torch.no_grad()
def test_the_pipeline_of_diffusers_gives_the_same(experts: int) -> None:
    models = [random_model(TINY, seed).eval() for seed in range(experts)]
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=multistep("unipc", 12.0),
        transformer=diffusers_twin(models[0]).eval(),
        transformer_2=diffusers_twin(models[1]).eval() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    text, empty = inputs(TINY, 2).text, inputs(TINY, 3).text
    wanted = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        latents=noise(),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        guidance_scale_2=3.0 if experts == 2 else None,
        output_type="latent",
    ).frames
    opened: list[int] = []

    def opener(index: int) -> Any:
        def open_model() -> WanModel:
            opened.append(index)
            return models[index]

        return open_model

    found = sample_latents(
        Experts([opener(index) for index in range(experts)], [4.0, 3.0][:experts]),
        text,
        empty[0],
        (16, *GRID),
        steps=STEPS,
        shift=12.0,
        guidance=4.0,
        seed=SEED,
        solver="unipc",
        boundary=0.875 if experts == 2 else None,
    )
    assert (found - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    assert opened == list(range(experts)), "an expert is opened once, when its turn comes"


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match="no solver 'heun'; legal: euler, unipc, dpm"):
        integrate(lambda x, t: x, torch.zeros(1, 1, 1, 1, 1), solver="heun", steps=1, shift=1)  # type: ignore[arg-type]


def test_every_layout_samples_the_same_video() -> None:
    first, second = run_distributed("tests.sampling_workers:layouts", 2, timeout=120)
    assert first == second and len(first) == 2
    wanted = sampled(None, 1)
    for layout, videos in first.items():
        assert videos.keys() == wanted.keys() and len(videos) == 4
        for name, video in videos.items():
            difference = (torch.tensor(video) - torch.tensor(wanted[name])).abs().max()
            assert difference < 1e-5, (layout, name)
