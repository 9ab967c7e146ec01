"""``tokenflow sample``: npz files of classes' pictures, parts, processes, what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchrun

from tokenflow_ext.models import VAR, TokenFlowTokenizer, VarConfig
from tokenflow_ext.train.cli import entry, samples
from tokenflow_ext.train.tasks.image_generator import (
    ClassImageGenerator,
    ImageGenerator,
    load_generator,
)


@pytest.fixture(scope="module")
def saved(image_tokenizer, tmp_path_factory) -> Path:
    """A model of three named classes."""
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    torch.manual_seed(0)
    names = ("ant", "bee", "cow")
    shape = VarConfig.for_tokenizer(
        tokenizer, depth=1, width=32, heads=2, classes=3, class_names=names
    )
    model = VAR(shape, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.save_pretrained(tmp_path_factory.mktemp("var") / "saved")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(samples, "PART", 4)


def sample(saved, *more):
    entry.main(["sample", "--checkpoint", str(saved), "--device", "cpu", *map(str, more)])


def test_an_npz_file_of_all_classes(saved, tmp_path, capsys, small_parts):
    file = tmp_path / "all.npz"
    sample(saved, "--each", 3, "--npz", file, "--seed", 5, "--batch-size", 2, "--guidance", 3)
    assert "9 pictures" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz"]
    with zipfile.ZipFile(file) as archive:  # an independent reader
        assert archive.testzip() is None
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        content = archive.read("arr_0.npy")
    assert content[:6] == b"\x93NUMPY"
    raw = np.frombuffer(content[-9 * 32 * 32 * 3 :], np.uint8).reshape(9, 32, 32, 3)
    with np.load(file, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], raw)
        assert arrays["arr_1"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    model = VAR.from_pretrained(saved)
    for i in range(9):
        expected = model.generate(torch.tensor([i // 3]), seed=5 + i, guidance=3.0)[0]
        difference = expected.permute(1, 2, 0).int() - torch.from_numpy(raw[i].astype(np.int32))
        assert difference.abs().max() <= 1, i  # other company in a batch, other rounding
    assert len({row.tobytes() for row in raw}) > 6


def test_a_broken_off_run_goes_on_to_the_same_file(saved, tmp_path, monkeypatch, small_parts):
    whole, broken = tmp_path / "whole.npz", tmp_path / "broken.npz"
    options = ("--each", 3, "--batch-size", 2)
    sample(saved, "--npz", whole, *options)
    draw, calls = ClassImageGenerator.draw, []

    def stops(self, prompts, seeds):
        calls.append(list(seeds))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, prompts, seeds)

    monkeypatch.setattr(ClassImageGenerator, "draw", stops)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        sample(saved, "--npz", broken, *options)
    assert not broken.exists()
    parts = tmp_path / "broken.npz.parts"
    assert sorted(p.name for p in parts.iterdir()) == ["00000.npy", "00001.npy", "about.json"]
    for other in (("--guidance", 2), ("--seed", 1), ("--each", 4), ("--more-smooth",)):
        with pytest.raises(SystemExit, match="parts of other pictures"):
            sample(saved, "--npz", broken, *options, *other)
    sample(saved, "--npz", broken, *options)
    assert calls[3] == [8]  # the last part alone was drawn
    assert broken.read_bytes() == whole.read_bytes()
    assert not parts.exists()


@pytest.mark.once
def test_two_processes_write_the_same_file(saved, tmp_path):
    """More parts than processes; their size is the command's own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tokenflow_ext.train.cli import entry, samples\n"
        "samples.PART = 4\n"
        "entry.main(sys.argv[1:])\n"
    )
    files = []
    for world in (0, 2):
        files.append(tmp_path / f"{world}.npz")
        words = ["sample", "--checkpoint", str(saved), "--npz", str(files[-1]), "--each", "4"]
        more = ["--batch-size", "4", "--device", "cpu"]
        torchrun.finish(torchrun.launch(script, [*words, *more], world))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_some_classes_and_a_sheet(saved, tmp_path):
    file = tmp_path / "some.npz"
    sample(saved, "cow", "0", "--each", 2, "--npz", file, "--more-smooth")
    with np.load(file) as arrays:
        assert arrays["arr_1"].tolist() == [2, 2, 0, 0]
    sheet = tmp_path / "sheet.png"
    sample(saved, "--sheet", sheet)
    assert sheet.is_file()
    with pytest.raises(SystemExit, match="is there already"):
        sample(saved, "--sheet", sheet)
    sample(saved, "--sheet", sheet, "--overwrite")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("dog", "--npz", "a.npz"), "there is no class 'dog' among the 3"),
        (("3", "--npz", "a.npz"), "there is no class '3' among the 3"),
        (("--npz", "a.zip"), r"ends in \.npz"),
        (("--npz", "a.npz", "--each", 0), "--each must be 1 or more"),
        (("--npz", "a.npz", "--batch-size", 3), "--batch-size must divide 256"),
        (("--npz", "nowhere.npz", "--guidance", -1), "--guidance must be 0 or more"),
    ],
)
def test_what_is_refused(saved, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        sample(saved, *more)
    assert not list(tmp_path.iterdir())


def test_files_in_the_way_stay(saved, tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(b"mine")
    with pytest.raises(SystemExit, match="is there already"):
        sample(saved, "--npz", file)
    assert file.read_bytes() == b"mine"
    other = tmp_path / "b.npz"
    (tmp_path / "b.npz.parts").mkdir()
    (tmp_path / "b.npz.parts" / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="holds other things"):
        sample(saved, "--npz", other)
    assert (tmp_path / "b.npz.parts" / "mine").read_text() == "mine"


def test_a_released_file(saved, tmp_path):
    """The same pictures as from the folder, and a tokenizer is asked for by name."""
    released = VAR.from_pretrained(saved).save_released(tmp_path / "var.pth")
    tokenizer = saved / "tokenizer"
    sample(saved, "2", "--each", 2, "--npz", tmp_path / "a.npz")
    sample(released, "2", "--each", 2, "--npz", tmp_path / "b.npz", "--tokenizer", tokenizer)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])
    with pytest.raises(SystemExit, match="--tokenizer is missing"):
        sample(released, "2", "--npz", tmp_path / "c.npz")
    with pytest.raises(SystemExit, match="--tokenizer is for a released file"):
        sample(saved, "2", "--npz", tmp_path / "c.npz", "--tokenizer", tokenizer)


def test_which_model_draws_what(saved, tmp_path):
    assert isinstance(load_generator(saved, guidance=2.0, steps=None), ClassImageGenerator)
    with pytest.raises(Exception, match="--steps is not for the model"):
        load_generator(saved, steps="one")
    with pytest.raises(Exception, match="draws classes: use tokenflow sample"):
        ImageGenerator.load(saved)
    with pytest.raises(SystemExit, match="draws classes: use tokenflow sample"):
        entry.main(["generate", "an ant", "--checkpoint", str(saved), "--out", str(tmp_path / "o")])
