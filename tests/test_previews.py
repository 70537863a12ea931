"""Videos sampled while training: the same at every layout, of the very average that is exported, and nothing
of the training changes."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megawan.models.wan import WanModel
from megawan.plan import Plan
from megawan.preview_options import PreviewOptions, check
from megawan.previews import Preview, Previews, stored_previews
from megawan.sampling import sample_latents
from tests.distributed import run_distributed
from tests.training import lively, plan_of

COMMON = [
    "--steps=3", "--seed=3", "--data.height=48", "--data.width=80", "--optim.learning_rate=1e-2",
    "--ema.decay=0.5", "--validation.every=1", "--validation.samples=2", "--validation.levels=3",
    "--sample.every=1", "--sample.count=3", "--sample.steps=3", "--sample.guidance=3",
]  # fmt: skip
CASES = {
    "zero3 ulysses": ["--parallel.ulysses_degree=2", "--micro_batch=2"],
    "zero3 dp": ["--micro_batch=1"],
    "zero2 ring": ["--deepspeed=ds_configs/zero2.json", "--parallel.ring_degree=2", "--micro_batch=2"],
    "zero0 dp": ["--deepspeed=ds_configs/zero0.json", "--micro_batch=1"],
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: [*COMMON, *argv] for name, argv in CASES.items()}
    output = str(tmp_path_factory.mktemp("previews"))
    arguments = {"cases": cases, "output": output}
    first, second = run_distributed("tests.preview_workers:cases", 2, timeout=280, arguments=arguments)
    for name in CASES:
        assert first[name]["samples"] == second[name]["samples"]
    return first


@pytest.mark.parametrize("name", CASES)
def test_looking_changes_no_bit_of_the_training(name: str, seen: dict[str, Any]) -> None:
    digests = [
        {
            file: entry["sha256"]
            for file, entry in json.loads((Path(seen[name][how]) / "manifest.json").read_text())[
                "files"
            ].items()
        }
        for how in ("looked", "not looked")
    ]
    assert digests[0] == digests[1] and digests[0]


@pytest.mark.parametrize("name", CASES)
def test_the_average_that_is_looked_at_is_the_one_that_is_exported(name: str, seen: dict[str, Any]) -> None:
    found = seen[name]
    assert found["averaged"] == pytest.approx(found["as exported"], rel=1e-6)
    assert abs(found["averaged"]["eval/loss"] / found["weights"]["eval/loss"] - 1) > 1e-4


def test_every_layout_samples_the_same_videos(seen: dict[str, Any]) -> None:
    wanted = [torch.tensor(one) for one in seen["zero3 ulysses"]["samples"]]
    assert len(wanted) == 3 and not torch.equal(wanted[0], wanted[1])
    for name in CASES:
        for one, other in zip(seen[name]["samples"], wanted, strict=True):
            assert torch.allclose(torch.tensor(one), other, rtol=0, atol=2e-4), name


def alone(plan: Plan) -> tuple[Previews, list[Preview], torch.Tensor]:
    wan, options = plan.variant.config, plan.config.sample
    starts = stored_previews(plan.data, options, wan.text_len)
    empty = torch.zeros(wan.text_len, wan.text_dim)
    previews = Previews(
        options, starts, empty, shift=5.0, codec="dct", clean_frames=0, dp_rank=0, dp_size=1, first=True
    )
    return previews, starts, empty


def test_a_preview_is_what_the_sampling_tool_makes(tmp_path: Path) -> None:
    plan = plan_of(1, *COMMON)
    previews, starts, empty = alone(plan)
    model, weights = WanModel(plan.variant.config), lively(plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.load(name))
    options = plan.config.sample
    wanted = sample_latents(
        model,
        torch.cat([start.text for start in starts]),
        empty,
        starts[0].noise.shape[1:],
        steps=options.steps,
        shift=5.0,
        guidance=options.guidance,
        seed=options.seed,
    )
    for start, latents in zip(starts, wanted, strict=True):
        found = previews._one(start, lambda _, x, t, text: model.velocity(x, t, text), torch.device("cpu"))
        assert torch.allclose(found[0], latents, atol=1e-5)


def test_files_and_animations(tmp_path: Path) -> None:
    plan = plan_of(1, *COMMON)
    previews, starts, _ = alone(plan)
    stored = previews.stored()
    assert stored is not None and torch.equal(stored[1], plan.data[_ids(starts, plan)[1]].latents)
    videos = previews.decode(stored, torch.device("cpu"))
    assert {video.shape for video in videos} == {(9, 48, 80, 3)}
    folder = tmp_path / "step_0000001"
    for _ in range(2):  # a step that is taken again after a resume
        sheet = previews.write(folder, {"stored": videos, "samples": videos})
    files = sorted(file.name for file in folder.iterdir())
    assert files == [
        "contact_sheet.png",
        *(f"{title}_0{n}.mp4" for title in ("samples", "stored") for n in range(3)),
    ]
    assert Image.open(folder / "contact_sheet.png").size == sheet.size and len(list(tmp_path.iterdir())) == 1
    gif = Image.open(io.BytesIO(previews.animation(videos[0])))
    assert gif.format == "GIF" and gif.size == (80, 48) and gif.n_frames == 9
    assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - videos[0][0]).mean() < 30


def _ids(starts: list[Preview], plan: Plan) -> list[int]:
    return [int(start.caption.split()[-1]) for start in starts]


CHECKED: dict[str, Any] = {
    "codec": "dct", "channels": 16, "text_only": True, "expert": None, "variant": "debug",
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "changed", "problem"),
    [
        ({"every": -1}, {}, "--sample.every -1"),
        ({"prompts": ("a",)}, {}, "--sample.prompts has no effect"),
        ({"every": 1, "count": 0}, {}, "--sample.count 0"),
        ({"every": 1, "steps": 0}, {}, "--sample.steps 0"),
        ({"every": 1}, {"expert": "high"}, "one expert of two"),
        ({"every": 1, "prompts": ("a",)}, {}, "needs --sample.text_encoder"),
        ({"every": 1, "prompts": ("a",), "text_encoder": "debug"}, {"text_only": False}, "takes images too"),
        ({"every": 1, "prompts": ("a",), "text_encoder": "/no/such"}, {}, "/no/such: no such file"),
        ({"every": 1}, {"codec": "wan2.1"}, "needs --sample.vae, the weights of the codec wan2.1"),
        ({"every": 1}, {"channels": 48}, "dct decodes 16 latent channels, debug has 48"),
        ({"every": 1, "vae": Path("/")}, {}, "dct has no weights"),
    ],
)
def test_what_cannot_be_sampled_is_one_line_before_anything_starts(
    asked: dict[str, Any], changed: dict[str, Any], problem: str
) -> None:
    check(PreviewOptions(every=1), **CHECKED)
    with pytest.raises(ValueError, match=problem):
        check(PreviewOptions(**asked), **{**CHECKED, **changed})
