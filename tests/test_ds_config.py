"""The merged DeepSpeed dictionary: ours goes in, contradictions are refused."""

from pathlib import Path
from typing import Any

import pytest

from megawan import ds_config

ROOT = Path(__file__).resolve().parents[1]


def resolve(file: dict[str, Any], **changes: Any) -> ds_config.Resolved:
    ours: dict[str, Any] = {
        "where": "x.json",
        "micro_batch": 2,
        "accumulation": 3,
        "world_size": 4,
        "grad_clip": 1.0,
        "precision": "auto",
        "on_gpu": False,
    }
    return ds_config.resolve(file, **{**ours, **changes})


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_file_resolves(path: Path) -> None:
    resolved = resolve(ds_config.read(path))
    assert f"zero{resolved.zero_stage}" == path.stem.split("_")[0]
    assert resolved.config["train_batch_size"] == 24
    assert resolved.precision == "fp32"


def test_precision_follows_file_then_flag_then_hardware() -> None:
    stage = {"zero_optimization": {"stage": 1}}
    assert resolve(stage, on_gpu=True).precision == "bf16"
    assert resolve(stage, on_gpu=True, precision="fp32").precision == "fp32"
    assert resolve({**stage, "bf16": {"enabled": True}}).precision == "bf16"
    assert resolve({**stage, "bf16": {"enabled": "auto"}}, precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match=r"means bf16 but --precision is fp32"):
        resolve({**stage, "bf16": {"enabled": True}}, precision="fp32")


def test_the_input_is_left_alone_and_auto_is_filled() -> None:
    file = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    resolved = resolve(file)
    assert file == {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    assert (resolved.config["train_micro_batch_size_per_gpu"], resolved.config["gradient_clipping"]) == (
        2,
        1.0,
    )


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8 but --micro_batch is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 but --optim.grad_clip is 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "section 'optimizer'"),
        ({"scheduler": {}}, "section 'scheduler'"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4; legal: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "reduce_bucket_size is 'auto'"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes'"),
        ({"bf16": {"enabled": True}}, "stage 0 with bf16"),
    ],
)
def test_contradictions_are_refused(file: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.json") as caught:
        resolve(file)
    assert words in str(caught.value)


def test_finding_and_reading_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ds_config.find("ds_configs/zero3.json", ROOT / "megawan") == ROOT / "ds_configs/zero3.json"
    (tmp_path / "mine.json").write_text("[1]")
    assert ds_config.find("mine.json", ROOT / "megawan") == Path("mine.json")
    with pytest.raises(FileNotFoundError, match=r"ds_configs/zero2\.json"):
        ds_config.find("nope.json", ROOT / "megawan")
    with pytest.raises(ValueError, match="must be an object, found list"):
        ds_config.read(Path("mine.json"))
    (tmp_path / "mine.json").write_text("{,}")
    with pytest.raises(ValueError, match="not JSON"):
        ds_config.read(Path("mine.json"))
