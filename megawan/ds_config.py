"""The DeepSpeed JSON file and our fields, merged into the one dictionary that `deepspeed.initialize` gets.

Batch sizes, clipping, precision and the optimizer are fields of ours. A file may repeat one of them with the
same value or with "auto"; two values that contradict are an error, not a surprise.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Resolved:
    """The dictionary for DeepSpeed with the two facts the rest of the program asks of it."""

    config: dict[str, Any]
    zero_stage: int
    precision: Precision


def find(path: str, package: Path) -> Path:
    """Return the file that `path` names: from the current directory, or among those that the project ships.

    They lie beside `package` (the folder megawan/) in a checkout and inside it in an installed copy.
    Raises FileNotFoundError that lists them.
    """
    for candidate in (Path(path), package.parent / path, package / path):
        if candidate.is_file():
            return candidate
    homes = (package.parent / "ds_configs", package / "ds_configs")
    shipped = ", ".join(f"ds_configs/{file.name}" for home in homes for file in sorted(home.glob("*.json")))
    raise FileNotFoundError(f"--deepspeed {path}: no such file; the project ships {shipped}")


def read(path: Path) -> dict[str, Any]:
    """Return the parsed file. Raises ValueError naming the file and place when it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--deepspeed {path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"--deepspeed {path}: the top level must be an object, found {type(value).__name__}")
    return value


def resolve(
    file: Mapping[str, Any],
    *,
    where: str,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    grad_clip: float,
    precision: Literal["auto", "bf16", "fp32"],
    on_gpu: bool,
) -> Resolved:
    """Return the file's settings with ours put in; `where` names the file in messages.

    precision "auto" takes what the file says, else bf16 on GPUs and fp32 on CPUs (where fp32 products are
    faster). Raises ValueError for a contradiction, an unknown stage, fp16, or an "auto" that is not ours to
    fill.
    """
    config: dict[str, Any] = json.loads(json.dumps(file))  # a copy that shares nothing with the caller's
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage is {stage!r}; legal: 0, 1, 2, 3")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            f"{where}: fp16.enabled is true; Wan trains in bf16 or fp32, remove the fp16 section"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"{where}: has a section {section!r}; set it with --optim.* and remove it from the file"
            )
    if config.get("sequence_parallel_size", 1) not in (1, "auto"):
        raise ValueError(
            f"{where}: remove sequence_parallel_size; use --parallel.ulysses_degree and .ring_degree"
        )
    config.pop("sequence_parallel_size", None)
    config.pop("fp16", None)

    chosen = _precision(config.get("bf16", {}).get("enabled", "auto"), precision, on_gpu, where)
    if stage == 0 and chosen == "bf16":
        raise ValueError(
            f"{where}: ZeRO stage 0 with bf16 keeps no fp32 masters we could shard or save; use stage 1"
        )
    config["bf16"] = {**config.get("bf16", {}), "enabled": chosen == "bf16"}
    for key, ours, flag in (
        ("train_micro_batch_size_per_gpu", micro_batch, "--micro_batch"),
        ("gradient_accumulation_steps", accumulation, "--accumulation"),
        ("train_batch_size", micro_batch * accumulation * world_size, "micro_batch x accumulation x ranks"),
        ("gradient_clipping", grad_clip, "--optim.grad_clip"),
    ):
        theirs = config.get(key, "auto")
        if theirs not in ("auto", ours):
            raise ValueError(f"{where}: {key} is {theirs} but {flag} is {ours}; remove it from the file")
        config[key] = ours
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 1 << 30)  # our own progress line says it
    for name, value in _walk(config):
        if value == "auto":
            raise ValueError(
                f"{where}: {name} is 'auto'; write a number (ds_configs/ has examples with reasons)"
            )
    return Resolved(config, stage, chosen)


def _precision(in_file: Any, asked: str, on_gpu: bool, where: str) -> Precision:
    if in_file == "auto":
        if asked == "auto":
            return "bf16" if on_gpu else "fp32"
        return "bf16" if asked == "bf16" else "fp32"
    if not isinstance(in_file, bool):
        raise ValueError(f"{where}: bf16.enabled is {in_file!r}; legal: true, false")
    from_file: Precision = "bf16" if in_file else "fp32"
    if asked not in ("auto", from_file):
        raise ValueError(
            f"{where}: bf16.enabled means {from_file} but --precision is {asked}; change one of them"
        )
    return from_file


def _walk(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [
            pair for key, value in node.items() for pair in _walk(value, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, node)]
