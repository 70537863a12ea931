"""Work ahead of its use: the same items in the same order, errors in their place, and never too much."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from megawan.data.ahead import ROOM, ahead


def count(start: int, items: int, made: list[int], fails: bool = False) -> Iterator[int]:
    for item in range(start, start + items):
        made.append(item)
        yield item
    if fails:
        raise ValueError(f"after {items}")


def jobs(made: list[int]) -> list[Callable[[], Iterator[int]]]:
    return [partial(count, 100 * job, job % 4, made, job == 3) for job in range(8)]


@pytest.mark.parametrize("threads", [0, 1, 3, 20])
def test_items_and_errors_come_in_their_order(threads: int) -> None:
    found: list[list[int]] = []
    for items in ahead(jobs([]), threads):
        found.append([])
        try:
            found[-1].extend(items)
        except ValueError as error:
            assert str(error) == "after 3" and len(found) == 4
    assert found == [list(range(100 * job, 100 * job + job % 4)) for job in range(8)]


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_no_more_is_made_than_there_is_room_for_and_closing_ends_all(threads: int) -> None:
    made: list[int] = []
    before = threading.active_count()
    reading = ahead([partial(count, 1000 * job, 500, made) for job in range(9)], threads)
    assert next(next(reading)) == 0
    time.sleep(0.1)
    assert len(made) <= 1 + (threads + 1) * (ROOM + 1)
    reading.close()
    assert threading.active_count() == before


def test_what_is_not_wanted_to_its_end_holds_nothing_up() -> None:
    made: list[int] = []
    reading = ahead([partial(count, 1000 * job, 500, made) for job in range(6)], 2)
    assert [next(items) for items in reading] == [1000 * job for job in range(6)]
