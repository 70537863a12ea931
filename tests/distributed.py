"""Run one function in several fresh processes that form a gloo group, and bring back what each rank returned.

    results = run_distributed("tests.parallel.workers:attend_cases", 4, cases, timeout=120)

The worker is named "module:function"; each rank imports it, calls it with the same arguments and returns JSON values
with tensors anywhere among them (tuples come back as lists, dictionary keys are strings). Starting a rank costs
seconds, so one call should carry many cases. The ranks see what torchrun would set (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and join the group themselves; a failure in one rank ends all.

Nothing outlives the call: each rank leads a process group of its own that is killed at the end, and ends by itself
when the process that started it is gone.
"""

import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TENSOR = "__tensor__"
POLL_S = 0.02
LAST_WORDS_S = 2.0  # how long the others may still report after the first rank failed
SAME_MOMENT_S = 1.0  # a rank that died silently this shortly after another's error is taken for its cause
TAIL_LINES = 25


class DistributedError(AssertionError):
    """A rank failed or the time ran out; the message has the first failing rank's own traceback."""


@dataclass
class Rank:
    """One started process, and what is known of its end."""

    index: int
    process: "subprocess.Popen[bytes]"
    folder: Path
    ended: float | None = None  # time.monotonic() when it was seen to have ended
    status: int | None = None  # exit code, or minus the signal

    def path(self, suffix: str) -> Path:
        """Return this rank's file of that kind."""
        return self.folder / f"rank{self.index}.{suffix}"

    def look(self) -> None:
        """Note whether the process has ended, without reaping it: its group id stays ours until it is killed."""
        if self.ended is not None:
            return
        seen = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if seen is not None:
            self.ended = time.monotonic()
            self.status = seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status

    def succeeded(self) -> bool:
        """Return True if the worker returned and its result was written whole."""
        return self.status == 0 and self.path("json").exists()

    def failed_at(self) -> float | None:
        """Return when this rank failed, None if it runs or succeeded. A silent death counts as a little earlier."""
        if self.ended is None or self.succeeded():
            return None
        if self.path("failure").exists():
            return float(self.path("failure").read_text().partition("\n")[0])
        return self.ended - SAME_MOMENT_S

    def story(self) -> str:
        """Return how this rank ended: its traceback if it raised, else its exit status and last output."""
        if self.path("failure").exists():
            return self.path("failure").read_text().partition("\n")[2].rstrip()
        lines = self.path("out").read_text(errors="replace").rstrip().splitlines()
        if self.ended is None:
            how = "still running"
        elif self.status is not None and self.status < 0:
            how = f"killed by {signal.Signals(-self.status).name}"
        else:
            how = f"exit code {self.status}" + ("" if self.path("json").exists() else ", without a result")
        return "\n".join([how, *lines[-TAIL_LINES:]])

    def kill(self) -> None:
        """End the process and whatever it started in its group, then reap it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not become a group leader yet
            self.process.kill()
        self.process.wait()


def run_distributed(
    worker: str, world_size: int, *args: Any, timeout: float = 120.0, **named: Any
) -> list[Any]:
    """Return what `worker(*args, **named)` returned on each rank, in rank order.

    `timeout` seconds bound the whole call, the start of the processes included. Raises DistributedError when a rank
    raises, dies or hangs: the first one's traceback (or last output) leads, the others follow.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ranks-") as name,
        socket.socket() as reserved,
    ):
        folder = Path(name)
        write_values(folder / "arguments", {"args": list(args), "named": named})
        # Held for the whole call, bound but not listening: nobody else is given the port before rank 0 listens on it.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        # The ranks watch the reading end: it ends when this process does, however that happens.
        alive, ours = os.pipe()
        ranks: list[Rank] = []
        deadline = time.monotonic() + timeout
        try:
            for index in range(world_size):
                ranks.append(_start(index, world_size, worker, folder, reserved.getsockname()[1], alive, timeout))
            _wait(ranks, deadline)
            failures = sorted((when, rank.index) for rank in ranks if (when := rank.failed_at()) is not None)
            if failures or any(rank.ended is None for rank in ranks):
                raise DistributedError(_report(worker, ranks, failures, timeout))
            return [read_values(rank.path("json").with_suffix("")) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
            os.close(ours)
            os.close(alive)


def _start(index: int, world_size: int, worker: str, folder: Path, port: int, alive: int, timeout: float) -> Rank:
    environment = os.environ | {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",  # the same run on a machine with GPUs
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of the host's own name
    with (folder / f"rank{index}.out").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.distributed", worker, str(folder), str(alive), str(timeout)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(alive,),
        )
    return Rank(index, process, folder)


def _wait(ranks: list[Rank], deadline: float) -> None:
    """Return when all ranks have ended, when the time is up, or a moment after the first one failed."""
    while time.monotonic() < deadline:
        for rank in ranks:
            rank.look()
        if all(rank.ended is not None for rank in ranks):
            return
        failures = [rank.ended for rank in ranks if rank.ended is not None and rank.failed_at() is not None]
        if failures and time.monotonic() > min(failures) + LAST_WORDS_S:
            return
        time.sleep(POLL_S)


def _report(worker: str, ranks: list[Rank], failures: list[tuple[float, int]], timeout: float) -> str:
    running = [rank.index for rank in ranks if rank.ended is None]
    if failures:
        first = failures[0][1]
        lines = [f"{worker}: rank {first} of {len(ranks)} failed first", ranks[first].story()]
    else:
        first = running[0]
        lines = [f"{worker}: ranks {running} of {len(ranks)} still ran after {timeout} s; rank {first}:"]
        lines.append(ranks[first].story())
    for rank in ranks:
        if rank.index != first:
            lines += [f"--- rank {rank.index}:", rank.story()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- values in files: JSON and safetensors


def write_values(stem: Path, value: Any) -> None:
    """Write JSON values with tensors among them as stem.safetensors and stem.json, the latter last and at once."""
    tensors: dict[str, Any] = {}
    text = json.dumps(_pack(value, tensors))
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, f"{stem}.safetensors")
    unfinished = Path(f"{stem}.unfinished")
    unfinished.write_text(text)
    unfinished.rename(f"{stem}.json")


def read_values(stem: Path) -> Any:
    """Return what `write_values` wrote, tuples as lists."""
    tensors: dict[str, Any] = {}
    if Path(f"{stem}.safetensors").exists():
        from safetensors.torch import load_file

        tensors = load_file(f"{stem}.safetensors")
    return _unpack(json.loads(Path(f"{stem}.json").read_text()), tensors)


def _pack(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        wrong = [key for key in value if not isinstance(key, str) or key == TENSOR]
        if wrong:
            raise TypeError(f"keys that JSON cannot carry: {wrong[:5]}")
        return {key: _pack(element, tensors) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(element, tensors) for element in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    raise TypeError(f"cannot be sent between processes: {type(value).__name__}; use JSON values and tensors")


def _unpack(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _unpack(element, tensors) for key, element in value.items()}
    if isinstance(value, list):
        return [_unpack(element, tensors) for element in value]
    return value


# --------------------------------------------------------------------------------------------------- inside a rank


def main(worker: str, folder: Path, alive: int, timeout: float) -> None:
    """Call the worker and write what it returns, or when and how it raised; never returns."""
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    # Shortly before the time is up, say where every thread stands: the report of a hang shows it.
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(timeout - 1.5, timeout / 2))
    stem = folder / f"rank{os.environ['RANK']}"
    try:
        module, _, function = worker.partition(":")
        arguments = read_values(folder / "arguments")
        result = getattr(importlib.import_module(module), function)(*arguments["args"], **arguments["named"])
        write_values(stem, result)
    except BaseException:
        when = time.monotonic()
        unfinished = Path(f"{stem}.unfinished")
        unfinished.write_text(f"{when}\n{traceback.format_exc()}")
        unfinished.rename(f"{stem}.failure")
        _leave(1)
    _leave(0)


def _leave(status: int) -> None:
    """Exit at once: waiting for other ranks in destructors could hang what already has its result."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # nothing is ever written: this returns when the other end is closed
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
