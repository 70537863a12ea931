"""Tables with the machine they were measured on, as JSON and as Markdown."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megawan.files import write_json, write_text

PACKAGES = ("torch", "deepspeed", "diffusers", "diffsynth", "flash-attn", "flash-attn-4", "triton")


@dataclass
class Table:
    """One table; rows are mappings from column to a number or a text."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)
    """What only the JSON holds, such as the seconds of each round."""

    def markdown(self) -> str:
        """Return the table with its title and note."""
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines += [_line(columns), _line(["---"] * len(columns))]
        lines += [_line([_cell(row.get(column, "")) for column in columns]) for row in self.rows]
        return "\n".join([*lines, ""])


def write(folder: Path, name: str, tables: Sequence[Table], command: str) -> tuple[Path, Path]:
    """Write `name`.json and `name`.md into `folder`, whatever was there before, and return both."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {**machine(), "command": command}
    data = {"about": about, "tables": [vars(table) for table in tables]}
    json_file, text_file = folder / f"{name}.json", folder / f"{name}.md"
    write_json(json_file, data)
    head = "\n".join(f"- {key}: {value}" for key, value in about.items())
    write_text(text_file, "\n".join([f"# Benchmark: {name}", "", head, "", *(t.markdown() for t in tables)]))
    return json_file, text_file


def machine() -> Mapping[str, Any]:
    """Return hardware, versions and commit; nothing of the environment or the host's name."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + (" with changes" if changed else "")


def _cpu_name() -> str:
    """Return the processor's name as Linux tells it, and what of it matrix products use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    }
    flags = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    return f"{fields.get('model name', platform.machine())} ({' '.join(sorted(flags))})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
