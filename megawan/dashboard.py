"""What TensorBoard shows of a run before anybody chooses: three questions, and its settings."""

from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

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
            ["^perf/data_wait$", "^perf/straggler_wait$", "^perf/exposed_communication$"],
        ],
    },
    "3. Is it healthy?": {
        "gradient norm before clipping": ["Multiline", ["^train/grad_norm$"]],
        "what a step changes in the weights": ["Multiline", ["^train/weight_delta_norm$"]],
        "learning rate": ["Multiline", ["^train/lr$"]],
        "steps without update, replaced samples": [
            "Multiline",
            ["^train/skipped_steps$", "^data/replaced$"],
        ],
        "memory": ["Multiline", ["^mem/.*"]],
        "saving": ["Multiline", ["^save/.*"]],
    },
}

RESULTS = ("train/loss", "eval/loss", "eval/normalized")
"""Curves beside which the page of hyper-parameters puts the settings."""


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Return nested settings by dotted name, lists and nulls as text."""
    found: dict[str, bool | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def settings_summaries(settings: dict[str, Any]) -> list[Summary]:
    """Return the summaries that put `settings` on the page of hyper-parameters of the run's own folder."""
    return list(hparams(flat(settings), dict.fromkeys(RESULTS, 0.0)))


def settings_table(settings: dict[str, Any]) -> str:
    """Return the settings as a Markdown table."""
    rows = (f"| `{name}` | `{value}` |" for name, value in flat(settings).items())
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])
