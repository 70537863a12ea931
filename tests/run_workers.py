"""What each rank does in the tests of what surrounds a run's steps: agreement, run folder, saver."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from megawan import dist
from megawan.agreement import Request, StepAgreement
from megawan.checkpoint import CheckpointOptions, StepWeights
from megawan.cli import RunFailed
from megawan.run_folder import LOCK, RunFolder
from megawan.saving import Saver
from tests.checkpoint_workers import pieces


def cases(folder: str) -> dict[str, Any]:
    """Run every case in one group; return what this rank saw."""
    dist.initialize(dist.environment(), torch.device("cpu"), 60)
    seen = {
        "agreement": agreement(Path(folder)),
        "folder": run_folder(Path(folder)),
        "saver": saver(Path(folder)),
    }
    dist.shutdown()
    return seen


def agreement(folder: Path) -> dict[str, Any]:
    """Let one rank or the other ask."""
    rank, seen = torch.distributed.get_rank(), dict[str, Any]()
    warning = dist.PreemptionWarning()
    asked = StepAgreement(folder, 0.0, warning, group=0, groups=1, timeout_s=60)
    seen["nobody"] = wish(asked.ask("samples [3]"))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    seen["warned"] = [wish(asked.ask("samples [3]")), wish(asked.ask("samples [4]"))]
    warning.came = ""
    for name in ("save", "save_quit"):
        if rank == 0:
            (folder / name).touch()
        seen[name] = [wish(asked.ask("")), wish(asked.ask(""))]
    try:
        seen["different samples"] = wish(asked.ask(f"samples [{rank}]"))
    except RunFailed as error:
        seen["different samples"] = str(error)
    places = StepAgreement(folder, 0.05, warning, group=rank, groups=2, timeout_s=60)
    seen["two places"] = wish(places.ask(f"samples [{rank}]"))
    time.sleep(3.1)
    seen["minutes"] = wish(places.ask(f"samples [{rank}]"))
    places.saved()
    for _ in range(2):  # the second tells of the first
        if rank == 1:
            time.sleep(0.3)
        late = places.ask(f"samples [{rank}]")
    seen["late"] = [late.last_rank, 0.2 < late.late_s < 5]
    seen["saved"] = wish(places.ask(f"samples [{rank}]"))
    return seen


def wish(request: Request) -> tuple[str, bool]:
    """Return what is asked, without who was late."""
    return request.reason, request.quit


def claim(path: Path, needed: int = 0, job: str = "") -> str:
    """Return what a claim says, "held" when it succeeds; release it again."""
    folder = RunFolder(path)
    try:
        folder.claim(needed, job)
    except ValueError as error:
        return str(error)
    held = (path / LOCK).exists()
    torch.distributed.barrier()
    folder.release()
    torch.distributed.barrier()
    return f"held {held}, then {(path / LOCK).exists()}"


def run_folder(base: Path) -> dict[str, Any]:
    """Claim folders that are free, held, left behind, full, not shared or no folders."""
    rank, seen = torch.distributed.get_rank(), dict[str, Any]()
    seen["free"] = claim(base / "free")
    with_lock = {
        "alive": {"host": os.uname().nodename, "pid": os.getppid(), "started": started(os.getppid())},
        "dead": {"host": os.uname().nodename, "pid": os.getppid(), "started": "1"},
        "elsewhere": {"host": "another", "pid": 1, "started": "1"},
        "mine": {"host": "another", "pid": 1, "started": "1", "job": "77"},
        "unreadable": None,
    }
    for name, lock in with_lock.items():
        path = base / name
        if rank == 0:
            path.mkdir()
            (path / LOCK).write_text("{" if lock is None else json.dumps(lock))
        torch.distributed.barrier()
        seen[name] = claim(path, job="77")
    if rank == 0:
        long_ago = time.time() - 1000
        for name in ("elsewhere", "unreadable"):
            os.utime(base / name / LOCK, (long_ago, long_ago))
    torch.distributed.barrier()
    seen["untouched for long"] = [claim(base / name) for name in ("elsewhere", "unreadable")]
    seen["too small"] = claim(base / "free", needed=2**60)
    seen["not shared"] = claim(base / f"of rank {rank}")
    if rank == 0:
        (base / "file").touch()
    torch.distributed.barrier()
    seen["a file"] = claim(base / "file")
    torch.distributed.barrier()
    seen["left"] = sorted(path.name for path in (base / "alive").rglob("*"))
    seen["unused"] = (base / "free").exists()
    return seen


def started(pid: int) -> str:
    """Return when a process started, as the kernel counts it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def saver(base: Path) -> dict[str, Any]:
    """Save aside: what changes after the copy is not saved, one save waits for the other, a failure is
    said."""
    rank, world, seen = torch.distributed.get_rank(), torch.distributed.get_world_size(), dict[str, Any]()
    root = base / "aside"
    saves = Saver(root, CheckpointOptions(keep_last=2), 60)
    held = list(pieces(rank, world))
    before = {(piece.kind, piece.name): piece.values.clone() for piece in held}
    for step in (1, 2, 3):
        saves.start(step, held, {"variant": "debug"})
        if step == 3:
            for piece in held:
                piece.values.fill_(float(step))  # training goes on
    saves.finish()
    torch.distributed.barrier()
    seen["ended"] = [saved.describe().partition(" (")[0].replace(str(root), "") for saved in saves.ended()]
    seen["ended again"] = saves.ended()
    seen["left"] = sorted(path.name for path in root.iterdir())
    kept = StepWeights(root / "step_0000003")
    seen["as copied"] = all(
        torch.equal(
            kept.load_range(piece.kind, piece.name, piece.start, len(piece.values)),
            before[piece.kind, piece.name],
        )
        for piece in held
    )
    torch.distributed.barrier()
    if rank == 0:
        root.rename(base / "moved")
        root.touch()
    torch.distributed.barrier()
    saves.start(4, held, {})
    saves.finish()
    seen["no folder"] = [bool(saved.problem) for saved in saves.ended()]
    seen["threads"] = [thread.name for thread in threading.enumerate() if "_save" in thread.name]
    return seen
