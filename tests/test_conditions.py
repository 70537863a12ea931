"""What image-to-video models are told: masks, image latents and CLIP rows by recipe, from clip to step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from megawan.conditions import ImageConditions, open_conditions
from megawan.data.batch import collate
from megawan.data.encoding import ClipSize, encode
from megawan.data.latents import LatentStore
from megawan.data.loader import make_loader
from megawan.data.manifest import read_manifest
from megawan.data.synthetic import SyntheticLatents
from megawan.data.video import write_mp4
from megawan.encode_options import EncodeOptions, open_image
from megawan.encoders.dct import DctCodec
from megawan.encoders.image import ImageEncoder
from megawan.encoders.text import TextEncoder
from megawan.models.variants import get_variant
from megawan.rng import generator_at
from tests.commands import ROOT, command
from tools.encode_dataset import main as encode_dataset

SIZE = ClipSize(5, 32, 32, None)


@pytest.fixture(scope="module")
def images() -> ImageEncoder:
    return ImageEncoder.debug()


def clips() -> Tensor:
    return torch.rand(2, 3, 9, 32, 48, generator=generator_at(0, "clips")) * 2 - 1


def recipe_mask(frames: int, height: int, width: int, last: bool) -> Tensor:
    """The mask as the facts write it: frame 0 four times, viewed as groups of four, transposed."""
    mask = torch.zeros(1, frames, height, width)
    mask[:, 0] = 1
    if last:
        mask[:, -1] = 1
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, (frames + 3) // 4, 4, height, width).transpose(1, 2)[0]


@pytest.mark.parametrize("last", [False, True])
def test_conditions_are_mask_and_latents_of_the_given_frames_before_grey(last: bool) -> None:
    codec, pixels = DctCodec(), clips()
    found = ImageConditions(codec, last).encode(pixels)
    assert set(found) == {"condition"}
    condition = found["condition"]
    assert condition.shape == (2, 20, 3, 4, 6)
    given = torch.zeros_like(pixels)
    given[:, :, 0] = pixels[:, :, 0]
    if last:
        given[:, :, 8] = pixels[:, :, 8]
    for sample in range(2):
        assert torch.equal(condition[sample, :4], recipe_mask(9, 4, 6, last))
    assert condition[0, :4, 0].eq(1).all() and condition[0, :3, 2].eq(0).all()
    assert condition[0, 3, 2].eq(1 if last else 0).all()
    torch.testing.assert_close(condition[:, 4:], codec.encode(given))
    assert not torch.equal(condition[:, 4:], codec.encode(pixels))


def test_clip_rows_are_of_the_first_frame_and_for_flf2v_of_the_last_too(images: ImageEncoder) -> None:
    pixels = clips()
    first, last = images.encode(pixels[:, :, 0]), images.encode(pixels[:, :, 8])
    assert torch.equal(ImageConditions(DctCodec(), False, images).encode(pixels)["clip"], first)
    both = ImageConditions(DctCodec(), True, images, clip_of_last=True).encode(pixels)["clip"]
    assert both.shape == (2, 514, 1280)
    assert torch.equal(both[:, :257], first) and torch.equal(both[:, 257:], last)


@pytest.mark.parametrize(
    ("variant", "encoder", "kind", "rows"),
    [
        ("i2v-14B-480P", "debug", "i2v", 257),
        ("flf2v-14B", "debug", "flf2v", 514),
        ("fun-inp-1.3B", "debug", "flf2v", 257),
        ("i2v-A14B-high", None, "i2v", 0),
    ],
)
def test_every_image_variant_gets_what_its_model_reads(
    variant: str, encoder: str | None, kind: str, rows: int
) -> None:
    wan = get_variant(variant)
    conditions = open_conditions(wan, DctCodec(), encoder, "cpu")
    assert conditions is not None
    assert (conditions.settings["condition"], conditions.settings["clip_tokens"]) == (kind, rows)
    found = conditions.encode(clips()[:1, :, :5, :16, :16])
    assert found["condition"].shape[1] == wan.condition_channels
    assert (found["clip"].shape[1] if rows else "clip" not in found) == (rows or True)
    assert rows == (wan.config.clip_tokens or 0)


def test_text_variants_get_nothing_and_wrong_requests_are_refused(tmp_path: Path) -> None:
    assert open_conditions(get_variant("t2v-14B"), DctCodec(), None, "cpu") is None
    for variant, encoder, said in (
        ("i2v-14B-480P", None, "reads CLIP features: give --image_encoder"),
        ("i2v-A14B-low", "debug", "no CLIP branch"),
        ("t2v-14B", "debug", "no CLIP branch"),
        ("ti2v-5B", None, r"48 channels.*the codec gives 16.*--codec wan2\.2"),
        ("vace-1.3B", None, "vace conditions of vace-1.3B cannot be encoded here; legal: t2v-1.3B"),
        ("fun-control-14B", None, "control conditions"),
        ("debug-i2v", str(tmp_path / "nowhere"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            open_conditions(get_variant(variant), DctCodec(), encoder, "cpu")
    narrow = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    CLIPVisionModel(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"gives 5 rows of 32, Wan reads 257 of 1280"):
        open_conditions(get_variant("debug-i2v"), DctCodec(), str(tmp_path / "narrow"), "cpu")


def manifest_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        write_mp4(folder / f"{number}.mp4", pixels, 16)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    return folder


def test_conditions_travel_from_the_clip_to_the_batch(tmp_path: Path, images: ImageEncoder) -> None:
    manifest = read_manifest(manifest_of(tmp_path / "clips", 3))
    conditions = ImageConditions(DctCodec(), True, images, clip_of_last=True)
    seen: list[dict[str, Tensor]] = []

    class Watching:
        settings = conditions.settings

        def encode(self, pixels: Tensor) -> dict[str, Tensor]:
            seen.append(conditions.encode(pixels))
            return seen[-1]

    text, path, cpu = TextEncoder.debug(), tmp_path / "store", torch.device("cpu")

    def fill(watched: Watching | None) -> LatentStore:
        report = encode(manifest, path, DctCodec(), "dct", text, SIZE, 32, device=cpu, conditions=watched)
        assert report.store is not None
        return report.store

    store = fill(Watching())
    assert len(seen) == 3 and (store.condition, store.clip_tokens) == ("flf2v", 514)
    assert "flf2v condition, clip 514" in store.describe()
    loader = make_loader(
        LatentStore(path),
        seed=0,
        micro_batch=3,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        text_len=32,
        prompt_dropout=1.0,
        start_step=0,
        workers=0,
    )
    (batch,) = next(loader)
    assert batch.clip is not None and batch.condition is not None
    for place, number in enumerate(batch.sample_ids.tolist()):
        assert torch.equal(batch.clip[place], seen[number]["clip"][0])
        assert torch.equal(batch.condition[place], seen[number]["condition"][0])
    # A store of text alone is not mixed with one of conditions.
    with pytest.raises(ValueError, match="condition: there 'flf2v', asked None"):
        fill(None)


def test_synthetic_samples_can_have_conditions_and_are_otherwise_the_same() -> None:
    asked: dict[str, Any] = {"shape": (16, 2, 4, 6), "text_dim": 8, "text_len": 4, "seed": 3, "count": 2}
    plain = SyntheticLatents(**asked)
    full = SyntheticLatents(**asked, condition_channels=20, clip=(257, 1280))
    assert plain[1].condition is None and plain[1].clip is None
    batch = collate([full[0], full[1]], [0, 1], [0, 0], 4)
    assert batch.condition is not None and batch.condition.shape == (2, 20, 2, 4, 6)
    assert batch.clip is not None and batch.clip.shape == (2, 257, 1280)
    assert not torch.equal(batch.condition[0], batch.condition[1])
    again = SyntheticLatents(**asked, condition_channels=20, clip=(257, 1280))[1]
    assert again.clip is not None and torch.equal(again.clip, batch.clip[1])
    assert torch.equal(full[1].latents, plain[1].latents) and torch.equal(full[1].text, plain[1].text)
    assert plain.fingerprint != full.fingerprint and "condition [20, 2, 4, 6]" in full.describe()
    with pytest.raises(ValueError, match="some have clip features and some have none"):
        collate([full[0], plain[1]], [0, 1], [0, 0], 4)


def test_a_store_with_conditions_trains_an_image_model(tmp_path: Path) -> None:
    manifest_of(tmp_path / "clips", 2)
    size = ("--num_frames", "5", "--height", "32", "--width", "32")
    words = ("--input", "clips", "--output", "store", "--codec", "dct", *size)
    tool = ROOT / "tools/encode_dataset.py"
    short = command(tool, *words, "--variant", "debug-i2v", cwd=tmp_path)
    assert short.code == 2 and "--image_encoder" in short.err and short.err.count("\n") == 1, short.err
    assert not (tmp_path / "store").exists()
    done = command(tool, *words, "--variant", "debug-i2v", "--image_encoder", "debug", cwd=tmp_path)
    assert done.code == 0, done.err[-2000:]
    assert "i2v condition, clip 257" in done.out
    run = (
        "--variant",
        "debug-i2v",
        "--data.path",
        "store",
        "--output",
        "run",
        "--steps",
        "2",
        "--micro_batch",
        "2",
    )
    trained = command(ROOT / "megawan/train.py", *run, cwd=tmp_path, timeout=300)
    assert trained.code == 0, trained.err[-3000:]
    assert "step 2/2 | loss " in trained.out and "nan" not in trained.out


def test_a_store_without_clip_features_trains_an_a14b_image_model(tmp_path: Path) -> None:
    manifest_of(tmp_path / "clips", 2)
    size = ("--num_frames", "5", "--height", "32", "--width", "32")
    words = ("--input", str(tmp_path / "clips"), "--output", str(tmp_path / "store"), "--codec", "dct", *size)
    encode_dataset([*words, "--variant", "debug-i2v-A14B-high"])
    store = LatentStore(tmp_path / "store")
    assert store.describe().endswith("i2v condition")
    sample = store[0]
    assert sample.clip is None and sample.condition is not None and sample.condition.shape == (20, 2, 4, 4)
    run = ("--variant", "debug-i2v-A14B-high", "--data.path", "store", "--output", "run", "--steps", "2")
    trained = command(ROOT / "megawan/train.py", *run, cwd=tmp_path, timeout=300)
    assert trained.code == 0, trained.err[-3000:]
    assert "step 2/2 | loss " in trained.out and "nan" not in trained.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_encoder": "debug"}, "name one with --variant"),
        ({"variant": "i2v-15B"}, "i2v-14B-480P"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    flags = {name: value for name, value in options.items() if name != "variant"}
    with pytest.raises(ValueError, match=said):
        open_image(EncodeOptions(**flags), options.get("variant"), DctCodec(), torch.device("cpu"))
