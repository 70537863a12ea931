"""How commands read flags and report mistakes."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from megawan import cli

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Section:
    """A section."""

    learning_rate: float = 1e-4
    """Peak."""
    mode: Literal["a", "b"] = "a"
    """Mode."""


@dataclass(frozen=True)
class Options:
    """Options."""

    count: int = 1
    """How many."""
    section: Section = field(default_factory=Section)


def parse(*argv: str) -> Options:
    return cli.parse(Options, argv, prog="x.py", description="d", aliases={"lr": "section.learning_rate"})


def test_dashes_underscores_and_aliases_are_the_same_flag() -> None:
    wanted = Options(section=Section(learning_rate=3e-3))
    for argv in (
        ("--section.learning_rate", "3e-3"),
        ("--section.learning-rate=3e-3",),
        ("--lr", "3e-3"),
        ("--lr=3e-3",),
    ):
        assert parse(*argv) == wanted


def test_a_value_with_dashes_is_not_taken_for_a_flag() -> None:
    with pytest.raises(cli.UserError, match="a-b_c"):
        parse("--count", "a-b_c")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--cuont", "3"), ("--cuont", "--count")),
        (("--count", "many"), ("--count", "many", "int")),
        (("--section.mode", "z"), ("--section.mode", "'z'", "'a', 'b'")),
        (("--count",), ("--count", "Missing")),
    ],
)
def test_a_mistake_is_one_line_that_names_flag_value_and_choices(
    argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(cli.UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def script(body: str) -> subprocess.CompletedProcess[str]:
    code = f"from megawan import cli\ndef main(argv):\n    {body}\ncli.run(main, 'x.py')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_exit_codes() -> None:
    wrong = script("raise cli.UserError('no such\\nfile')")
    assert (wrong.returncode, wrong.stderr, wrong.stdout) == (2, "x.py: error: no such file\n", "")
    assert script("return None").returncode == 0
    stopped = script("raise KeyboardInterrupt")
    assert (stopped.returncode, stopped.stderr) == (130, "x.py: interrupted\n")
    broken = script("raise RuntimeError('a bug keeps its traceback')")
    assert broken.returncode == 1 and "Traceback" in broken.stderr


@dataclass(frozen=True)
class Required:
    """Options without defaults."""

    source: Path
    """Where from."""
    layout: Literal["a", "b"]
    """How, in words enough that the help takes a second line of the frame when it is printed in full."""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "missing: --source PATH, --layout {a,b} (see x.py --help)"),
        (("--source", "x"), "missing: --layout {a,b} (see x.py --help)"),
        (
            ("--sauce", "x"),
            "missing: --source PATH, --layout {a,b}; unrecognized: --sauce x (see x.py --help)",
        ),
    ],
)
def test_missing_flags_are_named_without_their_help(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(cli.UserError) as caught:
        cli.parse(Required, argv, prog="x.py", description="d")
    assert str(caught.value) == said


def test_a_reader_that_goes_away_ends_a_command_without_traceback() -> None:
    command = [sys.executable, str(ROOT / "tools/encode_dataset.py"), "--help"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.close()
    _, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (141, b"")


@dataclass(frozen=True)
class Talkative:
    """Options whose help takes two lines of the source."""

    path: Path = Path("x")
    """A first line of the source that fills most of a line of the frame but
    goes on, in a second one, to the end of the sentence."""
    other: int = 1
    """Short."""


def test_help_fills_its_lines_wherever_the_source_breaks_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Talkative, ["--help"], prog="x.py", description="d")
    assert stop.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    frame = [line for line in shown if line.startswith(tuple("╭│╰"))]
    assert len({len(line) for line in frame}) == 1 and len(frame) > 6
    words = [line.strip("│ ") for line in frame]
    start = next(place for place, line in enumerate(words) if line.startswith(("A first", "--path")))
    text = " ".join(words[start : start + 4])
    assert "of the frame but goes on, in a second one, to the end of the sentence. (default: x)" in text
    assert not any(line.endswith("but") for line in words)
