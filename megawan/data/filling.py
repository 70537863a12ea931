"""A latent store that is read while it is being filled.

    STORE                       as tools/encode_dataset.py makes it, byte for byte
    STORE.filling/plan.json     every sample that there will be, written before the first is encoded
                  samples/      samples that no shard holds yet, one file each
                  status.json   what the filling process does, rewritten every half second while it lives
                  files.jsonl   what each file of the source gave (megawan/data/survey.py)
                  settings.json, empty.safetensors, worker.log

One process fills, any number read. Samples are encoded in the order in which the training will first ask for
them, and go into shards in the manifest's order, as soon as a shard's samples are all there.
"""

import json
import multiprocessing
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megawan.data.batch import Sample
from megawan.data.cutting import ClipSize, cut
from megawan.data.encoding import (
    REJECTED,
    Codec,
    Conditions,
    Features,
    Report,
    Text,
    describe_sample,
    visual_tensors,
    write_rejected,
)
from megawan.data.latents import FORMAT, SHARD_BYTES, LatentStore, StoredSamples, StoreWriter
from megawan.data.sampler import GlobalOrder
from megawan.data.survey import Memory, PlannedClip, Survey, refused
from megawan.data.video import BadClip, source_digest
from megawan.files import write_json, write_tensors

ALL = sys.maxsize  # steps: every one that there may be
BEAT_S = 0.5  # between two signs of life
SILENCE_S = 60.0  # without one the process counts as dead; a shared folder may show files late
START_S = 300.0  # for the first sign of life
POLLS_S = (0.02, 0.5)  # a reader looks again after the first, then ever later up to the second
SAY_S = 10.0


class FillingError(RuntimeError):
    """The store cannot be filled any further; the message is one line for a person. No ValueError: that is
    what a bad sample raises, which is replaced."""


@dataclass(frozen=True)
class Folder:
    """The paths beside a store that is being filled."""

    store: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.store.with_name(self.store.name + ".filling")

    @property
    def plan(self) -> Path:
        """Every sample that there will be."""
        return self.path / "plan.json"

    @property
    def samples(self) -> Path:
        """Samples that no shard holds yet."""
        return self.path / "samples"

    @property
    def status(self) -> Path:
        """What the filling process does."""
        return self.path / "status.json"

    @property
    def files(self) -> Path:
        """What each source file gave."""
        return self.path / "files.jsonl"

    @property
    def settings(self) -> Path:
        """The settings of the samples."""
        return self.path / "settings.json"

    @property
    def empty(self) -> Path:
        """Features of the empty prompt."""
        return self.path / "empty.safetensors"

    @property
    def log(self) -> Path:
        """All that the filling process prints."""
        return self.path / "worker.log"


@dataclass
class Status:
    """What the filling process does."""

    token: str
    """Another one for every process."""
    process: str = ""
    """Its number and machine."""
    beat: int = 0
    state: str = "opening the encoders"
    note: str = ""
    """Which file or sample it is at."""
    planned: bool = False
    complete: bool = False
    """The store was whole before: nothing is filled."""
    done: int = 0
    """Files looked at, then samples that are there."""
    ready: int = 0
    """All samples that the steps below this one ask for are there."""
    held: bool = False
    """It waits for the training."""
    ended: bool = False
    error: str | None = None

    def write(self, file: Path) -> None:
        """Show it to the readers; not synced to the disk, since only living readers need it."""
        aside = file.with_name(file.name + ".tmp")
        aside.write_text(json.dumps(asdict(self)), "utf-8")
        aside.replace(file)

    @staticmethod
    def read(file: Path) -> "Status | None":
        """Return what the file says, None where there is none."""
        try:
            return Status(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):  # also a shared folder's stale handle
            return None


