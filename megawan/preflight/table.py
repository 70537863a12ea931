"""Checks as data: one row each, the rows of all ranks put together, and the table that a person reads."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megawan.cli import UserError

Found = TypeVar("Found")
MARKS = {True: "✓", False: "✗", None: "–"}
PLAIN = {True: "ok", False: "FAIL", None: "-"}
"""For a terminal that cannot show the marks."""


@dataclass(frozen=True)
class Check:
    """One row."""

    name: str
    ok: bool | None
    """None: it does not apply here, or could not be tried."""
    found: str
    mend: str = ""
    alike: str = ""
    """What must be the same on all ranks."""


class Checks:
    """Rows in the order in which they were tried; what one raises becomes its row, and the next is tried."""

    def __init__(self) -> None:
        self.rows: list[Check] = []

    def attempt(
        self,
        name: str,
        work: Callable[[], Found],
        say: Callable[[Found], str],
        mend: str,
        alike: Callable[[Found], str] | None = None,
    ) -> Found | None:
        """Return what `work` returned, told by `say`, or None after a row that says what it raised.

        `alike`: what of it must be the same on all ranks, if not what `say` says.
        """
        try:
            found = work()
            self.rows.append(Check(name, True, say(found), mend, (alike or say)(found)))
            return found
        except (UserError, ValueError, OSError, RuntimeError, ImportError) as error:
            self.rows.append(Check(name, False, one_line(error), mend))
            return None

    def skip(self, name: str, why: str) -> None:
        """Add the row of a check that does not apply or cannot be tried."""
        self.rows.append(Check(name, None, why))


def one_line(error: Exception) -> str:
    """Return what an error says."""
    return " ".join((str(error) or type(error).__name__).split())


def merge(by_rank: Sequence[Sequence[Check]], hosts: Sequence[str]) -> list[Check]:
    """Return one row for each check out of those of all ranks, which tried the same in the same order.

    Fails what failed anywhere, naming rank and machine, and what is not alike.
    """
    return [_merge_one(rows, hosts) for rows in zip(*by_rank, strict=True)]


def _merge_one(rows: Sequence[Check], hosts: Sequence[str]) -> Check:
    first = rows[0]
    failed = [rank for rank, row in enumerate(rows) if row.ok is False]
    if failed:
        row = rows[failed[0]]
        everywhere = len(failed) == len(rows)
        return dataclasses.replace(row, found=("" if everywhere else _who(failed, hosts) + ": ") + row.found)
    untried = [rank for rank, row in enumerate(rows) if row.ok is None]
    if untried and len(untried) < len(rows):  # another row failed there, and says why
        row = rows[untried[0]]
        return dataclasses.replace(row, found=f"{_who(untried, hosts)}: {row.found}")
    others = [rank for rank, row in enumerate(rows) if row.alike != first.alike]
    if others:
        theirs = rows[others[0]]
        return Check(
            first.name,
            False,
            f"{_who(others, hosts)}: {theirs.found}; but {_who([0], hosts)}: {first.found}",
            "start all ranks from the same files with the same words, and let all see the same disks",
        )
    return first


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    shown = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks[:3])
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def failed(rows: Sequence[Check]) -> list[Check]:
    """Return the rows that stop the run."""
    return [row for row in rows if row.ok is False]


def as_json(rows: Sequence[Check], world_size: int) -> str:
    """Return one JSON object: ok, world_size, and of each check name, ok (true, false, null), found, mend."""
    checks = [
        {"name": row.name, "ok": row.ok, "found": row.found, "mend": row.mend if row.ok is False else ""}
        for row in rows
    ]
    return json.dumps({"ok": not failed(rows), "world_size": world_size, "checks": checks}, indent=2)


def as_text(rows: Sequence[Check], encoding: str) -> str:
    """Return the table, below each ✗ its mend, and a last line that counts."""
    marks = MARKS
    try:
        "".join(MARKS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        marks = PLAIN
    wide = max(len(mark) for mark in marks.values())
    named = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{marks[row.ok]:<{wide}} {row.name:<{named}}  {row.found}")
        if row.ok is False and row.mend:
            lines.append(f"{'':<{wide + 1 + named}}  mend: {row.mend}")
    wrong = [row.name for row in failed(rows)]
    passed = sum(row.ok is True for row in rows)
    verdict = f"{len(wrong)} FAILED: {', '.join(wrong)}" if wrong else "nothing stops this run"
    untried = sum(row.ok is None for row in rows)
    lines.append(f"preflight: {passed} passed, {untried} do not apply; {verdict}")
    return "\n".join(lines).encode(encoding, "replace").decode(encoding)
