"""Files of commands: whole or not at all, never over something else; how a command ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_ext import _build
from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.serialization import files
from tokenflow_ext.train.data import outputs
from tokenflow_ext.train.data.outputs import OutputError, Outputs
from tokenflow_ext.train.data.text_files import DataError
from tokenflow_ext.train.engine import checkpoint, distributed, messages

# What a file system allows in a name: any byte but these two.
NAMES = st.binary(min_size=1, max_size=60).filter(lambda raw: not set(raw) & {0, ord("/")})


@given(st.lists(st.one_of(st.sampled_from(["a", "A", "a~2", "é", "e\u0301"]), NAMES), max_size=8))
def test_distinct_names_are_distinct_on_any_file_system(names):
    given = [name if isinstance(name, str) else os.fsdecode(name) for name in names]
    made = outputs.distinct_names(given, ".png")
    assert len({outputs._alike(name) for name in made}) == len(given)
    for before, after in zip(given, made, strict=True):
        assert after == before or after.startswith(f"{before}~")


def test_names_that_are_too_long_are_cut_to_fit():
    long = "é" * 127
    one, two = outputs.distinct_names([long, long], ".safetensors")
    assert one != two
    assert long.startswith(one)
    for name in (one, two):
        assert 240 < len(os.fsencode(name + ".safetensors")) <= 255


@given(NAMES)
def test_json_of_any_name_is_valid_and_gives_its_bytes_back(raw):
    content = outputs.json_text({"image": os.fsdecode(raw), "caption": "café"})
    assert "café" in content.decode("utf-8")
    assert os.fsencode(json.loads(content)["image"]) == raw


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "below" / "file"
    files.write_file(file, b"one")
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    with pytest.raises(OutputError, match="is there already"):
        files.write_file(file, b"two")
    assert file.read_bytes() == b"one"
    files.write_file(file, b"two", overwrite=True)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*/file: No space left on device"):
        files.write_file(file, b"three", overwrite=True)
    assert file.read_bytes() == b"two"
    assert os.listdir(file.parent) == ["file"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    files.write_file(tmp_path / "a", b"one")
    with pytest.raises(OutputError, match="is there already"):
        files.write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_link_is_followed_and_left_overs_go(tmp_path):
    """Neither a link of the file's name nor one of a temporary name leads to what it points to."""
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("out", "out.part", ".out.part"):
        (tmp_path / name).symlink_to("mine")
    with pytest.raises(OutputError, match="is there already"):
        files.write_file(tmp_path / "out", b"new")
    checkpoint.write_text(tmp_path / "out", "new")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "out").is_symlink()
    (tmp_path / ".0123456789abcdef.part").touch()
    (tmp_path / "notes.part").touch()
    files.remove_parts(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.part", "mine", "notes.part", "out", "out.part"]


def test_what_is_claimed_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    for folder in ("file", "file/below", "pipe", "broken", "broken/below", "x" * 256):
        with pytest.raises(OutputError, match="cannot write into"):
            Outputs(tmp_path / folder).claim(["a"])
    for name in ("file", "pipe", "broken"):
        with pytest.raises(OutputError, match=f"/{name} is there already"):
            Outputs(tmp_path).claim(["new", name])
    with pytest.raises(OutputError, match="written twice: as a and as A"):
        Outputs(tmp_path).claim(["a", "A"])
    Outputs(tmp_path / "deep" / "er").claim(["a"])
    assert not (tmp_path / "deep").exists()  # nothing is made before there is something to write


def test_overwriting_spares_inputs(tmp_path):
    (tmp_path / "photo").write_bytes(b"photo")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("photo")
    os.link(tmp_path / "photo", tmp_path / "hard")
    target = Outputs(tmp_path, overwrite=True)
    for name in ("photo", "link", "hard"):
        with pytest.raises(OutputError, match="one of the inputs"):
            Outputs(tmp_path, overwrite=True).claim([name], [tmp_path / "photo"])
    with pytest.raises(OutputError, match="no file that could be replaced"):
        Outputs(tmp_path, overwrite=True).claim(["folder"])
    target.claim(["old"], [tmp_path / "photo"])
    assert target.write_json("old", {"a": 1}).read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        outputs.check_folder(tmp_path / "out")


# -- how a command ends ---------------------------------------------------------------------------


def test_a_message_is_one_line():
    name = os.fsdecode(b"a\n\x1b[31m\xe9\xc3\xa9\xe2\x80\xa8\xe2\x80\xae.png")
    said = messages.one_line(f"cannot read {name}")
    assert said == "cannot read a \\x1b[31m\\xe9é\\u2028\\u202e.png"
    said.encode("utf-8")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("no folder\nat x"), "error: no folder at x"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "error: .*No space left.*'x'"),
        (MemoryError(), "error: out of memory"),
        (KeyboardInterrupt(), "130"),
    ],
)
def test_expected_errors_end_in_one_line(error, status):
    with pytest.raises(SystemExit, match=status) as raised, messages.ending_in_one_line():
        raise error
    assert "\n" not in str(raised.value)


