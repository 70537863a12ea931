"""Encoding while training: the side process that fills the latent store, and the training's pace beside it.

Rank 0 starts one process (fresh, before any GPU or process group is touched); it opens the encoders, surveys
the clips, publishes the plan beside the store, and then encodes ahead of the training. All other ranks, and
reading processes, know of it through the store's folder alone.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megawan.cli import UserError
from megawan.data.batch import Batch
from megawan.data.cutting import CODEC_STRIDES
from megawan.data.encoding import REJECTED, Report, write_rejected
from megawan.data.filling import (
    BEAT_S,
    Encoding,
    Filling,
    FillingError,
    FillingStore,
    Folder,
    Status,
    Watch,
    is_complete,
    other_filler,
    planned_rows,
)
from megawan.data.latents import LatentStore, StoredSamples
from megawan.data.manifest import read_manifest
from megawan.data.sampler import GlobalOrder
from megawan.data.streams import by_shape
from megawan.data.survey import Memory, survey
from megawan.encode_options import EncodeOptions, checked_size, open_encoders
from megawan.files import write_json, write_tensors

NICE = 10
LINGER_S = 600.0  # that a process with nothing to fill, or with an error, can still be heard by late ranks
FINISH_S = 60.0  # that a finished training waits for the store's index
GIB = 2**30


@dataclass(frozen=True)
class FillOptions:
    """What the filling process is asked for."""

    source: Path
    store: Path
    variant: str
    encode: EncodeOptions
    ahead: int
    readers: int
    min_free_bytes: int


def open_filled(
    options: FillOptions, *, rank: int, wait_timeout: float, say: Callable[[str], None]
) -> FillingStore | LatentStore:
    """Return the store that `options` ask for: finished, or being filled from now on by a process that rank 0
    starts here.

    Every rank calls it; it returns when the shapes of all samples are known. Raises FillingError or another
    ValueError with the reason, the same on all ranks.
    """
    folder = Folder(options.store)
    worker = Worker(options, folder) if rank == 0 else None
    watch = (
        Watch(folder, wait_timeout)
        if worker is None
        else Watch(folder, wait_timeout, worker.token, worker.died)
    )
    try:
        watch.wait(
            lambda status: status is not None and status.planned,
            lambda status: f"preparing {folder.store}: {_doing(status)}",
            say,
        )
    except FillingError:
        if worker is not None:
            worker.stop()
            if not folder.files.exists() and _is_from(folder, worker.token):
                shutil.rmtree(folder.path)  # a mistake in the flags leaves nothing
        raise
    status = watch.look()
    if status is not None and status.complete:
        say(f"{folder.store} is complete: nothing of {options.source} is to be encoded")
        return LatentStore(folder.store)
    store = FillingStore(folder, watch)
    store.trainer = worker
    listed = folder.path / REJECTED
    if listed.exists():
        rejected = len(listed.read_text("utf-8").splitlines())
        say(f"{rejected} clips of {options.source} give no sample; which and why: {listed}")
    return store


def _is_from(folder: Folder, token: str) -> bool:
    status = Status.read(folder.status)
    return status is not None and status.token == token


def preview(
    options: FillOptions, latent_channels: int, text_dim: int, say: Callable[[str], None]
) -> StoredSamples:
    """Return what the store will hold, for a dry run: every clip is looked at, and nothing is written.

    Raises ValueError when no clip can be used.
    """
    size = checked_size(options.encode, options.variant)
    manifest = read_manifest(
        options.source, root=options.encode.root, allow_outside_root=options.encode.allow_outside_root
    )
    memory = Memory(Folder(options.store).files, size, writes=False)
    found = survey(manifest, size, memory, workers=options.readers)
    say(f"{len(found.rejected)} of {len(manifest.rows)} clips of {options.source} give no sample")
    settings = {
        "codec": options.encode.codec,
        "stride": list(CODEC_STRIDES[options.encode.codec]),
        "latent_channels": latent_channels,
        "text_dim": text_dim,
        **size.settings(),
    }
    return StoredSamples(options.store, settings, planned_rows(found, settings))


def _doing(status: Status | None) -> str:
    return "starting the encoding worker" if status is None else f"{status.state} {status.note}".strip()


def paced(
    batches: Iterator[list[Batch]],
    data: object,
    *,
    seed: int,
    global_batch: int,
    group: int,
    start: int,
    steps: int,
    say: Callable[[str], None],
) -> Iterator[list[Batch]]:
    """Return `batches`; where `data` is being filled, each step's after all its samples are there.

    So the ranks enter a step together, and none waits in a collective for another's sample. Raises UserError
    when the filling ends before its time.
    """
    if not isinstance(data, FillingStore):
        return batches
    return _paced(batches, data, seed, global_batch, group, start, steps, say)


def _paced(
    batches: Iterator[list[Batch]],
    data: FillingStore,
    seed: int,
    global_batch: int,
    group: int,
    start: int,
    steps: int,
    say: Callable[[str], None],
) -> Iterator[list[Batch]]:
    if data.trainer is not None:
        data.trainer.begin(seed, global_batch, group, start)
    step = start
    try:
        for step in itertools.count(start):
            data.reach(step, say)
            yield next(batches)
    except FillingError as error:
        # One from a reading process comes with that process's traceback in front of it.
        raise UserError(str(error).strip().rpartition("\n")[2].rpartition("FillingError: ")[2]) from None
    finally:
        if data.trainer is not None and step + 1 >= steps:
            _let_finish(data, say)


def _let_finish(data: FillingStore, say: Callable[[str], None]) -> None:
    """Wait a little for the index of a store that has all its samples; the next run or the tool would write
    it too."""
    end = time.monotonic() + FINISH_S
    try:
        while (status := data.watch.look()) is not None and time.monotonic() < end:
            if status.ended:
                say(f"{data.path} is complete: {len(data)} samples")
                return
            if status.done < len(data):
                break
            time.sleep(0.05)
        done = 0 if status is None else status.done
        say(f"{data.path} holds {done} of {len(data)} samples; the next run goes on from there")
    except FillingError as error:  # the training has had all that it needs
        say(f"{data.path} is not finished: {error}")


class Worker:
    """The filling process as rank 0 sees it."""

    def __init__(self, options: FillOptions, folder: Folder) -> None:
        self.token = uuid.uuid4().hex
        self._folder = folder
        # Started fresh: a forked copy of a process that holds threads or a GPU can hang.
        context = multiprocessing.get_context("spawn")
        # Without a lock, which a killed process would keep: one aligned integer is read whole.
        self._position = context.RawValue("q", -1)
        self._orders, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(options, folder, self.token, theirs, self._position), name="encoding worker"
        )
        self._process.start()
        theirs.close()
        atexit.register(self.stop)  # or the interpreter would wait for it at its end

    def died(self) -> str | None:
        """Return how the process ended, None while it runs."""
        with contextlib.suppress(EOFError, OSError):
            if self._orders.poll():
                return str(self._orders.recv())
        code = self._process.exitcode
        if code is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"(process {self._process.pid}) {how}"

    def begin(self, seed: int, global_batch: int, group: int, start_step: int) -> None:
        """Tell the order of the samples; encoding begins."""
        self._position.value = start_step
        with contextlib.suppress(OSError):  # a process that died is noticed by who waits for it
            self._orders.send((seed, global_batch, group, start_step))

    def reach(self, step: int) -> None:
        """Tell which step the training is at."""
        self._position.value = step

    def stop(self) -> None:
        """End the process now; what is encoded stays."""
        self._process.kill()
        self._process.join(10)


def _work(options: FillOptions, folder: Folder, token: str, orders: Connection, position: Any) -> None:
    """Fill one store, in a process of its own."""
    # Warnings and Ctrl-C are for the training; this process ends with it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = Status(token, f"process {os.getpid()} on {socket.gethostname()}")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICE)
    folder.path.mkdir(parents=True, exist_ok=True)
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    other = other_filler(folder)
    if other is not None:
        orders.send(f"did not start: {folder.store} is being filled by {other}")
        return
    signs = _Signs(folder, status, orders)
    try:
        _prepare_and_fill(options, folder, status, signs.show, orders, position)
    except (ValueError, OSError) as error:
        status.error = " ".join(str(error).split())
    except Exception as error:  # whatever an encoder raises: named here, whole in the log
        traceback.print_exc()
        status.error = (
            f"the encoding worker failed at {status.note or status.state}: {type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}; its log: {folder.log}"
        )
    signs.show()
    if status.error is not None:
        print(status.error, flush=True)
        time.sleep(LINGER_S)
    elif status.complete:
        time.sleep(LINGER_S)
    signs.stop()
    sys.exit(0 if status.error is None else 1)


def _prepare_and_fill(
    options: FillOptions,
    folder: Folder,
    status: Status,
    show: Callable[[], None],
    orders: Connection,
    position: Any,
) -> None:
    size = checked_size(options.encode, options.variant)
    manifest = read_manifest(
        options.source, root=options.encode.root, allow_outside_root=options.encode.allow_outside_root
    )
    print(f"found {manifest.found}", flush=True)
    encoders = open_encoders(options.encode, options.variant, "cpu")
    settings = encoders.settings(size)
    filling = Filling(folder, settings, status, show, options.encode.shard_mib << 20)
    memory = Memory(folder.files, size)

    def tick(done: int, total: int) -> None:
        status.state, status.note, status.done = "looking at clips:", f"{done} of {total}", done

    found = survey(manifest, size, memory, workers=options.readers, tick=tick)
    rows = planned_rows(found, settings)
    if is_complete(folder.store, [row["key"] for row in rows]):
        shutil.rmtree(folder.samples)
        status.complete = status.planned = status.ended = True
        status.state, status.note = "complete", ""
        return
    encoding = Encoding(
        encoders.codec,
        encoders.codec_name,
        encoders.text,
        encoders.text_len,
        size,
        encoders.device,
        encoders.conditions,
    )
    (empty,) = encoders.text.encode([""], encoders.text_len)
    write_tensors(folder.empty, {"text": empty.contiguous()}, {})
    write_rejected(folder.path / REJECTED, Report(rejected=found.rejected))
    write_json(folder.plan, {"settings": settings, "samples": rows})
    status.planned, status.state, status.note, status.done = True, "waiting for the first step", "", 0
    show()
    seed, global_batch, group, start_step = orders.recv()
    streams = by_shape([tuple(row["shape"]) for row in rows])
    order = GlobalOrder(streams, seed=seed, global_batch=global_batch, group=group)
    print(f"encoding {len(rows)} samples in the order of step {start_step + 1} on", flush=True)
    filling.fill(
        found,
        encoding,
        memory,
        order,
        start_step,
        lambda: int(position.value),
        ahead=options.ahead,
        min_free_bytes=options.min_free_bytes,
    )
    print(f"finished; {encoders.text.truncated} captions cut", flush=True)
    status.ended, status.state = True, "finished"


class _Signs:
    """Shows the status at every change and twice a second."""

    def __init__(self, folder: Folder, status: Status, orders: Connection) -> None:
        self._folder = folder
        self._status = status
        self._orders = orders
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.show()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Write the status now."""
        with self._lock:
            self._status.beat += 1
            self._status.write(self._folder.status)

    def stop(self) -> None:
        """Write it no more."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            shown = Status.read(self._folder.status)
            if shown is not None and shown.token != self._status.token:
                # Two runs began at the same moment: who wrote last goes on.
                self._orders.send(f"stopped: {self._folder.store} is being filled by {shown.process}")
                os._exit(1)
            self.show()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(0)
