"""The latent store: safetensors shards that describe themselves, and an index that is written last.

    STORE/shard_00000.safetensors    "<number>.latents", "<number>.text" (+ .clip, .condition); rows and
    settings in the header STORE/index.json                 settings, every sample's row, every shard's size
    and sha256, the empty prompt

A shard appears under its name only when it is whole, so an interrupted encode keeps what it finished.
Settings (codec, encoders, sizes) are fixed for a store: another encode into the same folder is refused with
the difference.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megawan.data.batch import Sample
from megawan.data.streams import Stream, by_shape
from megawan.files import sha256, write_json, write_tensors

FORMAT = "megawan-latents"
VERSION = 1
INDEX = "index.json"
EMPTY = "empty.safetensors"
RANKS = "ranks"  # how the ranks of one encode find each other: megawan/data/ranks.py
SHARD_BYTES = 1 << 30
REQUIRED = ("format", "version", "settings", "samples", "shards")


class StoredSamples:
    """Samples in the shards of a store, read lazily: their tensors are mapped when they are asked for."""

    being_filled = False
    """Whether samples may not be there yet."""

    def __init__(self, path: Path, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.settings = dict(settings)
        self._rows = rows
        self.shapes: list[tuple[int, int, int, int]] = [tuple(row["shape"]) for row in rows]
        self.latent_channels = int(self.settings["latent_channels"])
        self.text_dim = int(self.settings["text_dim"])
        self.condition: str = self.settings.get("condition", "none")
        self.clip_tokens = int(self.settings.get("clip_tokens", 0))
        self._handles: dict[str, Any] = {}

    @property
    def fingerprint(self) -> str:
        """Return a digest of settings and all samples: equal stores train equal runs."""
        rows = [
            [row["source_sha256"], row["prompt"], row["shape"], *([row["start"]] if "start" in row else [])]
            for row in self._rows
        ]
        return _digest({"settings": self.settings, "rows": rows})[:16]

    @property
    def empty_text(self) -> Tensor:
        """Return the features of the empty prompt, float32 [S, text_dim]."""
        return self._tensor(EMPTY, "text")

    @property
    def streams(self) -> list[Stream]:
        """Return the samples by latent shape, as the order takes them."""
        return by_shape(self.shapes)

    @property
    def extras(self) -> set[str]:
        """Return which of "clip" and "condition" every sample has."""
        return {name for name in ("clip", "condition") if all(row.get(name) for row in self._rows)}

    def where(self, sample_id: int) -> str:
        """Return the file that holds a sample, and what it was made of."""
        row = self._rows[sample_id]
        return f"{self.path / row.get('shard', '')}, made of {row.get('source', row['key'])}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`. Raises ValueError naming the shard when its bytes cannot be read."""
        row = self._rows[index]
        shard, key = row["shard"], row["key"]
        extras = {
            name: self._tensor(shard, f"{key}.{name}") for name in ("clip", "condition") if row.get(name)
        }
        return Sample(
            self._tensor(shard, f"{key}.latents"),
            self._tensor(shard, f"{key}.text"),
            row["prompt"],
            extras.get("clip"),
            extras.get("condition"),
        )

    def describe(self) -> str:
        """Return what the store holds, for the start-up lines."""
        shapes = sorted(set(self.shapes))
        shown = str(list(shapes[0]))
        if len(shapes) > 1:
            shown = f"of {len(shapes)} shapes from {shown} to {list(shapes[-1])}"
        codec = self.settings["codec"]
        text = f"{self.path}: {len(self)} samples, latents {shown} by {codec}, text {self.text_dim}"
        if self.condition != "none":
            text += f", {self.condition} condition" + (
                f", clip {self.clip_tokens}" if self.clip_tokens else ""
            )
        return text

    def _tensor(self, shard: str, key: str) -> Tensor:
        try:
            if shard not in self._handles:
                self._handles[shard] = safe_open(_inside(self.path, shard), framework="pt").__enter__()
            return self._handles[shard].get_tensor(key).float()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / shard}: cannot read {key} ({error}); encode it again") from None

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind: each reading process opens its own."""
        return {**self.__dict__, "_handles": {}}


class LatentStore(StoredSamples):
    """A finished store."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError or ValueError naming the file that is missing, foreign or of another
        size."""
        index = _read_index(path)
        super().__init__(path, index["settings"], index["samples"])
        self._shards: dict[str, Any] = index["shards"]
        for name, entry in self._shards.items():
            file = _inside(path, name)
            if not file.is_file():
                raise FileNotFoundError(f"{file}: the store's index lists this shard, but it is missing")
            if file.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{file}: has {file.stat().st_size} bytes, the index says {entry['bytes']};"
                    " encode it again"
                )

    @property
    def keys(self) -> list[str]:
        """Return the samples' names, by id."""
        return [row["key"] for row in self._rows]

    def verify(self) -> None:
        """Read every shard and raise ValueError naming the first whose sha256 is not the index's."""
        for name, entry in self._shards.items():
            if sha256(_inside(self.path, name)) != entry["sha256"]:
                raise ValueError(
                    f"{self.path / name}: does not have the sha256 of the index; encode it again"
                )