def test_torch_out_of_memory_ends_in_one_line():
    said = r"out of memory: asked for 4194304\.0 GiB"
    with pytest.raises(SystemExit, match=said) as raised, messages.ending_in_one_line():
        torch.empty(1 << 50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("a bug"), OSError("a bug")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"), messages.ending_in_one_line():
        raise error


@pytest.mark.once
def test_a_reader_that_has_gone_and_a_missing_package():
    code = """
import sys
from tokenflow_ext.train.engine import messages
with messages.ending_in_one_line():
    if sys.argv[1] == "package":
        import no_such_package
    if sys.argv[1] == "own":
        import tokenflow_ext.no_such_module
    for _ in range(10**6):
        print("a line")
"""
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(
        [*command, "pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "stopped: nobody reads the output any more\n"
    assert process.returncode == 128 + signal.SIGPIPE
    done = subprocess.run([*command, "package"], capture_output=True, text=True)
    expected = "error: no_such_package is not installed: pip install 'tokenflow_ext[train]'\n"
    assert (done.returncode, done.stderr) == (1, expected)
    done = subprocess.run([*command, "own"], capture_output=True, text=True)
    assert "Traceback" in done.stderr


def test_sigterm_removes_what_is_half_written(tmp_path):
    code = f"""
import os, pathlib, signal
from tokenflow_ext.models.serialization import files
from tokenflow_ext.train.engine import messages
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM)
with messages.ending_in_one_line():
    files.write_file(pathlib.Path({str(tmp_path)!r}) / "file", b"content")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "stopped by SIGTERM\n")
    assert not list(tmp_path.iterdir())


# -- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["gpu", "nonsense", "cuda:", "cuda:-1", "mps", "meta", "", "CPU"])
def test_other_words_are_no_device(asked):
    with pytest.raises(ConfigError, match="is none of auto, cpu, cuda and cuda:N"):
        distributed.find_device(asked)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"'cuda:1': this torch .* is without CUDA"):
        distributed.find_device("cuda:1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "build_info", lambda: {"cuda": "13.0"})
    assert distributed.find_device("cuda:1") == torch.device("cuda:1")
    assert distributed.find_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.find_device("cuda") == torch.device("cuda:1")
    for asked, rank in (("cuda:99", "0"), ("cuda", "2"), ("auto", "3")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match=r"number \d+ of 2 CUDA devices"):
            distributed.find_device(asked)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with monkeypatch.context() as patch:  # what was built is not known: the kernels will say it
        patch.setitem(sys.modules, "tokenflow_ext._build_info", None)
        patch.setattr(distributed, "build_info", _build.build_info)
        assert distributed.find_device("cuda") == torch.device("cuda:0")
    facts = {"cuda": None, "cuda_reason": "no nvcc"}
    monkeypatch.setattr(distributed, "build_info", lambda: facts)
    with pytest.raises(ConfigError, match="built without CUDA, no nvcc"):
        distributed.find_device("cuda")
