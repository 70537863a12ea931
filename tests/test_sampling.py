"""Sampling against two passes by hand, frames against their formula, the contact sheet pixel by pixel."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megawan import sampling, saving
from megawan.checkpoint import MOMENTS, CheckpointOptions, Fragment
from megawan.contact_sheet import GAP, MARGIN, TEXT_HEIGHT, Row, contact_sheet
from megawan.models.initial import InitialWeights
from megawan.models.variants import get_variant
from megawan.models.wan import WanModel
from megawan.rng import generator_at
from tests.dist_workers import world_of_one
from tests.training import LivelyWeights

SHAPE = (16, 2, 2, 4)
STEPS, SHIFT, SEED = 2, 4.0, 11
SMALL = dataclasses.replace(get_variant("debug").config, num_layers=1, dim=24, num_heads=2, ffn_dim=32)


@pytest.fixture(scope="module")
def model() -> WanModel:
    return sampling.build(LivelyWeights(SMALL, 0), SMALL, torch.device("cpu"), torch.float64)


def features(*key: int | str) -> Tensor:
    return torch.randn(SMALL.text_len, SMALL.text_dim, generator=generator_at(0, *key), dtype=torch.float64)


TEXT, EMPTY = torch.stack([features(i) for i in range(3)]), features("empty")


def sample(model: WanModel, text: Tensor, guidance: float, seed: int = SEED) -> Tensor:
    return sampling.sample_latents(
        model, text, EMPTY, SHAPE, steps=STEPS, shift=SHIFT, guidance=guidance, seed=seed
    )


def by_hand(model: WanModel, text: Tensor, start: Tensor, guidance: float) -> Tensor:
    """Return Euler's way down the shifted grid for one sample, both passes written out."""
    raw = [1 - step / STEPS for step in range(STEPS + 1)]
    sigmas = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in raw]
    x = start
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            timestep = torch.tensor([1000 * sigma], dtype=torch.float32)
            given = model.velocity(x, timestep, text[None])
            away = model.velocity(x, timestep, EMPTY[None])
            x = x + (following - sigma) * (guidance * given + (1 - guidance) * away)
    return x


def noise_of(index: int, seed: int = SEED) -> Tensor:
    return torch.randn(SHAPE, generator=generator_at(seed, "sample", index))


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.5])
def test_guided_sampling_is_two_passes_a_step(model: WanModel, guidance: float) -> None:
    found = sample(model, TEXT, guidance)
    assert found.shape == (3, *SHAPE) and found.dtype == torch.float32
    for index, one in enumerate(found):
        wanted = by_hand(model, TEXT[index], noise_of(index)[None], guidance)[0].float()
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    assert (sample(model, TEXT, 2.0) - found).abs().max() > 1e-2, "guidance must matter here"


def test_without_guidance_the_empty_text_is_not_asked(model: WanModel) -> None:
    nothing = torch.full_like(EMPTY, torch.nan)
    arguments = {"steps": STEPS, "shift": SHIFT, "seed": SEED}
    found = sampling.sample_latents(model, TEXT, nothing, SHAPE, guidance=1, **arguments)
    assert torch.equal(found, sample(model, TEXT, 1.0))
    assert sampling.sample_latents(model, TEXT, nothing, SHAPE, guidance=2, **arguments).isnan().all()


