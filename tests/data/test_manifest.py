"""Manifests in every known form, and every mistake with its row number."""

import json
import os
from pathlib import Path

import pytest

from megawan.data.manifest import read_manifest
from megawan.data.video import check_file


def table(tmp_path: Path, name: str, content: str | bytes) -> Path:
    for clip in ("a.mp4", "b.mp4"):
        (tmp_path / clip).write_bytes(b"x")
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "video,prompt\na.mp4,one\nb.mp4,two\n"),
        ("metadata.csv", "\ufeffvideo,prompt\r\na.mp4,one\r\nb.mp4,two\r\n"),
        ("list.csv", "file_path,text,type\na.mp4,one,video\nb.mp4,two,video\n"),
        ("list.csv", "file_name,caption\na.mp4,one\nb.mp4,two\n"),
        (
            "list.jsonl",
            "".join(
                f'{{"video_path": "{n}.mp4", "caption": "{c}"}}\n' for n, c in (("a", "one"), ("b", "two"))
            ),
        ),
        ("list.json", json.dumps([{"video": "a.mp4", "prompt": "one"}, {"video": "b.mp4", "prompt": "two"}])),
        ("list.jsonl", '{"video": "a.mp4", "prompt": "one"}\n\n{"video": "b.mp4", "prompt": "two"}\n'),
    ],
)
def test_known_forms(tmp_path: Path, name: str, content: str) -> None:
    manifest = read_manifest(table(tmp_path, name, content))
    assert [(row.path.name, row.prompt, row.number) for row in manifest.rows] == [
        ("a.mp4", "one", 1),
        ("b.mp4", "two", 2),
    ]
    assert "2 rows" in manifest.found


