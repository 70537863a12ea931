"""Masks, image latents, control and VACE contexts: against diffusers' pipelines and against literal loops."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megawan.flow.conditioning import (
    control_condition,
    image_clip,
    image_condition,
    image_mask,
    latent_frames,
    put_clean_frames,
    vace_context,
    vace_mask,
    vace_split,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class PickingVae(nn.Module):
    """Stands for the VAE: every fourth frame and every eighth pixel, in a "latent" of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = SimpleNamespace(z_dim=3, latents_mean=[0.1, -0.2, 0.3], latents_std=[1.5, 0.5, 2.0])
        self.seen: list[torch.Tensor] = []

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        self.seen.append(video)
        return SimpleNamespace(latents=video[:, :, ::4, ::8, ::8])

    def normalised(self, video: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.config.latents_mean).view(1, 3, 1, 1, 1)
        std = torch.tensor(self.config.latents_std).view(1, 3, 1, 1, 1)
        return (video[:, :, ::4, ::8, ::8] - mean) * (1 / std)


@pytest.fixture
def pipe() -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(
        vae=PickingVae(),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))),
    )


@pytest.mark.parametrize("frames", [5, 9, 13])
@pytest.mark.parametrize("with_last", [False, True])
def test_i2v_and_flf2v_conditions_are_diffusers(pipe: SimpleNamespace, frames: int, with_last: bool) -> None:
    from diffusers import WanImageToVideoPipeline

    first, last = noise(1, 3, 16, 32), noise(1, 3, 16, 32, seed=1)
    last_or_none = last if with_last else None
    latents, theirs = WanImageToVideoPipeline.prepare_latents(
        pipe,
        first,
        batch_size=1,
        num_channels_latents=3,
        height=16,
        width=32,
        num_frames=frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        latents=torch.zeros(1, 3, latent_frames(frames), 2, 4),
        last_image=last_or_none,
    )
    clip = image_clip(first, frames, last_or_none)
    assert torch.equal(clip, pipe.vae.seen[0])
    assert torch.equal(image_condition(pipe.vae.normalised(clip), last=with_last), theirs)


def test_the_ti2v_frame_is_put_like_diffusers_masks_it(pipe: SimpleNamespace) -> None:
    from diffusers import WanImageToVideoPipeline

    pipe.config.expand_timesteps = True
    first, x_t = noise(1, 3, 16, 32), noise(1, 3, 3, 2, 4, seed=2)
    latents, condition, mask = WanImageToVideoPipeline.prepare_latents(
        pipe, first, 1, 3, 16, 32, 9, torch.float32, torch.device("cpu"), latents=x_t
    )
    assert torch.equal(put_clean_frames(x_t, condition), (1 - mask) * condition + mask * latents)


@pytest.mark.parametrize("references", [0, 1, 2])
def test_the_vace_context_is_diffusers(pipe: SimpleNamespace, references: int) -> None:
    from diffusers import WanVACEPipeline

    video, mask = (
        noise(1, 3, 9, 16, 32),
        torch.rand(1, 1, 9, 16, 32, generator=torch.Generator().manual_seed(3)),
    )
    images = [noise(3, 16, 32, seed=4 + i) for i in range(references)]
    # diffusers puts each next reference before the last one; ours keeps their order, as Wan's own code does.
    theirs = torch.cat(
        [
            WanVACEPipeline.prepare_video_latents(
                pipe, video, mask.expand(-1, 3, -1, -1, -1), [images[::-1]], device=torch.device("cpu")
            ),
            WanVACEPipeline.prepare_masks(pipe, mask, [images]),
        ],
        dim=1,
    )
    inactive, reactive = (pipe.vae.normalised(part) for part in vace_split(video, mask))
    encoded = [pipe.vae.normalised(image[None, :, None]) for image in images]
    ours = vace_context(inactive, reactive, vace_mask(mask), torch.cat(encoded, dim=2) if encoded else None)
    assert ours.shape == (1, 3 + 3 + 64, references + 3, 2, 4)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frames", [1, 5, 81])
@pytest.mark.parametrize("last", [False, True])
def test_the_image_mask_marks_the_given_pixel_frames(frames: int, last: bool) -> None:
    if last and frames == 1:
        with pytest.raises(ValueError, match="at least 5 frames"):
            image_mask(frames, 2, 3, last=last)
        return
    mask = image_mask(frames, 2, 3, last=last)
    assert mask.shape == (4, latent_frames(frames), 2, 3) and mask.dtype == torch.float32
    given = {0, frames - 1} if last else {0}
    for time in range(mask.shape[1]):
        for channel in range(4):
            pixel_frame = 0 if time == 0 else 4 * time - 3 + channel
            assert bool((mask[channel, time] == float(pixel_frame in given)).all())
    assert int(mask[:, :, 0, 0].sum()) == (5 if last else 4)


