"""Start train.py on ranks of its own, without a launcher that would hide how each of them ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megawan.dist import free_port

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "megawan/train.py"


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended: exit codes (None: still there at the end), outputs, seconds."""

    codes: list[int | None]
    out: list[str]
    err: list[str]
    seconds: float


def train(
    cwd: Path,
    *flags: object,
    fault: str = "",
    world: int = 2,
    timeout: float = 90,
    variables: dict[str, str] | None = None,
    meanwhile: Callable[[list[int], Path], None] | None = None,
    program: Sequence[object] = (TRAIN,),
    of_rank_1: Sequence[object] = (),
) -> Ended:
    """Run `train.py flags...` on `world` ranks in `cwd` and return how each ended; none outlives this call.

    `fault`: MEGAWAN_FAULT. `of_rank_1`: flags for this rank alone. `meanwhile` is called with the ranks'
    process numbers and the file of rank 0's output. Ends at `timeout`, or 3 s after the last rank that is
    not stopped.
    """
    began, port, ranks = time.monotonic(), free_port(), list[subprocess.Popen[bytes]]()
    files = [(cwd / f".out{rank}", cwd / f".err{rank}") for rank in range(world)]
    try:
        for rank, (out, err) in enumerate(files):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "MEGAWAN_FAULT": fault,
                **(variables or {}),
            }
            with out.open("wb") as out_file, err.open("wb") as err_file:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, (*program, *flags, *(of_rank_1 if rank == 1 else ())))],
                        cwd=cwd,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out_file,
                        stderr=err_file,
                        start_new_session=True,
                    )
                )
        if meanwhile is not None:
            meanwhile([rank.pid for rank in ranks], files[0][0])
        _wait(ranks, began + timeout)
        seconds, codes = time.monotonic() - began, [rank.poll() for rank in ranks]
    finally:
        for rank_process in ranks:
            try:
                os.killpg(rank_process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            rank_process.wait()
    return Ended(
        codes,
        [out.read_text(errors="replace") for out, _ in files],
        [err.read_text(errors="replace") for _, err in files],
        seconds,
    )


def _wait(ranks: list["subprocess.Popen[bytes]"], deadline: float) -> None:
    while time.monotonic() < deadline:
        if all(rank.poll() is not None or _stopped(rank.pid) for rank in ranks):
            return
        time.sleep(0.05)


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
