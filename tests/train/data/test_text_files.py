"""Text that people hand in, names, and lines about what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_ext.train.data import text_files
from tokenflow_ext.train.data.text_files import DataError, Tally, printable


@given(st.binary(max_size=60))
def test_any_name_can_be_printed(name):
    shown = printable(os.fsdecode(name))
    shown.encode("utf-8")
    assert shown == "" or shown.isprintable()
    assert "\n" not in str(DataError(f"cannot read {os.fsdecode(name)}"))


def test_printable_leaves_what_prints():
    assert printable(Path("a b/日本é🍑.png")) == "a b/日本é🍑.png"
    assert printable(os.fsdecode(b"caf\xe9\n\x1b.png")) == r"caf\xe9\n\x1b.png"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_utf8_is_read_with_and_without_a_mark(text):
    for content in (text.encode(), text.encode("utf-8-sig")):
        assert text_files.decode(content, "a.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat".encode("utf-16"), r"^a\.txt is not UTF-8 but UTF-16 text: save it as UTF-8$"),
        ("a cat".encode("utf-32"), r"^a\.txt is not UTF-8 but UTF-32 text"),
        (b"\xfe\xff\0a", r"^a\.txt is not UTF-8 but UTF-16 text"),
        ("one\na cat".encode("utf-16-le"), r"^a\.txt, line 1: NUL, as in UTF-16"),
        ("one\r\ntwo\ncat\u2019s".encode("cp1252"), r"^a\.txt, line 3: byte 0x92 is not UTF-8"),
        (b"caf\xe9", r"^a\.txt, line 1: byte 0xe9"),
        (b"cut off \xe2\x80", r"^a\.txt, line 1: byte 0xe2"),
        (b"\xed\xa0\x80", r"^a\.txt, line 1: byte 0xed"),  # a lone surrogate
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        text_files.decode(content, "a.txt")
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.txt"):
        text_files.read_text(tmp_path / "b.txt")


def test_lines_end_at_line_feeds_alone():
    text = "a\u2028b\r\n\n \r\nc\x85d\x0be\x1cf\n"
    assert list(text_files.lines(text)) == [(1, "a\u2028b"), (4, "c\x85d\x0be\x1cf")]


def test_what_is_no_file_is_not_waited_on(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name, what in (
        ("pipe.txt", "is no file but a pipe or a device"),
        ("link.txt", "is no file but a pipe or a device"),
        ("folder.txt", "is no file but a folder"),
        ("nowhere.txt", "is missing"),
    ):
        with pytest.raises(DataError, match=rf"{name} {what}$"):
            text_files.read_text(tmp_path / name)


@pytest.mark.parametrize("line", ["[" * 100_000, "{", "[1]", '"text"', "3", "nonsense"])
def test_lines_that_are_no_objects_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'\ufeff{{"text": "a\u2028b"}}\r\n\n{line}\n')
    rows = text_files.json_lines(tmp_path / "a.jsonl", "an object")
    assert next(rows) == (1, {"text": "a\u2028b"})
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected an object, got ") as error:
        next(rows)
    assert len(str(error.value)) < 400


def test_listings_stay_in_their_folder(tmp_path):
    assert text_files.inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    assert text_files.inside(tmp_path, "a..b/..c") == tmp_path / "a..b" / "..c"
    for name in ("/etc/passwd", "../x", "a/../../x", "..", "", "a\0b", "\ud800", 3, None, ["a"]):
        with pytest.raises(ValueError, match=r"the listing (names|must name)"):
            text_files.inside(tmp_path, name)


def test_tallies_say_how_many_and_why(capsys, monkeypatch):
    tally = Tally(os.fsdecode(b"d\xe9"))
    tally.say()
    assert capsys.readouterr().err == ""
    for i in range(1000):
        tally.add("broken", f"{i}.png")
        tally.say_doubled()
    tally.add("hidden", ".a.png", 7)
    tally.say()
    tally.say()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 11  # after 1, 2, 4, ... 512 and at the end
    assert said[0] == r"d\xe9: left out: 1 broken (0.png)"
    assert said[-1] == r"d\xe9: left out: 1000 broken (0.png); 7 hidden (.a.png)"
    monkeypatch.setenv("RANK", "1")
    tally.add("hidden", "b")
    tally.say()
    assert capsys.readouterr().err == ""
