"""What TensorBoard shows of a run before anybody chooses: three questions, and its settings."""

from collections.abc import Mapping
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from megawan import changes

# TensorBoard's custom scalars: question -> chart -> kind and the tags (regular expressions) of its lines.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1. Is it learning?": {
        "loss: training, held-out": ["Multiline", ["^train/loss$", "^eval/loss$"]],
        "held-out error over the constant answer's (1: nothing learned)": [
            "Multiline",
            ["^eval/normalized$", "^eval_ema/normalized$"],
        ],
        "held-out error over the constant answer's, by tenth of sigma": [
            "Multiline",
            ["^eval/normalized_by_sigma/.*"],
        ],
        "training error by tenth of sigma": ["Multiline", ["^train/loss_by_sigma/.*"]],
        "training loss by dataset": ["Multiline", ["^train/loss_by_dataset/.*"]],
    },
    "2. Is it fast?": {
        "seconds a step": ["Multiline", ["^perf/step_time$"]],
        "where they go": ["Multiline", ["^perf/time_.*"]],
        "FLOPs over the GPU's peak: the model's, the hardware's": ["Multiline", ["^perf/mfu$", "^perf/hfu$"]],
        "tokens a second": ["Multiline", ["^perf/tokens_per_s$"]],
        "shares of time that are waits": [
            "Multiline",
            ["^perf/data_wait$", "^perf/straggler_ratio$", "^perf/exposed_communication$"],
        ],
    },
    "3. Is it healthy?": {
        "gradient norm before clipping": ["Multiline", ["^train/grad_norm$"]],
        "what a step changes in the weights": ["Multiline", ["^train/weight_delta_norm$"]],
        "learning rate": ["Multiline", ["^train/lr$"]],
        "steps without update, replaced samples": [
            "Multiline",
            ["^train/skipped_steps$", "^data/bad_samples$"],
        ],
        "memory": ["Multiline", ["^mem/.*"]],
        "saving": ["Multiline", ["^save/.*"]],
    },
}


def layout(settings: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Return `LAYOUT` without the charts that a run of these settings would leave empty."""
    data, metrics = settings.get("data", {}), settings.get("metrics", {})
    absent = [
        tag
        for tag, present in {
            "^train/loss_by_dataset/": len(data.get("path", ())) > 1,
            "^eval/": settings.get("validation", {}).get("every", 0) > 0,
            "^perf/mfu$": metrics.get("peak_tflops") is not None or torch.cuda.is_available(),
        }.items()
        if not present
    ]
    return {
        question: {
            chart: lines
            for chart, lines in charts.items()
            if not any(lines[1][0].startswith(tag) for tag in absent)
        }
        for question, charts in LAYOUT.items()
    }


RESULTS = ("train/loss", "eval/loss", "eval/normalized")
"""Curves beside which the page of hyper-parameters puts the settings."""


def flat(settings: Mapping[str, Any]) -> dict[str, float | str]:
    """Return settings by dotted name; what is neither number nor text as text."""
    found: dict[str, float | str] = {}
    for name, value in changes.flat(settings).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found[name] = value if number else str(value)
    return found


def settings_summaries(settings: dict[str, Any]) -> list[Summary]:
    """Return the summaries that put `settings` on the page of hyper-parameters of the run's own folder."""
    return list(hparams(flat(settings), dict.fromkeys(RESULTS, 0.0)))


def settings_table(settings: dict[str, Any]) -> str:
    """Return the settings as a Markdown table."""
    rows = (f"| `{name}` | `{value}` |" for name, value in flat(settings).items())
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])