def test_a_folder_with_metadata_and_a_folder_with_captions_beside(tmp_path: Path) -> None:
    table(tmp_path, "metadata.csv", "video,prompt\na.mp4,one\n")
    assert [row.prompt for row in read_manifest(tmp_path).rows] == ["one"]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    assert [row.prompt for row in read_manifest(tmp_path).rows] == ["first", "second"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.mp4: has no caption file b\.txt"):
        read_manifest(tmp_path)


def test_quoted_fields_keep_commas_quotes_and_lines(tmp_path: Path) -> None:
    manifest = read_manifest(table(tmp_path, "m.csv", 'video,prompt\na.mp4,"a ""b"", c\nd"\n'))
    assert manifest.rows[0].prompt == 'a "b", c\nd'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", "", "lists no clips"),
        ("m.csv", "video,prompt\n", "lists no clips"),
        ("m.csv", "film,prompt\na.mp4,one\n", "no file column; legal: video, file_path"),
        ("m.csv", "video,words\na.mp4,one\n", "no caption column; legal: prompt, text"),
        ("m.csv", "video,prompt\na.mp4,one\nb.mp4\n", "row 2: has not the 2 fields"),
        ("m.csv", "video,prompt\na.mp4,one,more\n", "row 1: has not the 2 fields"),
        ("m.csv", "video,video\na.mp4,one\n", "names a column twice"),
        ("m.csv", "video,prompt\na.mp4,one\nb.mp4,  \n", "row 2: prompt is blank"),
        ("m.csv", 'video,prompt\na.mp4,"one\n', "line"),
        ("m.csv", b"\xff\xfev\x00i\x00", "not UTF-8"),
        ("m.json", '[{"video": "a.mp4", "prompt": NaN}]', "row 1: prompt is nan, not text"),
        ("m.json", '[{"video": "a.mp4", "prompt": 7}]', "row 1: prompt is 7, not text"),
        ("m.json", '{"video": "a.mp4"}', "list of objects"),
        ("m.json", "[", "not JSON"),
        ("m.jsonl", '{"video": "a.mp4", "prompt": "x"}\n{', "line 2: not JSON"),
        ("m.txt", "a.mp4", "a manifest ends in .csv, .json, .jsonl"),
        ("m.csv", "video,prompt\n../x.mp4,one\n", "row 1: '../x.mp4' lies outside"),
        ("m.csv", "video,prompt\n/etc/passwd,one\n", "row 1: '/etc/passwd' lies outside"),
        ("m.csv", "video,prompt\nhttps://x/y.mp4,one\n", "not a file path"),
        ("m.csv", "video,prompt\nconcat:a.mp4|b.mp4,one\n", "not a file path"),
        ("m.json", json.dumps([{"video": "a\0.mp4", "prompt": "x"}]), "NUL"),
        ("m.json", json.dumps([{"video": "a.mp4", "prompt": "half \ud800"}]), "row 1: prompt holds half"),
        ("m.json", json.dumps([{"video": "a.mp4", "prompt": None}]), "row 1: prompt is None, not text"),
        ("m.json", "[" * 100_000, "not JSON"),
        ("m.json", '[{"video": "a.mp4", "prompt": ' + "1" * 5000 + "}]", "not JSON"),
        ("m.jsonl", '{"a": ' * 100_000, "line 1: not JSON"),
        ("m.jsonl", json.dumps({"video": "a.mp4", "prompt": "x" * (1 << 21)}), "2,097,152 characters"),
        ("m.csv", 'video,prompt\na.mp4,"' + "x" * (1 << 21) + '"\n', "field larger than field limit"),
        ("m.csv", "video,image,prompt\n,,one\n", "row 1: video is blank"),
        ("m.csv", "video,prompt\na.mp4,caf\xe9\n".encode("latin-1"), "not UTF-8 text (byte 22)"),
        ("m.csv", "video,prompt\na\0.mp4,one\n", "NUL"),
        ("m.csv", "video;prompt\na.mp4;one\n", "found: video;prompt"),
        ("m.json", '[{"video": "a.mp4", "prompt": ["one"]}]', "row 1: prompt is ['one'], not text"),
        ("m.json", '[["a.mp4", "one"]]', "must be a list of objects"),
        ("m.jsonl", '["a.mp4", "one"]\n', "line 1: must be an object"),
        ("m.jsonl", '{"video": "a.mp4", "prompt": "x", "prompt": "y"}\n', "names 'prompt' twice"),
        ("m.json", '[{"video": "a.mp4", "video": "b.mp4", "prompt": "y"}]', "names 'video' twice"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    file = table(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        read_manifest(file)
    assert name in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_are_counted_and_their_rows_named(tmp_path: Path) -> None:
    rows = ["a.mp4,one", "a.mp4, ", "../b.mp4,two", "b.mp4,", *["b.mp4,"] * 40]
    file = table(tmp_path, "m.csv", "video,prompt\n" + "\n".join(rows) + "\n")
    with pytest.raises(
        ValueError, match=r"row 2: prompt is blank \(and 42 more mistakes: row 3, row 4, .*\.\.\.\)$"
    ):
        read_manifest(file)
    file.unlink()
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a.mp4: caption is blank \(and 1 more mistakes: b.mp4\)$"):
        read_manifest(tmp_path)


def test_links_may_not_lead_out_unless_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"x")
    (inside / "a.mp4").symlink_to(outside / "secret.mp4")
    file = inside / "m.csv"
    file.write_text("video,prompt\na.mp4,one\n")
    with pytest.raises(ValueError, match="lies outside"):
        read_manifest(file)
    assert read_manifest(file, allow_outside_root=True).rows[0].path == outside / "secret.mp4"


def test_links_of_a_folder_of_clips_may_lead_out_when_allowed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/4f1c").write_bytes(b"x")
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").symlink_to("../blobs/4f1c")
    (clips / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="allow it with --allow_outside_root"):
        read_manifest(clips)
    (row,) = read_manifest(clips, allow_outside_root=True).rows
    assert row.path == tmp_path / "blobs/4f1c"


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.csv: no such file"):
        read_manifest(tmp_path / "nope.csv")


def test_a_list_of_videos_and_images_has_a_column_for_each(tmp_path: Path) -> None:
    manifest = read_manifest(table(tmp_path, "m.csv", "image,video,prompt\n,a.mp4,one\nb.png,,two\n"))
    assert [row.path.name for row in manifest.rows] == ["a.mp4", "b.png"]
    assert "columns video or image and prompt" in manifest.found


def test_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    captions = [
        "two \u2028 lines \x85 and \x0b more",
        "a 🦊 " + "x" * 40_000,
        "עברית \u200b\u202e",
        "-leading &amp; <b>",
    ]
    content = "".join(
        json.dumps({"video": "a.mp4", "prompt": text}, ensure_ascii=False) + "\r\n" for text in captions
    )
    assert [row.prompt for row in read_manifest(table(tmp_path, "m.jsonl", content)).rows] == captions


def test_names_with_every_kind_of_character(tmp_path: Path) -> None:
    names = [b"-v.mp4", b"a b.mp4", b"$(x).mp4", "日本.mp4".encode(), b"\xff\xfe.mp4"]
    for name in names:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x")
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name[:-4] + b".txt")).write_text("caption")
    assert sorted(os.fsencode(row.path.name) for row in read_manifest(tmp_path).rows) == sorted(names)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    file = table(tmp_path, "m.csv", "video,prompt\nloop.mp4,one\n")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    with pytest.raises(ValueError, match=r"loop\.mp4"):  # by the list or, with a newer Python, by the file
        check_file(read_manifest(file).rows[0].path)
