"""What differs between the run that wrote a checkpoint and the run that continues it."""

from collections.abc import Mapping, Sequence
from typing import Any

UNSAFE = ("data", "global_batch", "seed", "flow", "ema")
"""Changes under which the continued run is another experiment; legal only when allowed by name."""
# Where a run lies, how it is cut over ranks and how much it says: nothing that training would notice.
_SILENT = (
    "output",
    "config",
    "local_rank",
    "dry_run",
    "health_check",
    "dist_timeout",
    "checkpoint",
    "metrics",
    "validation",
    "sample",
    "profile",
    "parallel",
)


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], had_ema: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return field → (value then, value now) of two states as `Trainer.state` gives them, where they differ.

    Fields that only one of them has are left out: they are another version's. `had_ema`: whether the
    checkpoint holds a moving average, whatever its configuration says.
    """
    then, here = _fields(saved), _fields(now)
    found = {
        name: (then[name], here[name])
        for name in then
        if name in here and then[name] != here[name] and name.partition(".")[0] not in _SILENT
    }
    keeps_ema = bool(here.get("ema.decay", 0.0))
    if had_ema != keeps_ema:
        words = {True: "a moving average", False: "no moving average"}
        found["ema"] = (words[had_ema], words[keeps_ema])
    return found


def refused(found: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
    """Return the names of `UNSAFE` that these changes touch and nobody allowed.

    A moving average may take another decay; it may not be lost, nor begin in the middle, unasked.
    """
    touched = {name.partition(".")[0] for name in found if not name.startswith(("data.", "ema."))}
    return [name for name in UNSAFE if name in touched and name not in allowed]


def _fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration's fields by dotted name, and `data` and `global_batch` beside them."""
    found: dict[str, Any] = {name: state[name] for name in ("data", "global_batch") if name in state}
    config = state.get("config")
    found.update(flat(config) if isinstance(config, dict) else {})
    # The global batch says what of these matters.
    return {name: value for name, value in found.items() if name not in ("micro_batch", "accumulation")}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's fields by dotted name, sections taken apart."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found.update({f"{name}.{inner}": setting for inner, setting in value.items()})
        else:
            found[name] = value
    return found
