"""How every command here reads its flags and reports a mistake: one line, exit code 2, no traceback."""

import contextlib
import io
import itertools
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import tyro

Options = TypeVar("Options")


class UserError(Exception):
    """A mistake of the person at the keyboard. The message names what was given, what is legal and what to
    do."""


class RunFailed(Exception):
    """A run that cannot go on, through no mistake of a person; the message is what is known about it."""


def parse(
    options: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Options | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Options:
    """Return `options` (a dataclass) filled from `argv`; `-` and `_` are the same in a flag.

    `aliases` maps a flag that other trainers use to ours (both with underscores, without the leading dashes).
    Raises UserError for an unknown flag, a wrong type or an illegal choice; `--help` prints the help and
    exits 0.
    """
    argv = [_rename(word, aliases or {}) for word in argv]
    printed = io.StringIO()
    # Not a StringIO: tyro draws frames only where the encoding is spelt "utf-8".
    shown = io.TextIOWrapper(io.BytesIO(), encoding=(sys.stdout.encoding or "utf-8").lower())
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(shown):
            if default is None:
                return tyro.cli(options, args=argv, prog=prog, description=description, use_underscores=True)
            return tyro.cli(
                options, args=argv, prog=prog, description=description, use_underscores=True, default=default
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            shown.seek(0)
            print(_reflow(shown.read()), end="")
            raise
        raise UserError(_one_line(printed.getvalue(), prog)) from None


def _rename(word: str, aliases: Mapping[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    flag = flag.replace("-", "_")
    return f"--{aliases.get(flag, flag)}{equals}{value}"


def _one_line(box: str, prog: str) -> str:
    """Return what tyro's framed message says as one line."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()]
    title, *lines = [line for line in lines if line] or [box]
    if title == "Required options":  # a frame of its own form, with every flag's help in it
        lines, unknown = _split_at(lines, "Unrecognized options:")
        missing = ", ".join(line for line in lines if line.startswith("--"))
        unknown, _ = _split_at(unknown, "For full helptext")
        text = f"missing: {missing}" + (f"; unrecognized: {' '.join(unknown)}" if unknown else "")
    else:
        text = " ".join(lines or [title])
        text = re.sub(r"\s*(Argument helptext:.*|For full helptext, (run|see) .*)$", "", text)
        text = re.sub(r"\s+", " ", text).strip()
    return f"{text} (see {prog} --help)"


def _split_at(lines: list[str], start: str) -> tuple[list[str], list[str]]:
    """Return the lines before the first that starts with `start`, and those after it."""
    at = next((index for index, line in enumerate(lines) if line.startswith(start)), len(lines))
    return lines[:at], lines[at + 1 :]


def _reflow(text: str) -> str:
    """Return a help text whose paragraphs fill their lines; tyro also breaks where the source does."""
    done: list[str] = []
    for indent, lines in itertools.groupby(text.splitlines(), _help_indent):
        if indent:
            rows = list(lines)
            room = len(rows[0]) - 2  # between the two sides of the frame
            words = " ".join(line[1:-1].strip() for line in rows)
            filled = textwrap.wrap(words, room - indent - 1, break_on_hyphens=False)
            done += [f"│{' ' * indent + line:<{room}}│" for line in filled]
        else:
            done += lines
    return "\n".join(done) + "\n"


def _help_indent(line: str) -> int:
    """Return by how much a line of a flag's help is indented in its frame, or 0 for any other line."""
    match = re.fullmatch(r"│( {5,})[^- ].*│", line)
    return len(match[1]) if match else 0


def run(
    main: Callable[[Sequence[str]], None],
    prog: str,
    rank: int = 0,
    leave: Callable[[int], NoReturn] = sys.exit,
) -> NoReturn:
    """Call `main(argv)` and exit: 0 when it returns, 2 with one line when it raises UserError, 1 with one
    line for RunFailed and with a traceback for anything unforeseen, 130 on Ctrl-C, 141 when its reader went
    away.

    In a launched world all ranks find the same mistake and rank 0 says it. Another rank waits until the
    launcher ends it; one that is still there after 5 seconds found a mistake of its own, and says it.
    `leave` ends the process; a program that joins a process group gives dist.leave.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        who = f"{prog} (rank {rank})" if rank else prog
        if rank:
            time.sleep(5)
        sys.stderr.write(f"{who}: error: {' '.join(str(error).split())}\n")
        leave(2)
    except RunFailed as error:
        sys.stderr.write(f"{prog} (rank {rank}): {' '.join(str(error).split())}\n")
        leave(1)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        leave(130)
    except BrokenPipeError:  # `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would say it again
        leave(141)
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)