class Still:
    """A model whose velocity is zero: what comes out is the start noise."""

    def velocity(self, x_t: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


def test_the_start_noise_is_of_the_seed_and_the_place_alone(model: WanModel) -> None:
    whole = sample(Still(), TEXT, 2.0)  # type: ignore[arg-type]
    assert torch.equal(whole, torch.stack([noise_of(index) for index in range(3)]))
    assert (whole[0] - whole[1]).abs().max() > 0.5
    assert torch.equal(sample(Still(), TEXT.flip(0), 2.0), whole)  # type: ignore[arg-type]
    other = sample(Still(), TEXT, 2.0, seed=SEED + 1)  # type: ignore[arg-type]
    assert (other - whole).flatten(1).abs().amax(1).min() > 0.5
    # A smaller batch changes no sample of the real model either.
    batch = sample(model, TEXT, 2.0)
    for size in (1, 2):
        torch.testing.assert_close(sample(model, TEXT[:size], 2.0), batch[:size], rtol=1e-6, atol=1e-6)


def test_every_step_ticks(model: WanModel) -> None:
    ticks: list[int] = []
    sampling.sample_latents(
        Still(),  # type: ignore[arg-type]
        TEXT,
        EMPTY,
        SHAPE,
        steps=STEPS,
        shift=SHIFT,
        guidance=1,
        seed=0,
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == STEPS


def test_a_built_model_holds_the_source(model: WanModel) -> None:
    source = LivelyWeights(SMALL, 0)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, source.load(name).double()), name


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    with world_of_one():
        yield


def save(root: Path, step: int, variant: object, skipped: str = "", reshaped: str = "") -> Path:
    """Save a checkpoint of the debug variant's initial weights, perhaps with a parameter missing or
    reshaped."""
    source = InitialWeights(get_variant("debug").config, step)
    parts = [
        Fragment(kind, name, (1,) if name == reshaped else source.shape(name), 0, values)
        for name in source.keys()
        if name != skipped
        for values in [source.load(name).flatten()[: 1 if name == reshaped else None]]
        for kind in ("master", *MOMENTS)
    ]
    return saving.save(root, step, parts, {"variant": variant}, CheckpointOptions(keep_last=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save(folder / "checkpoints", step, "debug")
    return folder


def test_weights_come_from_the_newest_step_of_a_run(run: Path) -> None:
    older, newer = (run / "checkpoints" / f"step_000000{step}" for step in (1, 2))
    for path, step in ((run, 2), (run / "checkpoints", 2), (newer, 2), (older, 1)):
        source, wan, variant = sampling.open_model_weights(path)
        assert (wan, variant) == (get_variant("debug").config, "debug")
        wanted = sampling.random_weights("debug", step)[0]
        for name in ("head.modulation", "patch_embedding.weight"):
            assert torch.equal(source.load(name), wanted.load(name)), path
    assert sampling.find_step_folder(run / "nothing") is None


@pytest.mark.parametrize(
    ("variant", "said"),
    [(None, "unknown model variant"), (["debug"], "unknown model variant"), ("t2v-1.3B", "t2v-1.3B has")],
)
def test_a_checkpoint_of_another_variant_is_refused(
    variant: object, said: str, run: Path, tmp_path: Path
) -> None:
    saved = run / "checkpoints" / "step_0000001"
    manifest = json.loads((saved / "manifest.json").read_text("utf-8"))
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "variant": variant}))
    (tmp_path / "rank_00000.safetensors").symlink_to(saved / "rank_00000.safetensors")
    with pytest.raises(ValueError, match=said) as refusal:
        sampling.open_model_weights(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("skipped", "reshaped", "said"),
    [
        ("head.head.bias", "", "head.head.bias is None, debug has"),
        # One number would be copied into every element.
        ("", "patch_embedding.bias", r"patch_embedding.bias is \(1,\), debug has \(144,\)"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(
    skipped: str, reshaped: str, said: str, tmp_path: Path, alone: None
) -> None:
    folder = save(tmp_path, 1, "debug", skipped, reshaped)
    with pytest.raises(ValueError, match=said) as refusal:
        sampling.open_model_weights(folder)
    assert "\n" not in str(refusal.value)


def test_frames_are_rounded_and_clamped() -> None:
    # Every byte, and values just short of half a byte around it.
    byte = torch.arange(256, dtype=torch.float64)
    for offset in (0, 0.499, -0.499):
        row = ((byte + offset) / 127.5 - 1).view(1, 1, 1, 1, 256).expand(1, 3, 1, 1, 256)
        assert sampling.to_frames(row)[0, 0, 0, :, 1].tolist() == list(range(256))
    ends = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert sampling.to_frames(ends)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_frames_have_their_channels_last() -> None:
    pixels = torch.rand(2, 3, 4, 5, 6, generator=generator_at(0, "pixels")) * 2 - 1
    frames = sampling.to_frames(pixels)
    assert frames.shape == (2, 4, 5, 6, 3) and frames.dtype == torch.uint8 and frames.is_contiguous()
    assert frames[1, 2, 3, 4, 0] == round((float(pixels[1, 0, 2, 3, 4]) + 1) * 127.5)
    assert frames[1, 2, 3, 4, 2] == round((float(pixels[1, 2, 2, 3, 4]) + 1) * 127.5)


def plain_clip(frames: int, height: int, width: int, green: int) -> np.ndarray:
    """Return a clip whose red is ten times the frame's number and whose green names the clip."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 0] = 10 * np.arange(frames)[:, None, None]
    clip[..., 1] = green
    return clip


def test_the_sheet_shows_every_clip_in_its_place() -> None:
    rows = [
        Row("one\nin two lines", (plain_clip(9, 20, 40, 1), plain_clip(9, 20, 40, 2))),
        Row("two 影片", (None, plain_clip(5, 20, 40, 3))),
    ]
    sheet = np.asarray(contact_sheet(["real", "trained"], rows, frames_shown=3, cell_height=30))
    cell = 3 * 60
    assert sheet.shape == (
        MARGIN + TEXT_HEIGHT + 2 * (TEXT_HEIGHT + 30 + MARGIN),
        MARGIN + 2 * (cell + MARGIN),
        3,
    )
    for row, column, green, reds in ((0, 0, 1, (0, 40, 80)), (0, 1, 2, (0, 40, 80)), (1, 1, 3, (0, 20, 40))):
        top = MARGIN + TEXT_HEIGHT + row * (TEXT_HEIGHT + 30 + MARGIN) + TEXT_HEIGHT
        for place, red in enumerate(reds):
            left = MARGIN + column * (cell + MARGIN) + place * 60
            assert (sheet[top : top + 30, left : left + 60 - GAP] == (red, green, 0)).all()
            assert (sheet[top : top + 30, left + 60 - GAP : left + 60] == 255).all()
    empty = MARGIN + TEXT_HEIGHT + TEXT_HEIGHT + 30 + MARGIN + TEXT_HEIGHT
    assert (sheet[empty : empty + 30, : MARGIN + cell] == 255).all()
    titles = [sheet[: MARGIN + TEXT_HEIGHT, left : left + cell] for left in (MARGIN, 2 * MARGIN + cell)]
    assert all((title < 128).any() for title in titles) and not np.array_equal(*titles)


def test_clips_of_other_proportions_keep_them() -> None:
    tall, thin = plain_clip(2, 40, 20, 1), plain_clip(2, 400, 1, 2)
    sheet = np.asarray(
        contact_sheet(["a", "b", "c"], [Row("", (tall, plain_clip(2, 20, 40, 3), thin))], 2, 30)
    )
    top, cell = MARGIN + 2 * TEXT_HEIGHT, 2 * 60
    for column, width in enumerate((15 - GAP, 60 - GAP, 1)):
        left = MARGIN + column * (cell + MARGIN)
        found = sheet[top : top + 30, left : left + 60]
        assert (found[:, :width, 1] == (1, 3, 2)[column]).all()
        assert (found[:, width:] == 255).all()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row("", (None, None))],
        [Row("", (plain_clip(2, 8, 8, 1),))],
        [Row("", (plain_clip(2, 8, 8, 1), plain_clip(0, 8, 8, 1)))],
    ],
)
def test_a_sheet_of_nothing_is_refused(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="needs rows of 2 clips"):
        contact_sheet(["a", "b"], rows)
