"""Lists of clips and captions in the forms that people have them: found out, checked row by row, said.

Read are .csv, .json (a list of objects) and .jsonl with the column names of DiffSynth-Studio (`video`,
`prompt`), VideoX-Fun (`file_path`, `text`), musubi-tuner (`video_path` or `image_path`, `caption`) and the HF
video folders (`file_name`, `caption`), a folder that holds a metadata.csv/.json/.jsonl, and a folder of clips
with a .txt caption beside each.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megawan.data.video import IMAGES, VIDEOS

FILE_COLUMNS = ("video", "file_path", "file_name", "video_path", "path", "image", "image_path")
PROMPT_COLUMNS = ("prompt", "text", "caption")
METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
CLIP_SUFFIXES = (*VIDEOS, *IMAGES)
LONGEST_FIELD = 1 << 20
PLACES_NAMED = 20


@dataclass(frozen=True)
class Row:
    """One clip: its file, its caption, and the row number that messages name (1 is the first after a
    header)."""

    path: Path
    prompt: str
    number: int


@dataclass(frozen=True)
class Manifest:
    """All rows, the folder that their paths lie under, and what was found, for people."""

    root: Path
    rows: tuple[Row, ...]
    found: str


def read_manifest(path: Path, *, root: Path | None = None, allow_outside_root: bool = False) -> Manifest:
    """Return the clips that `path` lists, a file or a folder; relative paths start at `root` (default: beside
    it).

    Raises FileNotFoundError or ValueError naming file and row for whatever is missing, malformed or outside
    the root; of several such rows it gives the first's mistake and the others' numbers.
    """
    if path.is_dir():
        listed = next((path / name for name in METADATA_NAMES if (path / name).is_file()), None)
        if listed is None:
            return _sidecars(path, allow_outside_root)
        path = listed
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: a manifest ends in {', '.join(readers)}, or is a folder")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    records = reader(path, text)
    if not records:
        raise ValueError(f"{path}: lists no clips")
    root = (root or path.parent).resolve()
    first_column, prompt_column = _columns(path, records[0])
    used: dict[str, None] = {}
    rows = []
    mistakes: dict[str, str] = {}
    for number, record in enumerate(records, 1):
        where = f"{path} row {number}"
        # Lists of videos and images have a column for each, and leave one of them blank.
        file_column = next(
            (name for name in FILE_COLUMNS if record.get(name) not in (None, "")), first_column
        )
        used[file_column] = None
        try:
            file = _field(record, file_column, where)
            prompt = _field(record, prompt_column, where)
            rows.append(Row(resolve_inside(root, file, where, allow_outside_root), prompt, number))
        except ValueError as error:
            mistakes[f"row {number}"] = str(error)
    _raise_for(mistakes)
    columns = f"{' or '.join(used)} and {prompt_column}"
    return Manifest(root, tuple(rows), f"{path.name}, columns {columns}, {len(rows)} rows")


def resolve_inside(root: Path, name: str, where: str, allow_outside_root: bool = False) -> Path:
    """Return the absolute path of `name` under `root`, links followed.

    Raises ValueError for URLs, NUL bytes and whatever lies outside the root (absolute, .., or through a
    link).
    """
    if "\0" in name:
        raise ValueError(f"{where}: the path holds a NUL byte")
    scheme = name.split(":", 1)[0] if ":" in name else ""
    if scheme.isalpha() and len(scheme) > 1:
        raise ValueError(f"{where}: {name!r} is not a file path (URLs and protocols are not read)")
    try:
        resolved = (root / name).resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        raise ValueError(f"{where}: {name!r} cannot be followed to a file") from None
    if not allow_outside_root and not resolved.is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {name!r} lies outside {root}; allow it with --allow_outside_root")
    return resolved


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: the header names a column twice: {', '.join(names)}")
        rows: list[dict[str, Any]] = []
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(f"{path} row {len(rows) + 1}: has not the {len(names)} fields of the header")
            rows.append(dict(record))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None
    return rows


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path}: must be a list of objects")
    return value


def _jsonl_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits at U+2028 inside a caption
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unrepeated)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number}: must be an object")
        rows.append(record)
    return rows


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields; JSON would let the last of two of a name win, in silence."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(name for name in names if names.count(name) > 1)!r} twice")
    return record


def _sidecars(folder: Path, allow_outside_root: bool) -> Manifest:
    clips = sorted(file for file in folder.rglob("*") if file.suffix.lower() in CLIP_SUFFIXES)
    if not clips:
        raise ValueError(
            f"{folder}: holds neither {', '.join(METADATA_NAMES)} nor clips"
            f" ({' '.join(CLIP_SUFFIXES)}) with .txt captions"
        )
    rows = []
    mistakes: dict[str, str] = {}
    for number, clip in enumerate(clips, 1):
        relative = str(clip.relative_to(folder))
        try:
            prompt = _caption_beside(clip)
            file = resolve_inside(folder.resolve(), relative, str(clip), allow_outside_root)
            rows.append(Row(file, prompt, number))
        except ValueError as error:
            mistakes[relative] = str(error)
    _raise_for(mistakes)
    return Manifest(
        folder.resolve(), tuple(rows), f"folder {folder.name}, {len(rows)} clips with .txt captions"
    )


def _caption_beside(clip: Path) -> str:
    caption = clip.with_suffix(".txt")
    if not caption.is_file():
        raise ValueError(f"{clip}: has no caption file {caption.name} beside it")
    try:
        return _text(caption.read_text(encoding="utf-8-sig"), "caption", str(clip))
    except UnicodeDecodeError:
        raise ValueError(f"{caption}: is not UTF-8 text") from None


def _raise_for(mistakes: dict[str, str]) -> None:
    """Raise ValueError with the first mistake and the places of the others, so that all are mended."""
    if not mistakes:
        return
    _, *others = mistakes
    text = next(iter(mistakes.values()))
    if others:
        named = ", ".join(others[:PLACES_NAMED]) + (", ..." if len(others) > PLACES_NAMED else "")
        text += f" (and {len(others)} more mistakes: {named})"
    raise ValueError(text)


def _columns(path: Path, record: dict[str, Any]) -> tuple[str, str]:
    found = []
    for kind, legal in (("file", FILE_COLUMNS), ("caption", PROMPT_COLUMNS)):
        name = next((name for name in legal if name in record), None)
        if name is None:
            raise ValueError(
                f"{path}: no {kind} column; legal: {', '.join(legal)}; found: {', '.join(map(str, record))}"
            )
        found.append(name)
    return found[0], found[1]


def _field(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise ValueError(f"{where}: has no {name!r}")
    return _text(record[name], name, where)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r}, not text")
    if not value.strip():
        raise ValueError(f"{where}: {name} is blank")
    if len(value) > LONGEST_FIELD:
        raise ValueError(
            f"{where}: {name} has {len(value):,} characters; at most {LONGEST_FIELD:,} are legal"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name} holds half a character (a lone surrogate)") from None
    return value
