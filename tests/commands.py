"""Run one of our commands as a user would, with a hard time-out and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def command(
    *words: object,
    cwd: Path,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    meanwhile: Callable[[Path, int], None] | None = None,
) -> Finished:
    """Run `python words...` in `cwd`, output to files; its whole process group is killed at the end.

    `meanwhile` is called once it runs, with the file of its standard output and its process number.
    """
    out, err = cwd / ".stdout", cwd / ".stderr"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH", None)
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        )
        try:
            if meanwhile is not None:
                meanwhile(out, process.pid)
            process.wait(timeout)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return Finished(process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace"))


def wait_for(text: str, file: Path, timeout: float = 60) -> None:
    """Return once `file` contains `text`; raise TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while text not in file.read_text(errors="replace"):
        if time.monotonic() > end:
            raise TimeoutError(f"{text!r} did not come; {file} ends with {file.read_text()[-2000:]}")
        time.sleep(0.05)


def rank_process(launcher: int, rank: int) -> int:
    """Return the process number of one rank below a launcher."""
    waiting = [launcher]
    while waiting:
        number = waiting.pop()
        variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables and number != launcher:
            return number
        children = Path(f"/proc/{number}/task/{number}/children").read_text()
        waiting.extend(map(int, children.split()))
    raise LookupError(f"no rank {rank} below process {launcher}")
