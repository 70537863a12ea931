"""Saving while training goes on: states are copied to host memory, then written, hashed and committed aside.

A save commits like a database: every rank writes into step_N.tmp, all agree that all succeeded, rank 0 writes
the manifest with every file's size and digest, syncs, renames, and only then says `latest`. Whatever is
killed at whatever moment, a folder with the final name is whole.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megawan import dist
from megawan.checkpoint import (
    FORMAT,
    UNFINISHED,
    VERSION,
    CheckpointOptions,
    Fragment,
    rank_file,
    step_folders,
    step_of,
)
from megawan.files import sync, write_json, write_tensors, write_text


@dataclass(frozen=True)
class Saved:
    """One save that has ended, as this rank saw it."""

    step: int
    folder: Path
    problem: str
    """Why nothing was saved; empty when the step folder is committed."""
    size: int
    """Bytes of this rank's states."""
    copy_seconds: float
    """How long training waited."""
    write_seconds: float
    """How long writing, hashing and committing took, beside training."""

    def describe(self) -> str:
        """Return the save in one line."""
        if self.problem:
            return f"NOT saved: {self.problem}"
        rate = self.size / max(self.write_seconds, 1e-9) / 1e9
        return (
            f"saved {self.folder} (waited {self.copy_seconds:.2f} s, written in {self.write_seconds:.2f} s,"
            f" {rate:.2f} GB/s a rank)"
        )


class Saver:
    """Saves a run's checkpoints, one at a time; every method but `ended` is collective.

    The commit talks over a process group of its own on the host, so that it never meets a collective of the
    training step.
    """

    def __init__(self, root: Path, options: CheckpointOptions, timeout_s: float) -> None:
        self._root = root
        self._options = options
        self._group = dist.host_group(timeout_s)
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: list[Saved] = []

    def start(self, step: int, pieces: Iterable[Fragment], state: Mapping[str, Any]) -> None:
        """Copy this step's states and begin to write them; waits first for a save that is still at work."""
        self.finish()
        began = time.perf_counter()
        copies = [replace(piece, values=self._copy(piece)) for piece in pieces]
        if any(copy.values.is_pinned() for copy in copies):
            torch.cuda.synchronize()
        waited = time.perf_counter() - began
        # A daemon: a run that ends with an error does not wait for a save that other ranks gave up.
        self._thread = threading.Thread(target=self._save, args=(step, copies, state, waited), daemon=True)
        self._thread.start()
        if not self._options.background:
            self.finish()

    def ended(self) -> list[Saved]:
        """Return the saves that have ended since the last call; waits for nothing."""
        # The thread only appends, so what is taken out by count has been there.
        taken = self._ended[: len(self._ended)]
        del self._ended[: len(taken)]
        return taken

    def finish(self) -> None:
        """Wait for the save that is at work, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, piece: Fragment) -> Tensor:
        """Return the values in host memory that is this saver's own and used again by the next save."""
        key, values = (piece.kind, piece.name), piece.values.detach()
        if key not in self._buffers:
            self._buffers[key] = torch.empty(values.numel(), pin_memory=values.is_cuda)
        return self._buffers[key].copy_(values.flatten(), non_blocking=True)

    def _save(self, step: int, copies: list[Fragment], state: Mapping[str, Any], waited: float) -> None:
        began, problem = time.perf_counter(), ""
        try:
            save(self._root, step, copies, state, self._options, self._group)
        except (OSError, RuntimeError) as error:  # RuntimeError: another rank is gone
            problem = f"{error}"
        size = sum(copy.values.nbytes for copy in copies)
        folder = self._root / f"step_{step:07d}"
        self._ended.append(Saved(step, folder, problem, size, waited, time.perf_counter() - began))


