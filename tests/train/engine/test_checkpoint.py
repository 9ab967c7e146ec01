"""Checkpoints: whole or absent, refused when altered, never executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.checkpoint import CheckpointError


def save_model(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))


def write(folder, step=1, keep=3):
    state = {"step": step, "weights": torch.arange(1000.0), "list": [1, (2, "three"), None]}
    return checkpoint.save(folder, step, state, save_model, keep)


def test_what_is_saved_comes_back(tmp_path):
    path = write(tmp_path)
    state = checkpoint.load(path)
    assert torch.equal(state["weights"], torch.arange(1000.0))
    assert state["list"] == [1, (2, "three"), None]
    assert not list(tmp_path.glob(".writing*"))


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 9, 100000000):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.available(tmp_path)] == ["step_00000010", "step_100000000"]


def test_the_same_step_can_be_written_again(tmp_path):
    write(tmp_path)
    assert checkpoint.load(write(tmp_path))["step"] == 1


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors", "config.json"])
def test_truncated_altered_and_missing_files_are_named(tmp_path, file):
    path = write(tmp_path)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{file} is truncated"):
        checkpoint.load(path)
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (path / file).write_bytes(flipped)
    with pytest.raises(CheckpointError, match=f"{file} is altered"):
        checkpoint.load(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, r"no manifest\.json"),
        ("{", "is not JSON"),
        ("[]", "no training checkpoint"),
        ('{"format": "something else"}', "no training checkpoint"),
        ('{"format": "tokenflow-training-checkpoint", "version": 99}', "version 99"),
        ('{"format": "tokenflow-training-checkpoint", "version": 1}', "names no files"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, manifest, message):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_nothing_is_executed_on_loading(tmp_path, writer):
    path, mark = write(tmp_path), tmp_path / "executed"
    content = {"step": 1, "bad": Dangerous(str(mark))}
    if writer == "torch":
        torch.save(content, path / "training.pt")
    else:
        (path / "training.pt").write_bytes(pickle.dumps(content))
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / "training.pt"
    manifest["files"]["training.pt"] = {
        "bytes": file.stat().st_size,
        "sha256": checkpoint.digest(file),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"training\.pt cannot be read"):
        checkpoint.load(path)
    assert not mark.exists()


def test_find_takes_a_run_a_checkpoint_or_a_saved_model(tmp_path):
    path = write(tmp_path / "checkpoints", 1)
    newest = write(tmp_path / "checkpoints", 2)
    assert checkpoint.find(tmp_path) == newest
    assert checkpoint.find(tmp_path / "checkpoints") == newest
    assert checkpoint.find(path) == path
    assert checkpoint.find(path / "model.safetensors") == path
    plain = tmp_path / "plain"
    plain.mkdir()
    save_model(plain)
    assert checkpoint.find(plain) == plain
    with pytest.raises(CheckpointError, match="nothing at"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        checkpoint.find(tmp_path / "empty")
    (newest / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.find(tmp_path)


def test_tokenizers_are_found_in_folders_and_original_files(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        checkpoint.TokenFlowTokenizer, "from_pretrained", lambda *given: asked.append(given)
    )
    path = write(tmp_path / "run" / "checkpoints", 1)
    for given in (tmp_path / "run", path, path / "training.pt"):
        checkpoint.load_tokenizer(given)
    file = tmp_path / "released.pt"
    file.touch()
    checkpoint.load_tokenizer(file, 256)
    assert asked == [(path, None)] * 3 + [(file, 256)]
    with pytest.raises(CheckpointError, match="nothing at"):
        checkpoint.load_tokenizer(tmp_path / "nowhere")


def test_an_interrupted_write_leaves_the_others_alone(tmp_path):
    path = write(tmp_path, 1)

    def interrupted(folder):
        save_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {}, interrupted, 3)
    assert checkpoint.available(tmp_path) == [path]
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".writing*"))
    assert checkpoint.load(path)["step"] == 1


def strangers(folder):
    """What is no checkpoint of ours, in a folder of checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    (folder / ".writing_note").write_text("mine")
    (folder / ".writing_00000002").write_text("mine")
    (folder / ".writing_mine").mkdir()
    (folder / "step_00000009").write_text("no folder")
    (folder / "elsewhere").symlink_to("/nowhere")
    return sorted(p.name for p in folder.iterdir())


def test_strangers_in_the_folder_are_left_alone(tmp_path):
    names = strangers(tmp_path)
    for step in (1, 2, 3):
        write(tmp_path, step, keep=1)
    assert [p.name for p in checkpoint.available(tmp_path)] == ["step_00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "step_00000003"])
    assert (tmp_path / ".writing_note").read_text() == "mine"


def test_an_old_checkpoint_that_is_a_link_is_taken_out_and_its_target_kept(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step_00000001").symlink_to(elsewhere)
    for step in (2, 3, 4):
        write(folder, step, keep=2)
    assert [p.name for p in checkpoint.available(folder)] == ["step_00000003", "step_00000004"]
    assert checkpoint.load(elsewhere)["step"] == 1


def test_an_old_checkpoint_that_stays_is_told(tmp_path, monkeypatch, capsys):
    write(tmp_path, 1)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    assert write(tmp_path, 2, keep=1).is_dir()
    assert "which cannot be removed: Permission denied" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_checkpoint_goes_only_when_its_replacement_is_there(tmp_path, monkeypatch, moment):
    """A kill around the two renames that put a checkpoint in the place of one of its step."""
    old = write(tmp_path, 1)
    state = {"step": 1, "new": True}
    rename, count = Path.rename, {"before": 0, "between": 1, "after": 2}[moment]
    seen = []

    def killed(self, target):
        if len(seen) == count:
            raise SystemExit
        seen.append(target)
        return rename(self, target)

    def gone(*_, **__):
        raise SystemExit  # a killed process clears nothing up

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(checkpoint.shutil, "rmtree", gone)
        with pytest.raises(SystemExit):
            checkpoint.save(tmp_path, 1, state, save_model, 3)
    checkpoint.tidy(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert ("new" in checkpoint.load(old)) == (moment == "after")


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path):
    path = write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            OutputError, match=r"cannot write .*step_00000002/training\.pt: "
        ) as end:
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(end.value)
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"/etc/passwd": {}}, "not below"),
        ({"../x": {}}, "not below"),
        ({"training.pt": 3}, "size and a SHA-256"),
        ({"training.pt": {}}, "expected None"),
        ({"training.pt": {"bytes": "x"}}, "expected 'x'"),
        ({"training.pt": {"bytes": [[[[1]]]] * 9999}}, "expected"),
        ({"": {}}, "must name files"),
        ({"a" * 300: {}}, "missing|cannot be read"),
        ([], "names no files"),
    ],
)
def test_a_manifest_of_another_form_ends_in_one_line(tmp_path, files, said):
    path = write(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = manifest["files"] | files if isinstance(files, dict) else files
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=said) as end:
        checkpoint.load(path)
    assert len(str(end.value)) < 600


def test_a_pipe_is_no_checkpoint(tmp_path):
    path = write(tmp_path)
    for name in ("training.pt", "model.safetensors", "manifest.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="nothing at"):
        checkpoint.find("a\0b")
