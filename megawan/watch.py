"""Who is stuck, who failed first: every rank leaves a sign of life in OUTPUT/ranks, and looks at the others'
when it comes to a standstill.

Files, because a rank that hangs in a collective can talk over no process group, and because a person can read
them while the run hangs.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as torch_dist

from megawan import dist
from megawan.cli import RunFailed

START, BUILD = "start", "build"
PHASES = (
    *(START, "health check, alone", "health check, together", BUILD, "data", "agreement"),
    *("forward and backward", "log", "validation", "samples", "save", "end"),
)
"""What a rank does before the steps and in each, in this order."""
_UNTIMED = (START, BUILD, "samples")
"""What may take its time: a rank reads all weights, or makes a video."""
_PACKAGE = str(Path(__file__).resolve().parent)
_FIRST_ERROR_S = 5.0
_PULSE_BYTES = 1024


@dataclass(frozen=True)
class Pulse:
    """Where one rank is, as its file says."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    """How long it has been there."""
    where: str
    """The collective or function that it is in."""

    def describe(self) -> str:
        """Return rank, machine and process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Watch:
    """This rank's sign of life, and its look at everybody's.

    Threads write where the rank is, and look: they warn when a phase lasts half the time-out, and end the
    process when one outlasts the time-out, so that no hang outlives it even where a collective's own
    time-out does not help.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        """`folder`: the run's, on a file system that all ranks share. Collective."""
        self._folder = folder / "ranks"
        self._timeout = timeout_s
        self._beat_s = min(10.0, max(0.2, timeout_s / 10))
        self._rank, self._world = torch_dist.get_rank(), torch_dist.get_world_size()
        self._at: tuple[int, str, str, float] = (0, START, "", time.monotonic())
        self._closed = threading.Event()
        if dist.is_main():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)
        torch_dist.barrier()
        self._main = threading.get_ident()
        self._write(self._pulse())  # so that a rank which dies at once has a name and a machine
        # Two threads: the disk may let a beat wait for long, and the look must not wait for it.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._look)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, phase: str, samples: str = "") -> None:
        """Say that this rank begins a phase of a step, one of PHASES."""
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is not in watch.PHASES: a report could not say who is behind")
        self._at = (step, phase, samples, time.monotonic())

    def close(self) -> None:
        """Stop watching; what the files say stays."""
        self._closed.set()
        for thread in self._threads:
            thread.join(self._beat_s)

    def explain(self, error: Exception) -> Exception:
        """Return what to raise for an error of this rank's step: the error with its place, or RunFailed
        when it only says that another rank is gone."""
        step, phase, samples, _ = self._at
        place = f"rank {self._rank}, step {step}, {phase}{': ' + samples if samples else ''}"
        if not _lost_contact(error):
            first = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._record(f"rank {self._rank} failed at step {step} ({phase}): {first}")
            error.add_note(place)
            return error
        # The rank that failed may still be writing down why.
        end = time.monotonic() + _FIRST_ERROR_S
        while not (cause := self._recorded()) and time.monotonic() < end:
            time.sleep(0.1)
        return RunFailed(f"{cause or self._lost()}; this is {place}")

    def _record(self, text: str) -> None:
        try:
            with (self._folder / "failed.txt").open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError:  # another rank was first, or the folder is gone: both errors are shown then
            return

    def _recorded(self) -> str:
        try:
            return (self._folder / "failed.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def _lost(self) -> str:
        silent = [pulse for pulse, age in self._pulses().values() if self._is_gone(pulse, age)]
        if silent:
            return f"lost {', '.join(pulse.describe() for pulse in silent)}, last at step {silent[0].step}"
        return f"lost contact with another rank; {self._report()}"

    def _beat(self) -> None:
        while not self._closed.wait(self._beat_s):
            self._write(self._pulse())

    def _pulse(self) -> Pulse:
        step, phase, _, since = self._at
        seconds = time.monotonic() - since
        return Pulse(self._rank, socket.gethostname(), os.getpid(), step, phase, seconds, self._where())

    def _look(self) -> None:
        warned = 0.0
        while not self._closed.wait(self._beat_s):
            _, phase, _, since = self._at
            seconds = time.monotonic() - since
            if seconds > self._timeout / 2 and warned != since and self._speaks():
                warned = since
                # What one rank does alone at the start, such as reading weights, may take its time.
                ends = f"; the run ends after {self._timeout:g} s (--dist_timeout)" * (phase not in _UNTIMED)
                self._print(f"{self._report()}{ends}")
            # A collective that waits ends by itself at the time-out, with an error that says more.
            if seconds > 1.1 * self._timeout + 5 and phase not in _UNTIMED:
                self._print(f"rank {self._rank} hangs: {self._report()}")
                dist.leave(1)

    def _write(self, pulse: Pulse) -> None:
        """Write in place and at one length: a new or a truncated file would wait for a disk that is busy
        with a checkpoint."""
        text = json.dumps(asdict(pulse)).encode().ljust(_PULSE_BYTES)
        with contextlib.suppress(OSError):  # the folder may come back; without it the report says less
            descriptor = os.open(self._file(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, text, 0)
            finally:
                os.close(descriptor)

    def _print(self, text: str) -> None:
        print(f"watchdog: {text}", file=sys.stderr, flush=True)

    def _speaks(self) -> bool:
        """Return whether this is the first rank that lives: one report is enough."""
        living = [rank for rank, (pulse, age) in self._pulses().items() if not self._is_gone(pulse, age)]
        return self._rank == min(living, default=self._rank)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _pulses(self) -> dict[int, tuple[Pulse, float]]:
        """Return rank → (pulse, seconds since it was written, by the clock of the shared file system)."""
        found: dict[int, tuple[Pulse, float]] = {}
        try:
            now = self._file(self._rank).stat().st_mtime
        except OSError:
            return found
        for rank in range(self._world):
            try:
                file = self._file(rank)
                pulse = Pulse(**json.loads(file.read_text(encoding="utf-8")))
                found[rank] = pulse, now - file.stat().st_mtime
            except (OSError, ValueError, TypeError):
                continue
        return found

    def _is_gone(self, pulse: Pulse, age: float) -> bool:
        if age > 3 * self._beat_s + 1:
            return True
        return pulse.host == socket.gethostname() and not _lives(pulse.pid)

    def _report(self) -> str:
        """Return who is behind and who waits, in one line."""
        pulses = self._pulses()
        if self._world == 1 or not pulses:
            return f"step {self._at[0]}, {self._at[1]}: {self._where()}"
        gone = {rank: age for rank, (pulse, age) in pulses.items() if self._is_gone(pulse, age)}
        silent = [rank for rank in range(self._world) if rank not in pulses]
        place = {rank: (pulse.step, PHASES.index(pulse.phase)) for rank, (pulse, _) in pulses.items()}
        last = [rank for rank in place if place[rank] == min(place.values())]
        behind = sorted({*gone, *(last if len(last) < len(place) else [])})
        said = [
            f"{pulses[rank][0].describe()} is behind: "
            + (f"no sign of life for {gone[rank]:.0f} s, last at " if rank in gone else "")
            + _place(pulses[rank][0])
            for rank in behind[:4]
        ]
        said += [f"ranks {silent[:8]} never gave a sign of life"] if silent else []
        waiting = [rank for rank in pulses if rank not in behind]
        if waiting:
            first = pulses[waiting[0]][0]
            said.append(f"{len(waiting)} ranks wait, rank {first.rank} at {_place(first)}")
        return "; ".join(said)

    def _where(self) -> str:
        """Return the collective, or else the function, that this process is in, and the line of ours that
        called it."""
        me, mine, others = threading.get_ident(), (False, "outside of Python"), list[tuple[bool, str]]()
        for thread, frame in sys._current_frames().items():
            found = None if thread == me else _innermost(frame)
            if found and thread == self._main:
                mine = found
            elif found:
                others.append(found)
        # A main thread may wait for autograd's, whose collective tells more; a saver's tells nothing.
        waiting = [place for collective, place in others if collective and "saving.py" not in place]
        return waiting[0] if waiting and not mine[0] else mine[1]


def _innermost(frame: FrameType | None) -> tuple[bool, str] | None:
    """Return (whether it is a collective, its name and our line) of a stack, None for one that is not
    ours."""
    called, collective = "", False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE):
            line = f"megawan/{Path(file).relative_to(_PACKAGE)}:{frame.f_lineno}"
            return collective, f"{called or name} at {line}"
        if "distributed_c10d" in file and name not in ("wrapper", "wait", "_wait"):
            called, collective = name, True
        elif not called and not name.startswith("<"):
            called = name
        frame = frame.f_back
    return None


def _place(pulse: Pulse) -> str:
    return f"step {pulse.step}, {pulse.phase}, since {pulse.seconds:.0f} s in {pulse.where}"


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def _lost_contact(error: Exception) -> bool:
    """Return whether an error is a collective's that another rank left or kept waiting."""
    if isinstance(error, torch_dist.DistError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in said for word in ("gloo", "nccl", "connection closed by peer", "connection reset", "socket")
    )
