"""What TensorBoard shows first: every chart has a line, every line of a run can be found, settings are
readable."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from megawan import config
from megawan.dashboard import LAYOUT, RESULTS, flat, layout, settings_table
from megawan.metrics import DataReading, LossReading, MetricsOptions, RunLog, check, speed
from megawan.train import losses

PARTS = dict.fromkeys(("data", "forward", "backward", "optimizer", "save", "validation"), 0.5)
TAGS = {
    *losses(LossReading(1.0, {0: 1.0}, {0: 1.0}, {0: 1.0, 1: 2.0}), ["a", "b"]),
    *speed(DataReading(1, 1, 1, {}), 1.0, PARTS, 1, 1, 1.0),
    *("train/lr", "train/grad_norm", "train/skipped_steps", "train/weight_delta_norm"),
    *("eval/loss", "eval/normalized", "eval/normalized_by_sigma/q0", "data/bad_samples", "save/copy_s"),
    *("mem/peak_gpu_gib", "perf/straggler_ratio", "perf/exposed_communication"),
}


def patterns(charts: dict[str, dict[str, list[Any]]]) -> list[str]:
    return [pattern for group in charts.values() for _, lines in group.values() for pattern in lines]


def settings(*argv: str) -> dict[str, Any]:
    return config.to_dict(config.parse(argv, prog="train.py", description=""))


def test_every_chart_has_a_line_and_every_answer_a_chart() -> None:
    for group in LAYOUT.values():
        for chart, (_, lines) in group.items():
            assert any(re.search(lines[0], tag) for tag in TAGS), chart
    asked = patterns(LAYOUT)
    for tag in (
        "train/loss",
        "eval/loss",
        "perf/mfu",
        "perf/time_save",
        "train/grad_norm",
        "mem/peak_gpu_gib",
    ):
        assert any(re.search(pattern, tag) for pattern in asked), tag
    assert set(RESULTS) <= TAGS


def test_charts_that_would_stay_empty_are_left_out() -> None:
    few = patterns(layout(settings()))
    many = patterns(
        layout(settings("--validation.every=2", "--data.path", "a", "b", "--metrics.peak_tflops=989"))
    )
    assert set(many) == set(patterns(LAYOUT)) > set(few)
    for gone in ("^eval/normalized$", "^train/loss_by_dataset/.*", "^perf/mfu$"):
        assert gone in many and gone not in few
    assert "^train/loss$" in few


def test_settings_are_shown_beside_the_curves(tmp_path: Path) -> None:
    given = settings("--optim.learning_rate=0.002", "--data.path", "a", "b")
    log = RunLog(tmp_path, MetricsOptions(), 0, 9, given)
    log.close()
    assert flat(given)["optim.learning_rate"] == 0.002 and flat(given)["data.path"] == "['a', 'b']"
    assert "| `optim.learning_rate` | `0.002` |" in settings_table(given)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"settings/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert shown["optim.learning_rate"].number_value == 0.002
    assert shown["metrics.tensorboard"].string_value == "True"


def test_wandb_that_is_not_installed_is_one_line_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install 'megawan\\[wandb\\]'"):
        check(MetricsOptions(wandb_project="demo"))


@pytest.mark.parametrize("peak", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match="peak_tflops"):
        check(MetricsOptions(peak_tflops=peak))
