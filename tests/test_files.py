"""Files are whole or absent, and readable by whom the umask lets."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 - 1])
def test_the_digest_is_of_every_byte(size: int, tmp_path: Path) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
