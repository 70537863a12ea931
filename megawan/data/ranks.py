"""The ranks of one encode, which share nothing but the folder they write: small files say how far each is.

    STORE/ranks/<rank>.json     {"is": NONCE, "hears": NONCE of rank 0, "at": COUNT, ...}

Rank 0 writes the index when all others have told it what they did; they end when it has heard them. Every
process draws a nonce, and what is said counts only for whom it is said to, so files that a killed call left
behind are never believed. There is no process group: the ranks work for hours without each other, and one
that dies costs only its own share.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megawan.data.latents import RANKS, check_folder
from megawan.files import write_json

BEAT_S = 5.0  # how often a rank says that it is getting on
POLL_S = 0.2
GOODBYE_S = 120.0  # how long rank 0 waits until all know; NFS may show old files for a minute


class Ranks:
    """This rank among `size` that fill `store`; ValueError when another gives no sign for `timeout` s."""

    def __init__(self, store: Path, rank: int, size: int, timeout: float) -> None:
        """Raises ValueError for a folder that holds anything but a store, and leaves it as it is."""
        if timeout <= 0:
            raise ValueError(f"the time-out of the ranks must be above 0 s; given: {timeout:g}")
        self.rank = rank
        self.size = size
        self._folder = store / RANKS
        self._timeout = timeout
        self._beat = min(BEAT_S, timeout / 4)
        # "done": what it did; "failed": why it gives up; "heard": the nonces of those that rank 0 has heard.
        self._said: dict[str, Any] = {"is": os.urandom(8).hex(), "hears": None, "at": 0}
        self._last_beat = time.monotonic()
        check_folder(store)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._say()

    def beat(self) -> None:
        """Say that another clip is done; to be called after each."""
        self._said["at"] += 1
        if time.monotonic() - self._last_beat > self._beat:
            self._say()

    def gather(self, done: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return what every rank did, by rank, on rank 0; None on the others, once rank 0 knows it.

        Raises ValueError naming the ranks that failed or gave no sign of life for the time-out.
        """
        if self.rank:
            self._say({"done": done})
            self._wait([0], lambda said: self._said["is"] in said.get("heard", []))
            self._file(self.rank).unlink(missing_ok=True)
            return None
        others = self._wait(range(1, self.size), lambda said: said["hears"] == self._said["is"])
        self._say({"done": True, "heard": self._nonces()})
        end = time.monotonic() + GOODBYE_S
        while self._nonces() and time.monotonic() < end:
            time.sleep(POLL_S)
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)
        self._folder.rmdir()
        with contextlib.suppress(OSError):  # it may hold nothing, and then it shall not be there
            self._folder.parent.rmdir()
        own = json.loads(json.dumps(done))  # as if it had been told, too
        return [own, *(others[rank]["done"] for rank in range(1, self.size))]

    def fail(self, reason: str) -> None:
        """Tell the others that this rank gives up, so that they need not wait out their time."""
        if self.rank:
            self._hear()
        self._say({"failed": reason, "heard": [] if self.rank else self._nonces()})

    def _wait(
        self, ranks: Sequence[int], believed: Callable[[dict[str, Any]], bool]
    ) -> dict[int, dict[str, Any]]:
        """Return what `ranks` said when all are done, as far as `believed` takes it for said to this call."""
        found: dict[int, dict[str, Any]] = {}
        last: dict[int, Any] = {}
        since = dict.fromkeys(ranks, time.monotonic())
        while len(found) < len(since):
            if self.rank:
                self._hear()
            now = time.monotonic()
            if now - self._last_beat > self._beat:  # waiting is getting on too
                self._said["at"] += 1
                self._say()
            for rank in since:
                said = self._read(rank)
                if said != last.get(rank):
                    last[rank], since[rank] = said, now
                if said is None or rank in found or not believed(said):
                    continue
                if said.get("failed") is not None:
                    raise ValueError(f"rank {rank} of {self.size} failed: {said['failed']}")
                if "done" in said:
                    found[rank] = said
            silent = [rank for rank in since if rank not in found and now - since[rank] > self._timeout]
            if silent:
                raise ValueError(
                    f"rank {', '.join(map(str, silent))} of {self.size} gave no sign of life for"
                    f" {self._timeout:g} s; what is finished is kept, so run the same command again"
                )
            time.sleep(POLL_S)
        return found

    def _hear(self) -> None:
        """Take note of who rank 0 is, so that it knows that it is told, and not a call before it."""
        first = self._read(0)
        if first is not None and first["is"] != self._said["hears"]:
            self._say({"hears": first["is"]})

    def _nonces(self) -> list[str]:
        return [said["is"] for rank in range(1, self.size) if (said := self._read(rank)) is not None]

    def _say(self, news: Mapping[str, Any] | None = None) -> None:
        self._said |= news or {}
        self._last_beat = time.monotonic()
        write_json(self._file(self.rank), self._said)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            said = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return said if isinstance(said, dict) and {"is", "hears", "at"} <= said.keys() else None

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"
