"""A run folder belongs to one run at a time, can be written by every rank, and is the same place for all of
them: found out before the model is built."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from megawan import dist
from megawan.files import write_text

LOCK = "lock.json"
USED = "config.json"
"""A run that got as far as training writes this file."""
BEAT_S = 20.0
STALE_S = 180.0
"""A lock of another machine that was not touched for so long belongs to a run that is gone."""
_ANOTHER = "another rank cannot use the run folder; its own message says why"


class RunFolderError(ValueError):
    """The run folder cannot be used, in one line."""


class RunFolder:
    """This run's hold on its folder, from `claim` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""
        self._made: list[Path] = []
        self._released = threading.Event()

    def claim(self, checkpoint_bytes: int, job: str) -> None:
        """Lock the folder and try to write where checkpoints will lie; collective.

        `checkpoint_bytes`: what one checkpoint needs; `job`: the scheduler's number of this job, which may
        take over from itself after a requeue. Raises RunFolderError on every rank alike.
        """
        problem = ""
        try:
            if dist.is_main():
                self._lock(job)
                (self.path / "checkpoints").mkdir(exist_ok=True)
        except (OSError, RunFolderError) as error:
            problem = f"--output {self.path}: {_reason(error)}"
        _raise_together(problem)
        try:
            self._probe(checkpoint_bytes)
        except RunFolderError:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder free; does nothing where it is not held. What this run made and never used goes."""
        self._released.set()
        file = self.path / LOCK
        if self._token and _read(file).get("token") == self._token:
            file.unlink(missing_ok=True)
            if self._made and not (self.path / USED).exists():
                shutil.rmtree(self.path / "ranks", ignore_errors=True)
                with contextlib.suppress(OSError):  # a folder that somebody put something into stays
                    for folder in self._made:
                        folder.rmdir()
        self._token = ""

    def _lock(self, job: str) -> None:
        places = (self.path / "checkpoints", self.path, *self.path.parents)
        self._made = [folder for folder in places if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / LOCK
        mine = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "job": job,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8),
        }  # fmt: skip
        while True:
            try:
                with file.open("x", encoding="utf-8") as created:
                    created.write(json.dumps(mine) + "\n")
                break
            except FileExistsError:
                self._take_away_if_stale(file, mine)
        self._token = str(mine["token"])
        threading.Thread(target=self._beat, args=(file,), daemon=True).start()

    def _take_away_if_stale(self, file: Path, mine: dict[str, Any]) -> None:
        theirs = _read(file)
        if theirs.get("host") == mine["host"] and isinstance(theirs.get("pid"), int):
            alive = _started(theirs["pid"]) == theirs.get("started")
        else:
            alive = self._age(file) < STALE_S
        if alive and not (mine["job"] and theirs.get("job") == mine["job"]):
            raise RunFolderError(
                f"another run has held it since {theirs.get('since')} (process {theirs.get('pid')} on"
                f" {theirs.get('host')}{', job ' + theirs['job'] if theirs.get('job') else ''});"
                f" choose another --output, or remove {file} when that run is gone"
            )
        try:
            # By renaming, so that of two runs that find the same stale lock only one goes on with it.
            aside = file.with_name(f"{LOCK}.{mine['token']}")
            file.rename(aside)
            aside.unlink()
        except FileNotFoundError:
            pass

    def _age(self, file: Path) -> float:
        """Return how long ago the lock was touched, by the clock of its own file system, in seconds."""
        now = file.with_name(f".now_{secrets.token_hex(4)}")
        try:
            now.touch()
            return now.stat().st_mtime - file.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            now.unlink(missing_ok=True)

    def _beat(self, file: Path) -> None:
        while not self._released.wait(BEAT_S):
            try:
                os.utime(file)
            except OSError:  # the next beat may find it again
                continue

    def _probe(self, checkpoint_bytes: int) -> None:
        root, rank = self.path / "checkpoints", torch_dist.get_rank()
        probe, problem = root / f".probe_{rank:05d}", ""
        try:
            root.mkdir(parents=True, exist_ok=True)  # it is there, unless this rank sees another disk
            write_text(probe, "x" * 4096)
        except OSError as error:
            problem = f"rank {rank} cannot write into {root}: {_reason(error)}"
        _raise_together(problem)
        if dist.is_main():
            seen = len(list(root.glob(".probe_" + "[0-9]" * 5)))
            world, free = torch_dist.get_world_size(), shutil.disk_usage(root).free
            if seen != world:
                problem = (
                    f"{root} is not the same folder for all ranks: {seen} of {world} wrote into rank 0's;"
                    " choose an --output on a file system that all nodes share"
                )
            elif free < checkpoint_bytes:
                problem = (
                    f"{root} has {free / 1e9:.1f} GB free, one checkpoint needs {checkpoint_bytes / 1e9:.1f}"
                    " GB; free some, or choose another --output"
                )
        sound = dist.all_succeeded(not problem)
        probe.unlink(missing_ok=True)
        torch_dist.barrier()  # a folder that is refused is taken away: nobody writes there any more
        if not sound:
            raise RunFolderError(problem or _ANOTHER)


def _raise_together(problem: str) -> None:
    """Raise on every rank when any rank has a problem; the one that has it says it."""
    if not dist.all_succeeded(not problem):
        raise RunFolderError(problem or _ANOTHER)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _started(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks since boot; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
