"""Files are whole or absent, and readable by whom the umask lets."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megawan import files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_tensor_files_get_the_mode_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)}, {"k": "v"})
        files.write_json(tmp_path / "b.json", {"x": 1})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a.safetensors": mode,
        "b.json": mode,
    }
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    files.write_json(file, {"x": 1})

    def full_disk(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="no space"):
        files.write_json(file, {"x": 2})
    assert file.read_text() == '{\n  "x": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_tensors_of_every_kind_read_back_and_the_digest_is_the_files(tmp_path: Path) -> None:
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "odd": torch.randn(3, 5).to(torch.bfloat16),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "whole": torch.arange(7),
        "yes": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
        "large": torch.randn(2**22 + 3),  # more than one block
    }
    file = tmp_path / "a.safetensors"
    digest = files.write_tensors(file, tensors, {"k": 'a "quoted" ü'})
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest() == files.sha256(file)
    back = load_file(file)
    assert back.keys() == tensors.keys()
    assert all(
        torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items()
    )
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"k": 'a "quoted" ü'}
    # What the library writes from the same tensors, it reads the same.
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "b.safetensors")
    assert file.stat().st_size - (tmp_path / "b.safetensors").stat().st_size in range(8, 80)  # the metadata


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 - 1])
def test_the_digest_is_of_every_byte(size: int, tmp_path: Path) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
