"""The latent store: round trip, interruption, and every refusal."""

import json
import os
from pathlib import Path

import pytest
import torch

from megawan.data.latents import FORMAT, LatentStore, StoreWriter
from megawan.files import write_tensors

SETTINGS = {"codec": "dct", "latent_channels": 16, "text_dim": 8, "num_frames": 9}


def tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(16, 2, 4, 4, generator=generator),
        "text": torch.randn(1 + number % 3, 8, generator=generator),
    }


def row(number: int) -> dict[str, str]:
    return {"prompt": f"caption {number}", "source": f"{number}.mp4", "source_sha256": f"{number:064d}"}


def write(path: Path, numbers: range, *, shard_bytes: int = 4100, finish: bool = True) -> LatentStore | None:
    with StoreWriter(path, SETTINGS, shard_bytes) as writer:
        for number in numbers:
            if f"k{number}" not in writer.finished:
                writer.add(f"k{number}", tensors(number), row(number))
        return writer.finish([f"k{number}" for number in numbers], torch.ones(1, 8)) if finish else None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = write(tmp_path / "s", range(7))
    assert store is not None and len(store) == 7 and store.text_dim == 8
    assert len(list((tmp_path / "s").glob("shard_*.safetensors"))) == 4
    for number in range(7):
        sample = store[number]
        assert sample.prompt == f"caption {number}"
        assert torch.equal(sample.latents, tensors(number)["latents"])
        assert torch.equal(sample.text, tensors(number)["text"])
    assert torch.equal(store.empty_text, torch.ones(1, 8))
    store.verify()


def test_extras_travel_with_their_sample(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", SETTINGS) as writer:
        writer.add("a", {**tensors(0), "condition": torch.ones(20, 2, 4, 4)}, row(0))
        writer.add("b", tensors(1), row(1))
        store = writer.finish(["b", "a"], torch.ones(1, 8))
    assert store[0].condition is None
    assert store[1].condition is not None and store[1].condition.shape == (20, 2, 4, 4)


def test_an_interrupted_encode_continues_to_the_same_bytes(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", range(7))
    write(tmp_path / "cut", range(5), finish=False)
    assert StoreWriter(tmp_path / "cut", SETTINGS).finished == {"k0", "k1", "k2", "k3"}
    (tmp_path / "cut" / "shard_00002.safetensors.tmp").write_bytes(b"half")
    again = write(tmp_path / "cut", range(7))
    assert whole is not None and again is not None and whole.fingerprint == again.fingerprint
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize("taken_out", [0, 1, 3])
def test_a_shard_that_is_taken_out_is_encoded_again_and_no_other_is_lost(
    tmp_path: Path, taken_out: int
) -> None:
    write(tmp_path / "s", range(7))
    whole = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    (tmp_path / "s" / f"shard_{taken_out:05d}.safetensors").unlink()
    write(tmp_path / "s", range(7))
    now = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    assert now == whole


def test_a_shard_that_decayed_is_not_vouched_for_by_a_new_index(tmp_path: Path) -> None:
    write(tmp_path / "s", range(4))
    shard = tmp_path / "s" / "shard_00001.safetensors"
    good, times = shard.read_bytes(), shard.stat()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    index = (tmp_path / "s" / "index.json").read_bytes()
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: does not have the sha256 .* remove it"):
        write(tmp_path / "s", range(4))
    assert (tmp_path / "s" / "index.json").read_bytes() == index
    shard.unlink()
    write(tmp_path / "s", range(4))
    assert shard.read_bytes() == good


GOOD_ROW = {"key": "k", "shape": [16, 2, 4, 4], **row(0)}


@pytest.mark.parametrize(
    "header",
    [
        {},
        [1],
        {"settings": 1, "rows": []},
        {"settings": SETTINGS},
        {"settings": SETTINGS, "rows": [1]},
        {"settings": SETTINGS, "rows": [{**GOOD_ROW, "key": 1}]},
        {"settings": SETTINGS, "rows": [{**GOOD_ROW, "shape": [16, 2, 4]}]},
    ],
)
def test_a_shard_whose_header_is_damaged_is_refused(tmp_path: Path, header: object) -> None:
    write(tmp_path / "s", range(2))
    write_tensors(
        tmp_path / "s" / "shard_00001.safetensors", {"x": torch.ones(1)}, {FORMAT: json.dumps(header)}
    )
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: its header is not"):
        StoreWriter(tmp_path / "s", SETTINGS)


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    write(tmp_path / "s", range(2))
    with pytest.raises(ValueError, match=r"num_frames: there 9, asked 13"):
        StoreWriter(tmp_path / "s", {**SETTINGS, "num_frames": 13})


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        StoreWriter(tmp_path, SETTINGS)
    with pytest.raises(FileNotFoundError, match="not a finished latent store"):
        LatentStore(tmp_path)


def test_a_missing_short_or_changed_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "s", range(4))
    shard = tmp_path / "s" / "shard_00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: does not have the sha256"):
        LatentStore(tmp_path / "s").verify()
    shard.write_bytes(good[:-10])
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: has \d+ bytes, the index says \d+"):
        LatentStore(tmp_path / "s")
    shard.write_bytes(b"x" * len(good))
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: cannot read"):
        LatentStore(tmp_path / "s")[2]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00001\.safetensors"):
        LatentStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not the index of a latent store"),
        ({"version": 99}, "version 99"),
        ({"samples": []}, "has no samples"),
        ({"settings": {**SETTINGS, "latent_channels": "x"}}, "its settings are not"),
        ({"settings": []}, "its settings are not"),
        ({"samples": [1]}, "its samples are not"),
        ({"samples": {"a": 1}}, "its samples are not"),
        ({"samples": [GOOD_ROW]}, "its samples are not"),
        ({"samples": [{**GOOD_ROW, "shard": "s", "shape": "abcd"}]}, "its samples are not"),
        ({"shards": []}, "its shards are not"),
        ({"shards": {"shard_00000.safetensors": {}}}, "its shards are not"),
        ({"shards": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "leaves the store"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write(tmp_path / "s", range(2))
    file = tmp_path / "s" / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        LatentStore(tmp_path / "s")
    file.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        LatentStore(tmp_path / "s")


def test_several_writers_fill_one_store(tmp_path: Path) -> None:
    for part, numbers in (("0of2", (0, 2, 4)), ("1of2", (1, 3))):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "shard_9of9_00000.safetensors.tmp").write_bytes(b"another task is writing this")
        with StoreWriter(tmp_path / "s", SETTINGS, 4100, part) as writer:
            for number in numbers:
                writer.add(f"k{number}", tensors(number), row(number))
            writer.flush()
        assert (tmp_path / "s" / "shard_9of9_00000.safetensors.tmp").exists()
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").glob("shard_?of2_*")}
    assert len(before) == 3
    store = write(tmp_path / "s", range(5))
    assert store is not None and [store[number].prompt for number in range(5)] == [
        f"caption {n}" for n in range(5)
    ]
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").glob("shard_*")} == before
