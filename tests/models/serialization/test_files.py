"""Files: read within limits, written whole or not at all, errors of one line that name them."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_ext.models.serialization import files, pretrained
from tokenflow_ext.models.serialization.config import CheckpointError
from tokenflow_ext.models.serialization.files import OutputError


class Refused(Exception):
    """What the readers are asked to raise."""


@contextmanager
def room_for(size: int):
    """Files of this process can hold ``size`` bytes: a write beyond fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"caf\xe9", "is not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b"", "is not JSON"),
        (b"[1,", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number of JSON"),
        (b"9" * 5000, "is not JSON"),  # more digits than Python reads
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
    ],
)
def test_text_that_is_no_json_is_refused_in_one_line(tmp_path, content, said):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(Refused, match=said) as caught:
        files.read_json(file, Refused)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 500


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json", Refused) == {"a": 1}


def test_only_files_are_read_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, said in (("pipe", "pipe"), ("link", "pipe"), ("", "folder"), ("none", "missing")):
        for reader in (files.read_text, files.read_json, pretrained.read_torch):
            with pytest.raises(Refused, match=said):
                reader(tmp_path / name, Refused)
    with pytest.raises(CheckpointError, match="pipe"):
        pretrained.read_safetensors(tmp_path / "pipe")


def test_no_more_than_the_limit_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert files.read_text(tmp_path / "a", Refused, limit=11) == "x" * 11
    with pytest.raises(Refused, match="larger than the 10 bytes"):
        files.read_text(tmp_path / "a", Refused, limit=10)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "..", "", None, 3, "a\0b"])
def test_names_stay_below_their_folder(tmp_path, name):
    with pytest.raises(Refused, match=r"index\.json"):
        files.inside(tmp_path, name, "index.json", Refused)


def test_names_below_a_folder_are_taken(tmp_path):
    assert files.inside(tmp_path, "a/b..c.json", "x", Refused) == tmp_path / "a" / "b..c.json"


@settings(max_examples=40)
@given(st.recursive(st.text() | st.floats() | st.integers(), lambda x: st.lists(x) | st.tuples(x)))
def test_values_are_shown_briefly(value):
    assert len(files.shown(value)) < 8000


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, list(range(10_000)), 1 << 100_000, 10**4000],
    ids=["text", "list", "number", "digits"],
)
def test_large_values_are_shown_briefly(value):
    assert len(files.shown(value)) < 100


def test_lists_of_lists_are_shown_briefly():
    value: list = []
    for _ in range(60):  # 2 ** 60 lists, if each were shown
        value = [value, value]
    assert len(files.shown(value)) < 100


# -- writing --------------------------------------------------------------------------------------

WRITERS = {
    "bytes": lambda path: files.write_file(path, b"new " * 5000, overwrite=True),
    "torch": lambda path: pretrained.write_torch(path, {"a": torch.zeros(5000)}),
    "safetensors": lambda path: pretrained.write_safetensors(path, {"a": torch.zeros(5000)}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, write):
    file = tmp_path / "file"
    file.write_text("old")
    with room_for(3000), pytest.raises(OutputError) as caught:
        write(file)
    assert str(caught.value).startswith(f"cannot write {file}: ")
    assert "\n" not in str(caught.value)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    write(file)
    assert file.stat().st_size > 3000


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_is_replaced_and_not_followed(tmp_path, write):
    victim, file = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    file.symlink_to(victim)
    for name in ("file.part", "file.partial", ".file.part"):
        (tmp_path / name).symlink_to(victim)
    write(file)
    assert victim.read_text() == "mine"
    assert not file.is_symlink()
    assert len(os.listdir(tmp_path)) == 5


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_file(tmp_path / "made", b"")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "pipe/file"):
        with pytest.raises(OutputError, match=name):
            files.write_file(tmp_path / name, b"text", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_name_may_be_as_long_as_names_may_be(tmp_path):
    files.write_file(tmp_path / ("n" * 255), b"text")
    assert len(os.listdir(tmp_path)) == 1


def test_readers_see_the_old_file_or_the_new(tmp_path):
    file = tmp_path / "a.json"
    files.write_file(file, json.dumps([0] * 2000).encode())
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(sum(files.read_json(file, Refused)))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(1, 40):
        files.write_file(file, json.dumps([value] * 2000).encode(), overwrite=True)
    done.set()
    reader.join()
    assert seen
    assert all(total % 2000 == 0 for total in seen)


# -- files of tensors -----------------------------------------------------------------------------


class Dangerous:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("writer", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_objects_are_refused_without_advice_to_run_them(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    writer({"a": Dangerous()}, tmp_path / "a.pt")
    with pytest.raises(Refused) as caught:
        pretrained.read_torch(tmp_path / "a.pt", Refused)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    ("name", "read"),
    [("a.pt", pretrained.read_torch), ("a.safetensors", pretrained.read_safetensors)],
)
def test_damaged_files_end_in_one_line(tmp_path, name, read):
    good = tmp_path / "good"
    tensors = {"a": torch.arange(300.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    if name == "a.pt":
        pretrained.write_torch(good, tensors)
    else:
        pretrained.write_safetensors(good, tensors)
    content, file = good.read_bytes(), tmp_path / name
    generator = torch.Generator().manual_seed(0)
    messages = []
    for trial in range(120):
        changed = bytearray(content)
        if trial % 2:
            del changed[int(torch.randint(len(content), (), generator=generator)) :]
        else:
            for _ in range(4):
                at = int(torch.randint(len(content), (), generator=generator))
                changed[at] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(changed)
        try:
            read(file)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all(str(file) in said and "\n" not in said for said in messages)
    assert max(map(len, messages)) < 600


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_found_by_name(bad, dtype):
    value = torch.zeros(1000, dtype=dtype)
    state = {"a": [torch.ones(3), {"b": value}], "c": 1.0, "d": torch.ones(2, dtype=torch.int64)}
    assert pretrained.not_finite(state) == []
    value[777] = bad
    assert pretrained.not_finite(state) == ["a.1.b"]
    assert pretrained.not_finite({"c": bad, "e": torch.empty(0)}) == ["c"]


def test_a_number_that_is_said_to_be_many_is_looked_at_once():
    one = torch.zeros(3)
    assert pretrained.not_finite({"a": one[:1].expand(1 << 20, 1 << 20)}) == []
    assert pretrained.not_finite({"a": one.as_strided((1 << 20, 2), (0, 1))}) == []
    one[1] = math.nan
    assert pretrained.not_finite({"a": one.as_strided((1 << 30, 2), (0, 1))}) == ["a"]


def test_the_largest_numbers_are_finite():
    state = {"a": torch.full((1000,), torch.finfo(torch.float32).max)}
    assert pretrained.not_finite(state) == []
