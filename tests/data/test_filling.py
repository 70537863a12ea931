"""A store that training fills ends in the bytes that the tool makes, whatever order, kills and restarts it
saw; its readers get what they asked for, or one line."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from megawan.data.buckets import Budget
from megawan.data.cutting import ClipSize
from megawan.data.encoding import Conditions, encode, store_settings
from megawan.data.filling import (
    ALL,
    Encoding,
    Filling,
    FillingError,
    FillingStore,
    Folder,
    Status,
    Watch,
    first_uses,
    is_complete,
    other_filler,
    planned_rows,
)
from megawan.data.latents import LatentStore
from megawan.data.manifest import Manifest
from megawan.data.sampler import GlobalOrder
from megawan.data.streams import by_shape
from megawan.data.survey import Memory, survey
from megawan.encoders.dct import DctCodec
from megawan.files import write_json, write_tensors
from tests.data.encoding import Words, contents, listed, make_media, ramp, run, write

SIZE = ClipSize(13, 32, 32, 16, Budget((13, 9, 5), 48 * 64, None, 16, (4, 8, 8)), 3, 5)
SHARD = 40_000
GLOBAL_BATCH = 4


class Killed(Exception):
    """What ends a filling in the middle here."""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every length, shape and kind, and damaged ones."""
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def prepared(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/encode_dataset.py makes of them."""
    output = tmp_path_factory.mktemp("prepared") / "store"
    run(manifest_of(media), output, SIZE, shard_bytes=SHARD)
    assert len(list(output.glob("shard_*"))) >= 3 and (output / "rejected.jsonl").exists()
    return output


def manifest_of(media: Path) -> Manifest:
    return listed(media, *sorted(path.name for path in media.iterdir()), "long.mkv")


class Job:
    """One filling process's life, in this process."""

    def __init__(
        self, media: Path, output: Path, seed: int = 0, conditions: Conditions | None = None
    ) -> None:
        self.folder = Folder(output)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.encoding = Encoding(DctCodec("cpu"), "dct", Words(), 32, SIZE, torch.device("cpu"), conditions)
        settings = store_settings(self.encoding.codec, "dct", self.encoding.text, 32, SIZE, conditions)
        self.status = Status("token")
        self.shown: Callable[[], None] = lambda: None
        self.filling = Filling(self.folder, settings, self.status, self.show, SHARD)
        self.memory = Memory(self.folder.files, SIZE)
        self.found = survey(manifest_of(media), SIZE, self.memory)
        self.rows = planned_rows(self.found, settings)
        shapes = [tuple(row["shape"]) for row in self.rows]
        self.order = GlobalOrder(by_shape(shapes), seed=seed, global_batch=GLOBAL_BATCH)
        write_tensors(self.folder.empty, {"text": self.encoding.text.encode([""], 32)[0]}, {})
        write_json(self.folder.plan, {"settings": settings, "samples": self.rows})
        self.status.planned = True

    def show(self) -> None:
        self.status.beat += 1
        self.status.write(self.folder.status)
        self.shown()

    def fill(
        self, position: Callable[[], int] = lambda: ALL, *, ahead: int = 4, start_step: int = 0
    ) -> LatentStore:
        return self.filling.fill(
            *(self.found, self.encoding, self.memory, self.order, start_step, position),
            ahead=ahead,
            pause=lambda: time.sleep(0.002),
        )


def kill_when_none_is_left(clips: Iterator[int]) -> None:
    if next(clips, None) is None:
        raise Killed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_and_restarted_it_ends_in_the_bytes_of_the_tool(
    seed: int, media: Path, prepared: Path, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    for clips in (3, 1, 4):  # so many clips each time, and the order of another seed
        job = Job(media, output, seed)
        job.shown = partial(kill_when_none_is_left, iter(range(clips)))
        before = job.status.done
        with pytest.raises(Killed):
            job.fill(start_step=seed)
        assert job.status.done > before
        (job.folder.samples / "half.safetensors.tmp").write_bytes(b"half")
        expected = contents(prepared)
        assert (
            all(expected[name] == data for name, data in contents(output).items()) if output.exists() else 1
        )
    store = Job(media, output, seed + 1).fill()
    assert contents(output) == contents(prepared)
    assert not job.folder.samples.exists()
    assert is_complete(output, [row["key"] for row in job.rows]) and store.fingerprint
    store.verify()


def test_the_tool_goes_on_where_a_filling_stopped_and_the_other_way_round(
    media: Path, prepared: Path, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    job = Job(media, output)

    def stop() -> None:
        if list(output.glob("shard_*")):
            raise Killed

    job.shown = stop
    with pytest.raises(Killed):
        job.fill()
    report = run(manifest_of(media), output, SIZE, shard_bytes=SHARD)
    assert report.kept > 0 and contents(output) == contents(prepared)
    for file in ("index.json", "shard_00001.safetensors", "rejected.jsonl"):
        (output / file).unlink(missing_ok=True)
    for file in output.glob("shard_0000[2-9]*"):
        file.unlink()
    Job(media, output).fill()
    assert contents(output) == contents(prepared)


class Ends:
    """Image conditions of a few numbers, in the order of the real ones."""

    settings: ClassVar[dict[str, Any]] = {"condition": "i2v", "clip_tokens": 2}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"condition": pixels[:, :, 0], "clip": pixels[:, 0, 0, :2]}


def test_image_conditions_are_filled_too(media: Path, tmp_path: Path) -> None:
    manifest, ends = manifest_of(media), Ends()
    encode(
        *(manifest, tmp_path / "prepared", DctCodec("cpu"), "dct", Words(), SIZE, 32),
        device=torch.device("cpu"),
        conditions=ends,
        shard_bytes=SHARD,
    )
    job = Job(media, tmp_path / "store", conditions=ends)
    job.show()
    filled = FillingStore(job.folder, Watch(job.folder, 30, "token"))
    store = job.fill()
    assert contents(tmp_path / "store") == contents(tmp_path / "prepared")
    clip, condition = filled[1].clip, filled[1].condition
    assert clip is not None and condition is not None and store[1].clip is not None
    assert torch.equal(clip, store[1].clip) and (store.condition, store.clip_tokens) == ("i2v", 2)


def test_readers_get_the_samples_of_the_finished_store_while_it_fills(
    media: Path, prepared: Path, tmp_path: Path
) -> None:
    job = Job(media, tmp_path / "store")
    finished = LatentStore(prepared)
    job.show()
    filled = FillingStore(job.folder, Watch(job.folder, 30, "token"))
    assert (filled.fingerprint, filled.shapes) == (finished.fingerprint, finished.shapes)
    assert torch.equal(filled.empty_text, finished.empty_text)
    position = [-1]
    writer = threading.Thread(target=lambda: job.fill(lambda: position[0]), daemon=True)
    writer.start()
    lines: list[str] = []
    for step in range(2 * len(finished) // GLOBAL_BATCH):
        position[0] = step
        filled.reach(step, lines.append)
        for sample_id, *_ in job.order.step(step):
            sample, wanted = filled[sample_id], finished[sample_id]
            assert torch.equal(sample.latents, wanted.latents) and torch.equal(sample.text, wanted.text)
            assert sample.prompt == wanted.prompt
    writer.join(30)
    assert contents(tmp_path / "store") == contents(prepared)
    assert torch.equal(filled[0].latents, finished[0].latents)


def test_a_sample_whose_file_goes_while_it_is_opened_is_read_from_its_shard(
    media: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens a file, reads its header and lets torch open it again."""
    job = Job(media, tmp_path / "store")
    job.show()
    filled, finished = FillingStore(job.folder, Watch(job.folder, 30, "token")), LatentStore(prepared)
    job.fill()
    file = job.folder.samples / f"{job.rows[0]['key']}.safetensors"
    file.parent.mkdir()
    write_tensors(file, {"latents": torch.zeros(1), "text": torch.zeros(1)}, {})
    opened_again = torch.UntypedStorage.from_file

    def gone(*words: Any, **more: Any) -> Any:
        file.unlink(missing_ok=True)
        return opened_again(*words, **more)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", gone)
    assert torch.equal(filled[0].latents, finished[0].latents)
    assert not file.exists()


@pytest.mark.parametrize("ahead", [1, 5])
def test_no_more_than_asked_is_encoded_ahead_and_the_step_itself_never_waits(
    ahead: int, media: Path, tmp_path: Path
) -> None:
    job = Job(media, tmp_path / "store")
    uses = first_uses(job.order, len(job.rows), 0)
    assert sorted(sample for _, sample in uses) == list(range(len(job.rows)))
    position, most = [0], 0
    writer = threading.Thread(target=lambda: job.fill(lambda: position[0], ahead=ahead), daemon=True)
    writer.start()
    keys = [row["key"] for row in job.rows]
    windows = max(len(clip.keys) for clip in job.found.clips)
    for step in range(uses[-1][0] + 1):
        position[0] = step
        end = time.monotonic() + 30
        while writer.is_alive() and not job.status.held:
            assert time.monotonic() < end
            time.sleep(0.002)
        if not writer.is_alive():
            break
        there = {file.stem for file in job.folder.samples.glob("*.safetensors")}
        there |= {row["key"] for row in _stored(job)}
        assert all(keys[sample] in there for use, sample in uses if use <= step)
        over = sum(keys[sample] in there for use, sample in uses if use > step)
        most = max(most, over)
        assert over < ahead + windows
        position[0] = step + 1
        time.sleep(0.01)
    writer.join(30)
    assert not writer.is_alive() and most >= ahead


def _stored(job: Job) -> list[dict[str, str]]:
    return list(job.filling._writer.rows.values())


def test_a_clip_that_changes_after_the_survey_ends_the_run_and_the_next_one_leaves_it_out(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(4):
        write(folder / f"{number}.mkv", ramp(14 + number))
    job = Job(folder, tmp_path / "store")
    (folder / "2.mkv").write_bytes(b"something else")
    with pytest.raises(FillingError, match=r"row 3, .*2.mkv: has changed since the run was planned: it was"):
        job.fill()
    again = Job(folder, tmp_path / "store")
    assert [row.path.name for row, _ in again.found.rejected] == ["2.mkv", "long.mkv"]
    again.fill()
    # A clip that the encoder refuses as it is: the next survey believes the encoder.
    job = Job(folder, tmp_path / "other")
    clip = job.found.clips[0]
    job.found.clips[0] = type(clip)(clip.row, clip.sha256, clip.bucket, (*clip.starts[:-1], 99))
    with pytest.raises(FillingError, match=r"row 1, .*0.mkv: gives other windows than it did"):
        job.fill()
    assert Job(folder, tmp_path / "other").found.rejected[0][0].number == 1


def test_other_settings_are_refused_with_the_difference(media: Path, tmp_path: Path) -> None:
    job = Job(media, tmp_path / "store")
    (job.folder.samples / "x.safetensors").write_bytes(b"a sample")
    settings = {**store_settings(DctCodec("cpu"), "dct", Words(), 32, SIZE, None), "text_len": 16}
    with pytest.raises(ValueError, match=r"begun with other settings \(text_len: there 32, asked 16\)"):
        Filling(job.folder, settings, job.status, job.show)
    run(manifest_of(media), tmp_path / "whole", SIZE)
    with pytest.raises(ValueError, match=r"encoded with other settings \(text_len: there 32, asked 16\)"):
        Filling(Folder(tmp_path / "whole"), settings, job.status, job.show)


def test_it_waits_while_the_disk_is_short(media: Path, tmp_path: Path) -> None:
    job = Job(media, tmp_path / "store")

    def pause() -> None:
        raise Killed

    with pytest.raises(Killed):
        job.filling.fill(
            *(job.found, job.encoding, job.memory, job.order, 0, lambda: ALL),
            ahead=4,
            min_free_bytes=1 << 62,
            pause=pause,
        )
    assert (job.status.state, job.status.held, job.status.done) == ("disk is short", False, 0)


# Waiting.


def waited(watch: Watch, lines: list[str] | None = None) -> str:
    with pytest.raises(FillingError) as caught:
        watch.wait(lambda _: False, lambda _: "waiting", (lines or []).append)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wait_ends_in_one_line(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store")
    folder.path.mkdir()
    status = Status("mine", "process 7 on x", state="disk is short", note="sample 3")
    status.write(folder.status)
    said = waited(Watch(folder, 0.2, "mine"))
    assert "no progress for 0.2 s (disk is short sample 3)" in said and str(folder.log) in said
    assert "process 7 on x) was not heard for 0.1 s" in waited(Watch(folder, 30, "mine", silence_s=0.1))
    assert "worker was shot" in waited(Watch(folder, 30, "mine", lambda: "was shot"))
    Status("mine", error="all is lost").write(folder.status)
    assert waited(Watch(folder, 30, "mine")) == "all is lost"


def test_who_waits_for_the_training_is_not_late(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store")
    folder.path.mkdir()
    Status("mine", held=True).write(folder.status)
    begun = time.monotonic()
    said = waited(Watch(folder, 0.05, "mine", silence_s=0.4))
    assert "not heard" in said and time.monotonic() - begun > 0.4


def test_the_status_of_an_earlier_process_is_not_believed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store")
    folder.path.mkdir()
    Status("old", planned=True, error="long ago").write(folder.status)
    watch = Watch(folder, 30)
    assert watch.look() is None and watch.look() is None
    Status("new", planned=True).write(folder.status)
    status = watch.look()
    assert status is not None and status.token == "new"
    assert other_filler(folder, 0) is None
    moving = threading.Timer(0.05, Status("new", "process 7 on x", beat=1).write, (folder.status,))
    moving.start()
    assert other_filler(folder, 1) == "process 7 on x"