class Watch:
    """A reader's view of the filling process: what it says, whether it lives, and waiting for it.

    A status that does not change is that of a dead process, maybe of an earlier run: without its `token` it
    is believed once it moves.
    """

    def __init__(
        self,
        folder: Folder,
        timeout_s: float,
        token: str | None = None,
        died: Callable[[], str | None] = lambda: None,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`died` tells at once why the process ended, where this one can know."""
        self.token = token
        self._folder = folder
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._died = died
        self._seen: tuple[str, int] | None = None
        self._moved = time.monotonic()
        self._heard = False
        self._ended = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave what only this process can know behind."""
        return {**self.__dict__, "_died": _unknown}

    def look(self) -> Status | None:
        """Return what the process says now, None before it is believed.

        Raises FillingError when it failed, ended early or was not heard for too long.
        """
        why = self._died()  # asked first: what it last said is then all that it will say
        status = Status.read(self._folder.status)
        now = time.monotonic()
        if status is not None and (status.token, status.beat) != self._seen:
            if self._seen is not None and self.token is None:
                self.token = status.token
            self._heard = self._heard or status.token == self.token
            self._seen, self._moved = (status.token, status.beat), now
        believed = status if status is not None and status.token == self.token else None
        if believed is not None and believed.error is not None:
            raise FillingError(believed.error)
        if believed is not None and believed.ended:
            self._ended = True
        if self._ended:
            return believed
        if why is not None:
            raise FillingError(
                f"the encoding worker {why}; its log: {self._folder.log}; the same command goes on from what"
                " is encoded"
            )
        limit = self._silence_s if self._heard else START_S
        if now - self._moved > limit:
            who = f" ({status.process})" if status is not None else ""
            raise FillingError(
                f"the encoding worker{who} was not heard for {limit:g} s; its log: {self._folder.log} (all"
                " ranks must see this folder)"
            )
        return believed

    def wait(
        self,
        ready: Callable[[Status | None], bool],
        what: Callable[[Status | None], str],
        say: Callable[[str], None],
    ) -> None:
        """Return when `ready` says so; every 10 s `say` what is waited for.

        Raises FillingError like `look`, and when the process makes no progress for the time-out while it does
        not itself wait for the training.
        """
        begun = last = time.monotonic()
        said, pause = begun, POLLS_S[0]
        progress: tuple[Any, ...] | None = None
        while True:
            status = self.look()
            if ready(status):
                return
            now = time.monotonic()
            reached = None if status is None else (status.state, status.done)
            if reached != progress or (status is not None and status.held):
                progress, last = reached, now
            if now - last > self._timeout_s:
                doing = "" if status is None else f" ({status.state} {status.note})".replace(" )", ")")
                raise FillingError(
                    f"{what(status)}: no progress for {self._timeout_s:g} s{doing}; the limit is"
                    f" --data.wait_timeout; the worker's log: {self._folder.log}"
                )
            if now - said >= SAY_S:
                said = now
                say(f"{what(status)}, {now - begun:.0f} s")
            parent = multiprocessing.parent_process()
            if parent is not None and not parent.is_alive():
                raise FillingError("the training that reads here has ended")
            time.sleep(pause)
            pause = min(1.5 * pause, POLLS_S[1])


def _unknown() -> None:
    return None


class Trainer(Protocol):
    """What the filling process wants to know of the training, told where it was started."""

    def begin(self, seed: int, global_batch: int, group: int, start_step: int) -> None:
        """Tell the order of the samples; encoding begins."""
        ...

    def reach(self, step: int) -> None:
        """Tell which step the training is at."""
        ...


class FillingStore(StoredSamples):
    """A store that is being filled: reads like a finished one, and waits for samples that are not there."""

    being_filled = True

    def __init__(self, folder: Folder, watch: Watch) -> None:
        """Raises FillingError when the plan cannot be read."""
        try:
            plan = json.loads(folder.plan.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FillingError(f"{folder.plan}: cannot be read ({error})") from None
        super().__init__(folder.store, plan["settings"], plan["samples"])
        self.folder = folder
        self.watch = watch
        self.trainer: Trainer | None = None  # in the process that started the filling one
        self._numbers = {row["key"]: number for number, row in enumerate(self._rows)}
        self._known: set[str] = set()
        self._ready = 0  # steps below it were all there when this was last asked

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process."""
        return {**super().__getstate__(), "trainer": None}

    @property
    def empty_text(self) -> Tensor:
        """Return the features of the empty prompt, float32 [S, text_dim]."""
        return _read_tensors(self.folder.empty)[0]["text"]

    def describe(self) -> str:
        """Return what the store will hold, for the start-up lines."""
        return f"{super().describe()}, being filled by {self.folder.path}"

    def reach(self, step: int, say: Callable[[str], None]) -> None:
        """Tell the filling process that the training is at `step`, and return when all its samples are there.

        Raises FillingError when that cannot be.
        """
        if self.trainer is not None:
            self.trainer.reach(step)
        if self._ready > step:
            if self._ready < ALL:
                self.watch.look()  # a process that died is noticed at the next step
            return

        def ready(status: Status | None) -> bool:
            self._ready = 0 if status is None else status.ready
            return self._ready > step

        def what(status: Status | None) -> str:
            note = f" {status.note}" if status is not None and status.note else " the first sample"
            return f"step {step + 1} is waiting for{note} to be encoded"

        self.watch.wait(ready, what, say)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` as soon as it is encoded. Raises FillingError when that cannot be."""
        found: list[Sample] = []

        def ready(_: Status | None) -> bool:
            sample = self._find(index)
            found.extend([sample] if sample is not None else [])
            return sample is not None

        if not ready(None):
            row = self._rows[index]
            waited = f"waiting for sample {index} ({row['source']}) to be encoded"
            self.watch.wait(ready, lambda _: waited, lambda _: None)
        return found[0]

    def _find(self, index: int) -> Sample | None:
        row = self._rows[index]
        if "shard" not in row:
            # The file of one sample is removed after its shard has appeared, so it is looked for first.
            try:
                tensors, _ = _read_tensors(self.folder.samples / f"{row['key']}.safetensors")
            except (SafetensorError, OSError):
                self._look_for_shards()
            else:
                return Sample(
                    tensors["latents"],
                    tensors["text"],
                    row["prompt"],
                    tensors.get("clip"),
                    tensors.get("condition"),
                )
        return super().__getitem__(index) if "shard" in row else None

    def _look_for_shards(self) -> None:
        for file in sorted(self.path.glob("shard_*.safetensors")):
            if file.name not in self._known:
                self._known.add(file.name)
                with safe_open(file, framework="pt") as opened:
                    rows = json.loads(opened.metadata()[FORMAT])["rows"]
                for row in rows:
                    if row["key"] in self._numbers:
                        self._rows[self._numbers[row["key"]]] = {**row, "shard": file.name}


@dataclass(frozen=True)
class Encoding:
    """What makes samples: the encoders, handed in, and the size that clips are cut to."""

    codec: Codec
    codec_name: str
    text: Text
    text_len: int
    size: ClipSize
    device: torch.device
    conditions: Conditions | None = None


def planned_rows(found: Survey, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the plan says of every sample, in the order of the store that it will be."""
    rows = []
    t, h, w = settings["stride"]
    for clip in found.clips:
        latent = ((clip.bucket.frames - 1) // t + 1, clip.bucket.height // h, clip.bucket.width // w)
        for key, start in zip(clip.keys, clip.starts, strict=True):
            row: dict[str, Any] = {
                "key": key,
                "shape": [settings["latent_channels"], *latent],
                "prompt": clip.row.prompt,
                "source": clip.row.path.name,
                "source_sha256": clip.sha256,
            }
            rows.append({**row, "start": start} if "windows" in settings else row)
    return rows


def is_complete(store: Path, keys: Sequence[str]) -> bool:
    """Return whether a store is finished and holds exactly these samples."""
    try:
        return LatentStore(store).keys == list(keys)
    except FileNotFoundError:
        return False


class Filling:
    """The filling process's work on one store: opens it, and fills it in the order of a training.

    `show` is called with the status at every change.
    """

    def __init__(
        self,
        folder: Folder,
        settings: Mapping[str, Any],
        status: Status,
        show: Callable[[], None],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Raises ValueError with the difference when store or samples are of other settings."""
        self._folder = folder
        self._status = status
        self._show = show
        self._writer = StoreWriter(folder.store, settings, shard_bytes)
        folder.samples.mkdir(parents=True, exist_ok=True)
        if folder.settings.exists():
            # Samples wait under the settings that they were made with; a writer of shards compares them.
            begun = json.loads(folder.settings.read_text("utf-8"))
            names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
            if names and any(folder.samples.iterdir()):
                said = ", ".join(
                    f"{name}: there {begun.get(name)!r}, asked {settings.get(name)!r}" for name in names
                )
                raise ValueError(
                    f"{folder.path}: was begun with other settings ({said}); give a new --data.path, or"
                    " remove that folder"
                )
        write_json(folder.settings, dict(settings))
        for file in folder.samples.glob("*.tmp"):
            file.unlink()
        self._stored = self._writer.finished
        self._next = 0  # of the samples in the manifest's order: those before it are given to the writer
        self._given: list[Path] = []  # files of samples in the shard that is being put together

    def fill(
        self,
        found: Survey,
        encoding: Encoding,
        memory: Memory,
        order: GlobalOrder,
        start_step: int,
        position: Callable[[], int],
        *,
        ahead: int,
        min_free_bytes: int = 0,
        pause: Callable[[], None] = lambda: time.sleep(0.05),
    ) -> LatentStore:
        """Encode what is missing, write shards and index, and return the finished store.

        Samples come in the order of their first use from `start_step` on. No more than `ahead` that this call
        made are first used after step `position()`; all windows of a clip are made together, so it may be
        exceeded by those of one clip. What the step at `position()` itself uses is never held back.

        Raises FillingError naming row and file when a clip is not what the survey found; it is then left out
        of the next survey.
        """
        status = self._status
        places = [(clip, number) for clip in found.clips for number in range(len(clip.starts))]
        keys = [key for clip in found.clips for key in clip.keys]
        there = self._stored | {file.stem for file in self._folder.samples.glob("*.safetensors")}
        status.done = sum(key in there for key in keys)
        status.state = "encoding"
        self._merge(keys, there)
        uses = first_uses(order, len(keys), start_step)
        step_of = {keys[sample]: step for step, sample in uses}
        features = Features(encoding.text, encoding.text_len)
        made: deque[int] = deque()  # first uses of the samples made here that the training has not reached
        for step, sample in uses:
            if keys[sample] in there:
                continue
            clip = places[sample][0]
            status.ready = step
            status.note = f"sample {sample} (row {clip.row.number}, {clip.row.path.name})"
            self._show()
            while True:
                made = deque(use for use in made if use > position())
                short = shutil.disk_usage(self._folder.path).free < min_free_bytes
                status.held = not short and step > position() and len(made) >= ahead
                if not short and not status.held:
                    break
                status.state = "disk is short" if short else "far enough ahead"
                pause()
            status.state = "encoding"
            for key in self._encode(clip, encoding, features, memory, there):
                there.add(key)
                made.append(step_of[key])
                status.done += 1
            self._merge(keys, there)
        status.ready, status.note, status.state = ALL, "", "finishing the store"
        self._show()
        return self._finish(found, keys, features)

    def _encode(
        self, clip: PlannedClip, encoding: Encoding, features: Features, memory: Memory, there: set[str]
    ) -> Iterator[str]:
        """Make the samples of a clip that are not there; yield the name of each."""
        row = clip.row
        keys = clip.keys
        try:
            if source_digest(row.path) != clip.sha256:
                raise BadClip(row.path, "has changed since the run was planned")
            given = 0
            for window in cut(row.path, encoding.size):
                planned = clip.starts[window.number] if window.number < len(keys) else None
                if (window.start, window.frames.shape[0]) != (planned, clip.bucket.frames):
                    raise BadClip(row.path, "gives other windows than it did")
                given += 1
                key = keys[window.number]
                if key in there:
                    continue
                tensors = {
                    **visual_tensors(window.frames, encoding.codec, encoding.device, encoding.conditions),
                    "text": features[row.prompt],
                }
                described = describe_sample(row, clip.sha256, window, encoding.size)
                _write_sample(self._folder.samples / f"{key}.safetensors", tensors, described)
                yield key
            if given != len(keys):
                raise BadClip(row.path, f"gives {given} windows, not {len(keys)}")
        except BadClip as error:
            memory.keep(row.path, refused(clip.sha256, error))
            raise FillingError(
                f"row {row.number}, {error}: it was usable when the run was planned and cannot be encoded"
                " now; run the same command again: it looks anew at a clip that has changed, and leaves out"
                " one that has not; the order of the samples is then another"
            ) from None

    def _merge(self, keys: Sequence[str], there: set[str]) -> None:
        """Give the store's writer what follows without a gap; drop the files of what a shard now holds."""
        stored = self._stored
        while self._next < len(keys) and keys[self._next] in there:
            key = keys[self._next]
            self._next += 1
            if key in stored:
                continue
            file = self._folder.samples / f"{key}.safetensors"
            tensors, row = _read_tensors(file)
            shards = self._writer.shards
            self._given.append(file)
            self._writer.add(key, tensors, row)
            if self._writer.shards > shards:
                self._drop()

    def _drop(self) -> None:
        for file in self._given:
            file.unlink(missing_ok=True)
        self._given = []

    def _finish(self, found: Survey, keys: list[str], features: Features) -> LatentStore:
        self._writer.flush()
        self._drop()
        rows = self._writer.rows
        report = Report(rejected=found.rejected)
        for clip in found.clips:
            why = rows[clip.keys[-1]].get("cut_short")
            if why:
                report.cut_short.append((clip.row, why, len(clip.keys)))
        write_rejected(self._folder.store / REJECTED, report)
        store = self._writer.finish(keys, features[""])
        shutil.rmtree(self._folder.samples)
        return store


def first_uses(order: GlobalOrder, samples: int, start_step: int) -> list[tuple[int, int]]:
    """Return (step, sample id) of the first use of every sample from `start_step` on, in their order."""
    uses: list[tuple[int, int]] = []
    seen: set[int] = set()
    step = start_step
    while len(seen) < samples:
        for place in order.step(step):
            if place.sample_id not in seen:
                seen.add(place.sample_id)
                uses.append((step, place.sample_id))
        step += 1
    return uses


def _write_sample(file: Path, tensors: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
    stored = {
        name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, value in tensors.items()
    }
    # The order of the names is part of what the index will say.
    write_tensors(file, stored, {FORMAT: json.dumps({"names": list(tensors), "row": row})})


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a sample's tensors in their order, and what the index will say of it. Raises FileNotFoundError
    also where the file goes meanwhile."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(FORMAT, "{}"))
            names = header.get("names") or opened.keys()
            return {name: opened.get_tensor(name).clone() for name in names}, header.get("row", {})
    except RuntimeError as error:  # torch opens the file a second time, and says so where it has gone
        if file.exists():
            raise
        raise FileNotFoundError(str(error)) from None


def other_filler(folder: Folder, beats: int = 4) -> str | None:
    """Return which living process fills this store, None when there is none: its status moves."""
    before = Status.read(folder.status)
    if before is None or before.ended or before.error is not None:
        return None
    time.sleep(beats * BEAT_S)
    after = Status.read(folder.status)
    if after is None or (after.token, after.beat) == (before.token, before.beat):
        return None
    return after.process
