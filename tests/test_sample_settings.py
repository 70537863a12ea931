"""What a sampling run is made of: the authors' settings unless told otherwise, and one line for what does not
fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megawan.encoders.opening import open_codec
from megawan.models.initial import InitialWeights
from megawan.models.variants import VARIANTS, get_variant
from megawan.sample_settings import (
    EncoderOptions,
    Images,
    SampleOptions,
    check_encoders,
    check_images,
    codec_name,
    encode_images,
    given_shapes,
    open_text,
    resolve,
)
from tests.commands import ROOT, command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a file of random weights for each of some debug variants."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name in ("debug", "debug-i2v", "debug-flf2v", "debug-control", "debug-A14B-high", "debug-A14B-low"):
        source = InitialWeights(get_variant(name).config, 0)
        files[name] = folder / f"{name}.safetensors"
        save_file(
            {key: source.load(key) for key in source.keys()}, files[name], {"format": "pt", "variant": name}
        )
    return files


def test_the_authors_settings_are_those_of_the_models_pages() -> None:
    """Steps, shift, guidance, frames, size and rate as Wan's own code sets them."""
    published = {
        "t2v-14B": (50, 5.0, 5.0, 81, 480, 832, 16),
        "i2v-14B-480P": (40, 3.0, 5.0, 81, 480, 832, 16),
        "i2v-14B-720P": (40, 5.0, 5.0, 81, 720, 1280, 16),
        "flf2v-14B": (50, 16.0, 5.0, 81, 720, 1280, 16),
        "t2v-A14B-high": (40, 12.0, 4.0, 81, 480, 832, 16),
        "t2v-A14B-low": (40, 12.0, 3.0, 81, 480, 832, 16),
        "i2v-A14B-high": (40, 5.0, 3.5, 81, 480, 832, 16),
        "ti2v-5B": (50, 5.0, 5.0, 121, 704, 1280, 24),
    }
    for name, wanted in published.items():
        found = get_variant(name).sampling
        sizes = (found.num_frames, found.height, found.width, found.fps)
        assert (found.steps, found.shift, found.guidance, *sizes) == wanted, name
    assert {each.sampling.solver for each in VARIANTS.values() if each.repository} == {"unipc"}


def test_flags_win_over_the_authors(weights: dict[str, Path]) -> None:
    found = resolve(SampleOptions(steps=3, shift=2.0, guidance=1.5, num_frames=5, fps=8), weights["debug"])
    assert (found.steps, found.shift, found.guidance, found.fps) == (3, 2.0, (1.5,), 8)
    assert found.solver == "euler" and found.latent_shape == (16, 2, 8, 8)
    assert (
        "euler, 3 steps, shift 2, guidance 1.5, seed 0; 5 frames of 64 x 64 at 8 fps" in found.describe()[1]
    )


def test_two_experts(weights: dict[str, Path]) -> None:
    high, low = weights["debug-A14B-high"], weights["debug-A14B-low"]
    found = resolve(SampleOptions(), high, low)
    assert found.variant.name == "debug-A14B-high" and found.boundary == 0.875 and len(found.sources) == 2
    assert resolve(SampleOptions(guidance=2.0), high, low).guidance == (2.0, 2.0)
    assert resolve(SampleOptions(guidance=2.0, low_guidance=1.0), high, low).guidance == (2.0, 1.0)
    assert resolve(SampleOptions(boundary=0.9), high, low).boundary == 0.9