class StoreWriter:
    """Writes a store sample by sample; as a context manager it flushes what is whole when the block ends
    well."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], shard_bytes: int = SHARD_BYTES, part: str = ""
    ) -> None:
        """Open a new or unfinished store. Raises ValueError when the folder holds one of other settings, or
        other files."""
        self.path = path
        self.settings = dict(settings)
        self._shard_bytes = shard_bytes
        # Several writers of one store: each names its shards itself and leaves the others' files alone.
        self._prefix = f"shard_{part}_" if part else "shard_"
        self._rows: list[dict[str, Any]] = []
        self._shards: list[str] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_rows: list[dict[str, Any]] = []
        check_folder(path)
        for file in sorted(path.glob("*")) if path.is_dir() else []:
            if file.name.endswith(".tmp"):
                if file.name.startswith(self._prefix) or not part:
                    file.unlink()
            elif file.name.startswith("shard_") and file.suffix == ".safetensors":
                self._take_over(file)
            elif file.name == RANKS and not part:  # what ranks that were killed left behind
                shutil.rmtree(file)

    def _take_over(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {}).get(FORMAT, "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file}: not a shard of a latent store ({error}); remove it to encode it again"
            ) from None
        if header is None:
            raise ValueError(f"{file}: not a shard of a latent store; give a new folder")
        fields = header if isinstance(header, dict) else {}
        if not isinstance(fields.get("settings"), dict) or not _are_rows(fields.get("rows")):
            raise ValueError(f"{file}: its header is not a latent store's; remove it to encode it again")
        difference = _difference(header["settings"], self.settings)
        if difference:
            raise ValueError(
                f"{self.path}: was encoded with other settings ({difference}); give a new folder"
            )
        self._shards.append(file.name)
        self._rows += [{**row, "shard": file.name} for row in header["rows"]]

    @property
    def finished(self) -> set[str]:
        """Return the keys of the samples that are safely in a shard."""
        return set(self.rows)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Return what the index will say of the samples that are safely in a shard, by key."""
        return {row["key"]: row for row in self._rows}

    @property
    def shards(self) -> int:
        """Return how many shards there are."""
        return len(self._shards)

    def add(
        self, key: str, tensors: Mapping[str, Tensor], row: Mapping[str, Any], *, more: bool = False
    ) -> None:
        """Add one sample: tensors "latents", "text" (+ "clip", "condition") and what the index says of it.

        With `more` the next sample goes into the same shard: they were encoded together.
        """
        # Copies: captions that several clips share are one tensor, and safetensors saves none twice.
        stored = {
            f"{key}.{name}": value.detach().to("cpu", torch.float32, copy=True)
            for name, value in tensors.items()
        }
        stored = {name: value.contiguous() for name, value in stored.items()}
        extras = {name: True for name in tensors if name not in ("latents", "text")}
        self._pending.update(stored)
        self._pending_rows.append({"key": key, "shape": list(tensors["latents"].shape), **row, **extras})
        if not more and sum(value.nbytes for value in self._pending.values()) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the samples added since the last shard as one shard."""
        if not self._pending:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # The first free name, not one by their number: a damaged shard may have been taken out.
        names = (f"{self._prefix}{number:05d}.safetensors" for number in itertools.count())
        name = next(name for name in names if name not in self._shards)
        header = {"settings": self.settings, "rows": self._pending_rows}
        write_tensors(self.path / name, self._pending, {FORMAT: json.dumps(header)})
        self._shards.append(name)
        self._rows += [{**row, "shard": name} for row in self._pending_rows]
        self._pending, self._pending_rows = {}, []

    def finish(self, order: list[str], empty_text: Tensor) -> LatentStore:
        """Write the empty prompt and the index, samples in the `order` of their keys, and return the finished
        store. Raises ValueError naming a shard that is not what an earlier index says of it."""
        self.flush()
        self.path.mkdir(parents=True, exist_ok=True)
        write_tensors(
            self.path / EMPTY, {"text": empty_text.detach().to("cpu", torch.float32).contiguous()}, {}
        )
        by_key = {row["key"]: row for row in self._rows}
        shards = {
            name: {"bytes": (self.path / name).stat().st_size, "sha256": sha256(self.path / name)}
            for name in [*sorted(self._shards), EMPTY]
        }
        self._check_against_index(shards)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "shards": shards,
            "samples": [by_key[key] for key in order if key in by_key],
        }
        write_json(self.path / INDEX, index)
        return LatentStore(self.path)

    def _check_against_index(self, shards: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ValueError where a shard decayed since an earlier call: a new index would vouch for it."""
        try:
            listed = _read_index(self.path)["shards"]
            written = (self.path / INDEX).stat().st_mtime_ns
        except (ValueError, OSError):  # none, or none that says anything
            return
        for name, entry in shards.items():
            # One that is younger was taken out and encoded again.
            old = name != EMPTY and (self.path / name).stat().st_mtime_ns <= written
            if old and name in listed and listed[name]["sha256"] != entry["sha256"]:
                raise ValueError(
                    f"{self.path / name}: does not have the sha256 of the index; remove it to encode it again"
                )

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what is not in a whole shard: a shard's contents depend on the order alone, not on
        interruptions."""
        self._pending, self._pending_rows = {}, []


def check_folder(path: Path) -> None:
    """Raise ValueError when a folder holds what is not a latent store's, before anything in it is touched."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: exists and is not a folder")
    for file in sorted(path.glob("*")) if path.is_dir() else []:
        name = file.name.removesuffix(".tmp")
        shard = name.startswith("shard_") and name.endswith(".safetensors")
        if not shard and name not in (INDEX, EMPTY, "rejected.jsonl") and file.name != RANKS:
            raise ValueError(f"{path}: holds {file.name}, which is not a latent store's; give a new folder")


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: not a finished latent store (no {INDEX}); make one: tools/encode_dataset.py"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{file}: not the index of a latent store")
    if index.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {index.get('version')}, this program reads {VERSION}; encode again"
        )
    missing = [key for key in REQUIRED if key not in index]
    if missing or not index["samples"]:
        raise ValueError(f"{file}: has no {missing[0] if missing else 'samples'}")
    settings, shards = index["settings"], index["shards"]
    wrong = {
        "settings": not isinstance(settings, dict)
        or "codec" not in settings
        or not all(_is_count(settings.get(name)) for name in ("latent_channels", "text_dim")),
        "samples": not _are_rows(index["samples"])
        or not all(isinstance(row.get("shard"), str) for row in index["samples"]),
        "shards": not isinstance(shards, dict)
        or not all(
            isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in shards.values()
        ),
    }
    if any(wrong.values()):
        name = next(name for name, value in wrong.items() if value)
        raise ValueError(f"{file}: its {name} are not those of a latent store; encode it again")
    return index


def _are_rows(rows: Any) -> bool:
    """Return whether these are samples as an index or a shard describes them."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("key", "prompt", "source_sha256"))
        and isinstance(row.get("shape"), list)
        and len(row["shape"]) == 4
        and all(_is_count(side) for side in row["shape"])
        for row in rows
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _inside(root: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{root / INDEX}: shard name {name!r} leaves the store")
    return root / name


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key}: there {theirs.get(key)!r}, asked {ours.get(key)!r}" for key in keys)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