def test_a_condition_has_mask_then_latent_in_the_latents_dtype() -> None:
    latent = noise(2, 16, 3, 2, 4).to(torch.bfloat16)
    condition = image_condition(latent)
    assert condition.shape == (2, 20, 3, 2, 4) and condition.dtype == torch.bfloat16
    assert torch.equal(condition[:, 4:], latent)
    assert torch.equal(condition[1, :4].float(), image_mask(9, 2, 4))


def test_the_vace_mask_is_its_pixels_and_the_nearest_frames() -> None:
    mask = torch.rand(2, 1, 9, 16, 24, generator=torch.Generator().manual_seed(6))
    made = vace_mask(mask)
    assert made.shape == (2, 64, 3, 2, 3)
    for time in range(3):
        frame = int((time + 0.5) * 9 / 3)
        for row in range(8):
            for column in range(8):
                assert torch.equal(made[:, row * 8 + column, time], mask[:, 0, frame, row::8, column::8])


def test_the_vace_split_loses_no_pixel() -> None:
    video, mask = noise(2, 3, 5, 8, 8), torch.rand(2, 1, 5, 8, 8, generator=torch.Generator().manual_seed(6))
    inactive, reactive = vace_split(video, mask)
    assert torch.equal(inactive + reactive, video)
    made = (mask > 0.5).expand_as(video)
    assert bool((inactive[made] == 0).all()) and bool((reactive[~made] == 0).all())
    assert torch.equal(reactive[made], video[made])


def test_control_conditions_have_control_then_image() -> None:
    control, condition = noise(2, 16, 3, 2, 4), image_condition(noise(2, 16, 3, 2, 4, seed=1))
    in_48 = control_condition(control, condition)
    assert torch.equal(in_48, torch.cat([control, condition[:, 4:]], dim=1))
    in_52 = control_condition(control, condition, image_channels=20)
    assert torch.equal(in_52, torch.cat([control, condition], dim=1))
    alone = control_condition(control)
    assert (
        torch.equal(alone[:, :16], control) and alone.shape[1] == 32 and float(alone[:, 16:].abs().max()) == 0
    )


def test_clean_frames_leave_their_source_and_the_rest_alone() -> None:
    x_t, clean = noise(2, 3, 4, 2, 2), noise(2, 3, 4, 2, 2, seed=1)
    before = x_t.clone()
    made = put_clean_frames(x_t, clean)
    assert torch.equal(made[:, :, 0], clean[:, :, 0]) and torch.equal(made[:, :, 1:], x_t[:, :, 1:])
    assert torch.equal(x_t, before)
    one_for_all = put_clean_frames(x_t, clean[:1], 2)
    assert torch.equal(one_for_all[1, :, :2], clean[0, :, :2])


def test_what_does_not_fit_is_refused() -> None:
    latent, image = torch.zeros(1, 16, 3, 2, 4), torch.zeros(1, 3, 16, 32)
    for frames in (0, 2, 4, 7, 80):
        with pytest.raises(ValueError, match=f"must be 4n \\+ 1 .*, got {frames}"):
            image_clip(image, frames)
    with pytest.raises(ValueError, match="one frame cannot be first and last"):
        image_clip(image, 1, image)
    with pytest.raises(ValueError, match="first and last must have one shape"):
        image_clip(image, 5, image[..., :16])
    with pytest.raises(ValueError, match=r"first must be \[B, 3, H, W\]"):
        image_clip(image[0], 5)
    with pytest.raises(ValueError, match=r"image_latent must be \[B, C, T, h, w\]"):
        image_condition(latent[0])
    for clean in (
        latent[:, :, :1, :1],
        latent[:, :8, :1],
        latent[:, :, :0],
        latent[:, :, :1].expand(3, -1, -1, -1, -1),
    ):
        with pytest.raises(ValueError, match="the clean frames must have shape"):
            put_clean_frames(latent, clean)
    with pytest.raises(ValueError, match="image must have at least 20 channels"):
        control_condition(latent, latent, image_channels=20)
    with pytest.raises(ValueError, match="the control latent's batch and grid"):
        control_condition(latent, latent[:, :, :2])
    with pytest.raises(ValueError, match="image_channels must be at least 1"):
        control_condition(latent, latent, image_channels=0)
    with pytest.raises(ValueError, match=r"mask \[B, 1, F, H, W\]"):
        vace_split(torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8, got 12×8"):
        vace_mask(torch.zeros(1, 1, 5, 12, 8))
    with pytest.raises(ValueError, match=r"must be 4n \+ 1"):
        vace_mask(torch.zeros(1, 1, 6, 8, 8))
    with pytest.raises(ValueError, match="reactive must have inactive's shape"):
        vace_context(latent, latent, torch.zeros(1, 16, 3, 2, 4))
    with pytest.raises(ValueError, match="references must be"):
        vace_context(latent, latent, torch.zeros(1, 64, 3, 2, 4), latent[:, :8])
