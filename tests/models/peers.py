"""Small models of ours beside their diffusers twins: the same weights, the same inputs."""

import dataclasses
import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor

from megawan.models.keys import to_diffusers
from megawan.models.variants import WanConfig
from megawan.models.wan import WanModel

TINY = WanConfig(dim=48, ffn_dim=96, freq_dim=64, num_heads=2, num_layers=2, text_dim=32)


class PeerModel(WanTransformer3DModel):
    """diffusers' model; its float32 exceptions, off here, need the accelerate package to be read at all."""

    _keep_in_fp32_modules = None


class PeerVaceModel(WanVACETransformer3DModel):
    """As PeerModel, with the VACE branch."""

    _keep_in_fp32_modules = None


def random_model(config: WanConfig, seed: int, recompute: str = "none") -> WanModel:
    """Return a float32 model in which every parameter is random, head and norms too, with outputs of order
    3."""
    model = WanModel(config, recompute=recompute)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            elif name.endswith("modulation"):
                parameter.copy_(0.5 * noise)
            else:
                gain = 2.5 if name == "head.head.weight" else 1.0
                parameter.copy_(gain * noise / math.sqrt(math.prod(parameter.shape[1:])))
    return model


def diffusers_twin(model: WanModel) -> torch.nn.Module:
    """Return the diffusers model of the same configuration holding the same weights."""
    config = model.config
    options: dict[str, Any] = {
        "patch_size": config.patch_size,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "pos_embed_seq_len": config.pos_embed_seq_len,
    }
    if config.vace_layers:
        options |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.vace_in_dim}
        twin = WanVACETransformer3DModel(**options)
    else:
        twin = WanTransformer3DModel(**options)
    twin.load_state_dict({to_diffusers(key): value for key, value in model.state_dict().items()}, strict=True)
    return twin


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch for a configuration."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    clean_frames: int = 0
    clip: Tensor | None = None
    condition: Tensor | None = None
    vace: Tensor | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        """Return the inputs in `dtype`; the time has at least float32."""
        moved = {
            field.name: value.to(
                device, torch.promote_types(dtype, torch.float32) if field.name == "timestep" else dtype
            )
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def ours(self, model: WanModel) -> Tensor:
        """Return our velocity [B, C, T, H, W]."""
        return model.velocity(
            self.latents,
            self.timestep,
            self.text,
            clean_frames=self.clean_frames,
            clip=self.clip,
            condition=self.condition,
            vace=self.vace,
        )

    def theirs(self, twin: torch.nn.Module) -> Tensor:
        """Return the velocity of the diffusers twin."""
        hidden = self.latents if self.condition is None else torch.cat((self.latents, self.condition), 1)
        timestep = self.timestep
        if self.clean_frames:
            batch, _, frames, height, width = self.latents.shape
            timestep = timestep[:, None, None].repeat(1, frames, height * width // 4)
            timestep[:, : self.clean_frames] = 0
            timestep = timestep.reshape(batch, -1)
        images = self.clip
        if images is not None and images.shape[1] == 514:
            images = images.reshape(-1, 257, images.shape[-1])
        extra = {} if self.vace is None else {"control_hidden_states": self.vace}
        output: Tensor = twin(hidden, timestep, self.text, images, return_dict=False, **extra)[0]
        return output


def random_inputs(
    config: WanConfig, *, batch: int, latent: tuple[int, int, int], seed: int, clean_frames: int = 0
) -> Inputs:
    """Return random inputs of this configuration; latent is (T, H, W)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    extra = config.in_dim - config.out_dim
    return Inputs(
        latents=draw(batch, config.out_dim, *latent),
        timestep=torch.rand(batch, generator=generator) * 1000,
        text=draw(batch, config.text_len, config.text_dim),
        clean_frames=clean_frames,
        clip=draw(batch, config.clip_tokens, config.image_dim)
        if config.image_dim and config.clip_tokens
        else None,
        condition=draw(batch, extra, *latent) if extra else None,
        vace=draw(batch, config.vace_in_dim, *latent) if config.vace_layers else None,
    )
