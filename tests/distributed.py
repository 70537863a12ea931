"""Run one function on several processes, as torchrun would start them, and leave nothing behind.

`run_distributed("tests.parallel.workers:grid", 4)` imports the function by name in each of four fresh
interpreters and returns what each rank's call returned. A rank that raises, exits or hangs ends them all.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megawan import dist

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 40
POLL_S = 0.02
STACKS_S = 0.5
PR_SET_PDEATHSIG = 1


class DistributedError(RuntimeError):
    """A rank failed or time ran out; the message ends with the ranks' output, the first failure first."""


def run_distributed(
    function: str, world_size: int, *, arguments: Mapping[str, Any] | None = None, timeout: float = 120.0
) -> list[Any]:
    """Return what `function`, named "package.module:name", returned on each of `world_size` ranks, by rank.

    It is called with `arguments` as keywords; arguments and results travel as JSON (a float keeps every bit).
    Each rank sees the environment that torchrun would give it on one machine and leads a session of its own,
    which is killed whole when any rank fails, when `timeout` seconds have passed, or when this call is
    interrupted.
    Raises DistributedError with the end of each rank's output.
    """
    with tempfile.TemporaryDirectory(prefix="megawan-ranks-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(dict(arguments or {})), "utf-8")
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            port = _free_port()
            for rank in range(world_size):
                ranks.append(_start(function, rank, world_size, port, folder))
            ended = _watch(ranks, folder, timeout)
        finally:
            _kill(ranks)
        failed = [rank for rank in ended if ranks[rank].returncode != 0]
        if failed or len(ended) < world_size:
            raise DistributedError(_report(function, ranks, ended, failed, folder, timeout))
        return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(world_size)]


def _start(function: str, rank: int, world_size: int, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "tests.distributed", function, str(folder), str(os.getpid())]
    with (folder / f"{rank}.out").open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _watch(ranks: list["subprocess.Popen[bytes]"], folder: Path, timeout: float) -> list[int]:
    """Return the ranks that ended, in that order: all, or those up to the first failure or the time-out."""
    deadline, ended = time.monotonic() + timeout, list[int]()
    while len(ended) < len(ranks):
        # WNOWAIT leaves an ended rank a zombie, so that its group's number is not given away before _kill.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        running = [rank for rank in range(len(ranks)) if rank not in ended]
        states = {rank: os.waitid(os.P_PID, ranks[rank].pid, options) for rank in running}
        now = {rank: state for rank, state in states.items() if state is not None}
        ended += sorted(now, key=lambda rank: _failure_time(folder, rank))
        if any(state.si_status != 0 or state.si_code != os.CLD_EXITED for state in now.values()):
            break
        if time.monotonic() > deadline:
            for rank in set(running) - now.keys():
                os.kill(ranks[rank].pid, signal.SIGUSR1)  # faulthandler prints the stacks of its threads
            time.sleep(STACKS_S)
            break
        time.sleep(POLL_S)
    return ended


def _kill(ranks: list["subprocess.Popen[bytes]"]) -> None:
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for rank in ranks:
        rank.wait()


def _report(
    function: str,
    ranks: list["subprocess.Popen[bytes]"],
    ended: list[int],
    failed: list[int],
    folder: Path,
    timeout: float,
) -> str:
    others = [rank for rank in range(len(ranks)) if rank not in failed]
    hung = [rank for rank in range(len(ranks)) if rank not in ended]
    what = f"rank {failed[0]} failed first" if failed else f"ranks {hung} still ran after {timeout:g} s"
    lines = [f"{function} on {len(ranks)} ranks: {what}"]
    for rank in [*failed, *others]:
        state = f"exit code {ranks[rank].returncode}" if rank in ended else "stopped by this test"
        output = (folder / f"{rank}.out").read_text("utf-8", "replace").splitlines()[-TAIL_LINES:]
        lines += [f"--- rank {rank}: {state}", *output]
    return "\n".join(lines)


def _failure_time(folder: Path, rank: int) -> int:
    """Return when the rank raised, in nanoseconds; a rank that died without a word counts as later."""
    file = folder / f"{rank}.raised"
    return int(file.read_text("utf-8")) if file.exists() else time.time_ns()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank_main(function: str, folder: Path, parent: int) -> None:
    """Call the function in this rank and write what it returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit("the test that started this rank is gone")
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    rank = os.environ["RANK"]
    try:
        module, _, name = function.partition(":")
        arguments = json.loads((folder / "arguments.json").read_text("utf-8"))
        result = getattr(importlib.import_module(module), name)(**arguments)
        (folder / f"{rank}.json").write_text(json.dumps(result), "utf-8")
    except BaseException:
        (folder / f"{rank}.raised").write_text(str(time.time_ns()), "utf-8")
        raise
    dist.leave(0)


if __name__ == "__main__":
    _rank_main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
