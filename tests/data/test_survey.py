"""A survey promises exactly what encoding makes: samples, order, shapes, and the reasons for the rest."""

import json
from pathlib import Path

import pytest

from megawan.data.buckets import Budget
from megawan.data.cutting import ClipSize
from megawan.data.survey import Memory, look, survey
from tests.data.encoding import listed, make_media, ramp, run, write

BUDGET = Budget((13, 9, 5), 48 * 64, None, 16, (4, 8, 8))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every length, shape and kind, and damaged ones."""
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.mark.parametrize(
    "size",
    [
        ClipSize(5, 32, 32, 16),
        ClipSize(13, 32, 32, 16, BUDGET),
        ClipSize(13, 32, 32, 16, BUDGET, 2, 4),
        ClipSize(13, 32, 32, None, BUDGET, None, 3),
        ClipSize(17, 32, 32, 16, None, None),
    ],
)
def test_what_is_surveyed_is_what_is_encoded(media: Path, tmp_path: Path, size: ClipSize) -> None:
    (tmp_path / "copy.mkv").write_bytes((media / "long.mkv").read_bytes())
    names = [*sorted(path.name for path in media.iterdir()), "long.mkv", "missing.mkv"]
    manifest = listed(media, *names)
    found = survey(manifest, size, Memory(None, size))
    report = run(manifest, tmp_path / "s", size)
    assert found.rejected == report.rejected and len(found.rejected) >= 4
    index = json.loads((tmp_path / "s/index.json").read_text())["samples"]
    assert [key for clip in found.clips for key in clip.keys] == [row["key"] for row in index]
    for clip, rows in zip(found.clips, _by_clip(index), strict=True):
        frames, height, width = clip.bucket.frames, clip.bucket.height, clip.bucket.width
        shape = [16, (frames - 1) // 4 + 1, height // 8, width // 8]
        assert {tuple(row["shape"]) for row in rows} == {tuple(shape)}
        assert [row.get("start", 0) for row in rows] == list(clip.starts)


def _by_clip(index: list[dict[str, object]]) -> list[list[dict[str, object]]]:
    groups: dict[object, list[dict[str, object]]] = {}
    for row in index:
        groups.setdefault((row["source_sha256"], row["prompt"]), []).append(row)
    return list(groups.values())


def test_files_are_looked_at_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, file = ClipSize(5, 32, 32, 16), tmp_path / "files.jsonl"
    write(tmp_path / "a.mkv", ramp(7))
    write(tmp_path / "b.mkv", ramp(3))
    manifest = listed(tmp_path, "a.mkv", "b.mkv")
    looked: list[str] = []

    def counted(path: Path, size: ClipSize) -> dict[str, object]:
        looked.append(path.name)
        return look(path, size)

    monkeypatch.setattr("megawan.data.survey.look", counted)
    first = survey(manifest, size, Memory(file, size))
    with file.open("a") as torn:
        torn.write('{"file": "half a l')
    assert survey(manifest, size, Memory(file, size)) == first
    assert looked == ["a.mkv", "b.mkv"]
    write(tmp_path / "b.mkv", ramp(9))
    second = survey(manifest, size, Memory(file, size))
    assert looked == ["a.mkv", "b.mkv", "b.mkv"] and len(second.clips) == 2
    survey(manifest, ClipSize(9, 32, 32, 16, BUDGET), Memory(file, ClipSize(9, 32, 32, 16, BUDGET)))
    assert looked[3:] == ["a.mkv", "b.mkv"]
    assert len(survey(manifest, size, Memory(file, size)).clips) == 2 and len(looked) == 5


def test_nothing_usable_is_one_line(tmp_path: Path) -> None:
    size = ClipSize(5, 32, 32, 16)
    with pytest.raises(ValueError, match=r"0 usable clips of 1; the first: .*gone.mkv: does not exist"):
        survey(listed(tmp_path, "gone.mkv"), size, Memory(None, size))