def save(
    root: Path,
    step: int,
    pieces: Iterable[Fragment],
    state: Mapping[str, Any],
    options: CheckpointOptions,
    group: torch_dist.ProcessGroup | None = None,
) -> Path:
    """Write `root`/step_N with all ranks together and return it; after an error nothing of it remains.

    `state` is JSON: what else a resume needs, and what a person wants to know. `group`: ranks of the whole
    world on the host (default: the default group). Raises OSError on every rank when any rank could not
    write. The order is: files, their digests, manifest, fsync, rename, `latest`.
    """
    final, aside = root / f"step_{step:07d}", root / f"step_{step:07d}.tmp"
    rank = torch_dist.get_rank()
    problem = ""
    if dist.is_main():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(root)
            aside.mkdir()
        except OSError as error:
            problem = str(error)
    torch_dist.barrier(group)
    digest, size = "0" * 64, 0
    if not problem:
        try:
            dist.strike(step, "write", dist.faults())
            digest = _write_rank_file(aside / rank_file(rank), pieces)
            size = (aside / rank_file(rank)).stat().st_size
        except OSError as error:
            problem = str(error)
    written = dist.all_succeeded(not problem, group)
    entries = _share_entries(digest, size, group)
    if written and dist.is_main():
        try:
            dist.strike(step, "commit", dist.faults())
            _commit(aside, final, _manifest(step, entries, state))
        except OSError as error:
            problem = str(error)
    if not dist.all_succeeded(written and not problem, group):
        if dist.is_main():
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"checkpoint of step {step} was not saved: {problem or 'another rank could not write its part'}"
        )
    if dist.is_main():
        for old in _expired(root, step, options):
            shutil.rmtree(old, ignore_errors=True)
    return final


def _expired(root: Path, step: int, options: CheckpointOptions) -> list[Path]:
    """Return the step folders that may go now that `step` is saved."""
    if not options.keep_last:
        return []
    # Later steps are there when this run was resumed from an older one: they are not this run's to delete,
    # and must not push out what it has just saved.
    passed = [folder for folder in step_folders(root) if step_of(folder) <= step]
    return [
        folder
        for folder in passed[options.keep_last :]
        if not options.keep_every or step_of(folder) % options.keep_every
    ]


def _write_rank_file(file: Path, pieces: Iterable[Fragment]) -> str:
    tensors: dict[str, Tensor] = {}
    table: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for piece in pieces:
        key = f"{piece.kind}/{piece.name}"
        tensors[key] = piece.values.detach().to("cpu", torch.float32).flatten()
        table[key] = (piece.start, piece.values.numel(), piece.shape)
    return write_tensors(file, tensors, {"fragments": json.dumps(table)})


def _share_entries(
    digest: str, size: int, group: torch_dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Return name → bytes and sha256 of every rank's file, on every rank (tensors only: nothing is
    pickled)."""
    device = torch.device("cpu") if group else dist.collective_device()
    mine = torch.tensor(
        list(bytes.fromhex(digest) + size.to_bytes(8, "little")), dtype=torch.uint8, device=device
    )
    every = [torch.empty_like(mine) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(every, mine, group=group)
    rows = [bytes(row.cpu().tolist()) for row in every]
    return {
        rank_file(rank): {"bytes": int.from_bytes(row[32:], "little"), "sha256": row[:32].hex()}
        for rank, row in enumerate(rows)
    }


def _manifest(step: int, files: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": torch_dist.get_world_size(),
        "files": dict(files),
        **state,
    }


def _commit(aside: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    write_json(aside / "manifest.json", manifest)
    sync(aside)
    replaced = final.with_name(final.name + ".replaced.tmp")
    if final.exists():
        # Resume skipped it as damaged, or this step is saved a second time; it stays until the new one has
        # its name.
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        aside.rename(final)
        sync(final.parent)
        write_text(final.parent / "latest", final.name + "\n")
    except OSError:
        if not aside.exists():
            final.rename(aside)
        if replaced.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_unfinished(root: Path) -> None:
    """Free the disk of what killed saves left, of whatever step."""
    for path in root.glob("step_*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
