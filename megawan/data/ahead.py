"""Work done ahead of its use by threads: what comes out, and in which order, is as without them."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

ROOM = 2  # items that a job may be ahead of its use
LOOK_S = 0.1  # how often a job that has no room looks whether it is still wanted


def ahead(
    jobs: Iterable[Callable[[], Iterator[Item]]], threads: int
) -> Generator[Iterator[Item], None, None]:
    """Yield the items of every job as an iterator, in the order of `jobs`; an error comes where it happened.

    Each of `threads` threads runs one job and keeps at most ROOM items beside the one it makes, so memory is
    bounded by (threads + 1) x (ROOM + 1) items; 0 runs a job when its items are asked for. An iterator ends
    when the next one is asked for, and all jobs when the generator is closed.
    """
    if threads < 1:
        for job in jobs:
            yield job()
        return
    waiting: deque[_Job[Item]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for job in jobs:
                waiting.append(_Job(job))
                pool.submit(waiting[-1].run)
                if len(waiting) > threads:
                    yield waiting[0].items()
                    waiting.popleft().drop()
            while waiting:
                yield waiting[0].items()
                waiting.popleft().drop()
        finally:
            for unwanted in waiting:
                unwanted.drop()


class _Job(Generic[Item]):
    def __init__(self, job: Callable[[], Iterator[Item]]) -> None:
        self._job = job
        self._made: queue.Queue[Item | _End] = queue.Queue(ROOM)
        self._unwanted = threading.Event()

    def run(self) -> None:
        try:
            for item in self._job():
                if not self._put(item):
                    return
            self._put(_End(None))
        except BaseException as error:  # whatever it is belongs to whoever uses the items
            self._put(_End(error))

    def items(self) -> Iterator[Item]:
        while not isinstance(made := self._made.get(), _End):
            yield made
        if made.error is not None:
            raise made.error

    def drop(self) -> None:
        self._unwanted.set()

    def _put(self, made: "Item | _End") -> bool:
        while not self._unwanted.is_set():
            with contextlib.suppress(queue.Full):
                self._made.put(made, timeout=LOOK_S)
                return True
        return False


@dataclass(frozen=True)
class _End:
    """A job has no more items, because of `error` if there is one."""

    error: BaseException | None