@pytest.mark.parametrize(
    ("files", "options", "problem"),
    [
        (("debug-A14B-high",), {}, "one expert of two, which makes no video alone; give both"),
        (("debug-A14B-low", "debug-A14B-high"), {}, "is the low-noise expert; the high-noise one belongs"),
        (("debug-A14B-high", "debug"), {}, "another architecture than that of --weights"),
        (("debug", "debug"), {}, "is one model, not two experts"),
        (("debug-control",), {}, "led by a control video.*legal: t2v-1.3B"),
        (("debug",), {"low_guidance": 1.0}, "--low_guidance is the low-noise expert's"),
        (("debug",), {"boundary": 0.5}, "--boundary is where two experts change over"),
        (("debug-A14B-high", "debug-A14B-low"), {"boundary": 1.5}, "--boundary 1.5 must lie between"),
        (("debug",), {"steps": 0}, "--steps 0"),
        (("debug",), {"fps": 0}, "--fps 0"),
        (("debug",), {"shift": -1.0}, "--shift -1.0 must be above 0"),
        (("debug",), {"num_frames": 6}, "6 frames: must be 4n\\+1"),
        (("debug",), {"width": 70}, "width 70 must be a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_one_line(
    files: tuple[str, ...], options: dict[str, float], problem: str, weights: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve(SampleOptions(**options), *(weights[name] for name in files))  # type: ignore[arg-type]


def test_another_variant_than_the_weights(weights: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="--variant t2v-14B: the weights are of another architecture"):
        resolve(SampleOptions(), weights["debug"], variant="t2v-14B")


def test_encoders_that_a_variant_needs() -> None:
    assert codec_name(EncoderOptions(), get_variant("debug")) == "dct"
    assert codec_name(EncoderOptions(), get_variant("debug-ti2v")) == "wan2.2"
    assert codec_name(EncoderOptions(), get_variant("t2v-14B")) == "wan2.1"
    assert open_text(EncoderOptions(), get_variant("debug")).dim == 64
    with pytest.raises(ValueError, match="--text_encoder is needed: t2v-14B reads UMT5-XXL"):
        open_text(EncoderOptions(), get_variant("t2v-14B"))


def picture(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (90, 70), colour).save(folder / name)
    return folder / name


def test_images_are_needed_taken_and_spread(tmp_path: Path) -> None:
    red, blue = picture(tmp_path, "red.png", (255, 0, 0)), picture(tmp_path, "blue.png", (0, 0, 255))
    i2v, flf2v = get_variant("debug-i2v"), get_variant("debug-flf2v")
    assert check_images(Images([red]), i2v, 3).first == [red] * 3
    assert check_images(Images([red, blue], [blue]), flf2v, 2) == Images([red, blue], [blue, blue])
    assert check_images(Images(), get_variant("debug-ti2v"), 2) == Images([], [])
    for images, variant, problem in (
        (Images([red]), "debug", "--image: debug is t2v and takes none"),
        (Images(), "debug-i2v", "debug-i2v needs --image"),
        (Images([red]), "debug-flf2v", "debug-flf2v needs --end_image"),
        (Images([red], [blue]), "debug-i2v", "--end_image: debug-i2v is i2v and takes none"),
        (Images([red, blue]), "debug-i2v", "--image: 2 images for 3 captions"),
        (Images([tmp_path / "no.png"]), "debug-i2v", "no.png: no such file"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_images(images, get_variant(variant), 3)


@pytest.mark.parametrize("name", ["debug-i2v", "debug-flf2v"])
def test_images_become_what_training_stores(name: str, weights: dict[str, Path], tmp_path: Path) -> None:
    red, blue = picture(tmp_path, "red.png", (255, 0, 0)), picture(tmp_path, "blue.png", (0, 0, 255))
    settings = resolve(SampleOptions(), weights[name])
    images = Images([red, blue], [blue, red] if name == "debug-flf2v" else [])
    codec = open_codec("dct", None, CPU)
    told = encode_images(images, settings, codec, EncoderOptions(image_encoder="debug"), CPU)
    shapes = given_shapes(settings, 2, True)
    assert {key: getattr(told, key).shape for key in shapes} == shapes and shapes.keys() == {
        "clip",
        "condition",
    }
    # The image latent of the condition decodes to the first image, and with flf2v to the last.
    assert told.condition is not None
    frames = codec.decode(told.condition[:, 4:])
    for place, (first, last) in enumerate(((0, 2), (2, 0))):
        assert frames[place, :, 0].mean((1, 2)).argmax() == first
        if name == "debug-flf2v":
            assert frames[place, :, -1].mean((1, 2)).argmax() == last
    assert told.clip is not None and not torch.equal(told.clip[0], told.clip[1])


def test_the_tool_samples_two_experts_on_two_ranks_from_images(tmp_path: Path) -> None:
    """The command as a user types it: an image-to-video pair, one video over two ranks."""
    files = []
    for expert in ("high", "low"):
        source = InitialWeights(get_variant(f"debug-i2v-A14B-{expert}").config, 0)
        files.append(tmp_path / f"{expert}.safetensors")
        save_file(
            {key: source.load(key) for key in source.keys()},
            files[-1],
            {"format": "pt", "variant": f"debug-i2v-A14B-{expert}"},
        )
    words = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "tools/sample.py"),
        *("--weights", files[0], "--low_weights", files[1], "--steps", 3, "--ulysses_degree", 2),
        *("--image", picture(tmp_path, "red.png", (255, 0, 0)), "--prompts", "a cat", "--output"),
    ]
    done = command(*words, tmp_path / "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "two experts, boundary 0.9" in done.out and "sampled 1 videos" in done.out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "trained_00.mp4",
        "contact_sheet.png",
        "samples.json",
    }
    assert json.loads((tmp_path / "out/samples.json").read_text())[0]["prompt"] == "a cat"
    again = command(*words, tmp_path / "out", cwd=tmp_path)
    assert again.code and "exists and is not empty; give a new folder" in again.err
    assert (
        "Traceback (most recent call last)"
        not in again.err.partition("ChildFailedError")[0].partition("torch/")[0]
    )


@pytest.mark.parametrize(
    ("variant", "given", "problem"),
    [
        ("t2v-14B", {}, "--text_encoder is needed"),
        ("t2v-14B", {"text_encoder": "debug"}, "--vae is needed, the weights of the codec wan2.1"),
        ("debug", {"codec": "dct", "vae": Path("/")}, "the codec dct has no weights"),
        ("debug-i2v", {}, "debug-i2v reads CLIP features: give --image_encoder"),
        ("debug", {"image_encoder": "debug"}, "debug has no CLIP branch: leave out --image_encoder"),
        ("debug", {"text_encoder": "/no/such"}, "--text_encoder /no/such: no such file"),
    ],
)
def test_encoders_that_do_not_fit_are_named_before_any_is_opened(
    variant: str, given: dict[str, Any], problem: str
) -> None:
    check_encoders(EncoderOptions(), get_variant("debug"))
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        check_encoders(EncoderOptions(**given), get_variant(variant))
