"""The questions of the understanding demonstration: whole, never written over."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.config import load_understanding_config
from tokenflow_ext.train.data import DataError, conversations, easy_vqa
from tokenflow_ext.train.data.outputs import OutputError

TRAIN = [
    ["what shape is it?", "circle", 0],
    ["what color is it?", "red", 0],
    ["is it red?", "yes", 0],
    ["is it red?", "no", 2],
    ["is it red?", "no", 3],
    ["is it red?", "no", 4],
    ["what color is it?", "teal", 2],
]
TEST = [["is it red?", "no", 7]]


def wheel(path: Path, train=TRAIN, test=TEST) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for split, questions in (("train", train), ("test", test)):
            place = f"easy_vqa/data/{split}"
            archive.writestr(f"{place}/questions.json", json.dumps(questions))
            for number in {number for _, _, number in questions}:
                file = io.BytesIO()
                Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
                archive.writestr(f"{place}/images/{number}.png", file.getvalue())
    return path


def test_everything_is_there(tmp_path):
    folder = tmp_path / "out"
    counts = easy_vqa.unpack(wheel(tmp_path / "a.whl"), folder)
    assert counts == {"train": 7, "test": 1}
    read = [conversations.parse(x, 0)[0] for x in json.loads((folder / "train.json").read_text())]
    assert [x.kind for x in read] == ["shape", "colour", *["yes/no"] * 4, "colour"]
    assert read[0].turns[0].text == "<image>\nwhat shape is it?"
    for found, (_, answer, number) in zip(read, TRAIN, strict=True):
        assert found.turns[1].text == answer
        with Image.open(folder / found.pictures[0]) as picture:
            assert picture.getpixel((0, 0)) == (number, 0, 0)
    assert "MIT" in (folder / "LICENCE.txt").read_text()
    captions = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in captions] == [
        {"file_name": "0.png", "text": "a red circle"}
    ]


def test_what_is_there_stays(tmp_path, capsys):
    folder = tmp_path / "out"
    easy_vqa.unpack(wheel(tmp_path / "a.whl"), folder)
    before = (folder / "train.json").stat().st_mtime_ns
    entry.main(["fetch-easy-vqa", str(folder)])
    assert "already holds the questions" in capsys.readouterr().out
    assert (folder / "train.json").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="holds other things"):
        easy_vqa.unpack(tmp_path / "a.whl", folder)


def test_another_file_is_refused(tmp_path):
    wheel(tmp_path / "a.whl")
    with pytest.raises(SystemExit, match=r"is not easy-vqa 1\.0: its SHA-256 is"):
        entry.main(["fetch-easy-vqa", str(tmp_path / "o"), "--wheel", str(tmp_path / "a.whl")])
    assert not (tmp_path / "o").exists()
    (tmp_path / "b.whl").write_bytes(b"no archive")
    with pytest.raises(DataError, match="is not easy-vqa"):
        easy_vqa.unpack(tmp_path / "b.whl", tmp_path / "o")
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", "[]")
    with pytest.raises(DataError, match="is not easy-vqa"):
        easy_vqa.unpack(tmp_path / "c.whl", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_no_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DataError, match=r"pip download easy-vqa==1\.0 failed.*--wheel FILE"):
        easy_vqa.fetch(tmp_path / "o")
    assert not (tmp_path / "o").exists()


CONFIGS = Path(load_understanding_config.__code__.co_filename).parents[1] / "configs"


@pytest.mark.parametrize(
    "file", [*sorted(CONFIGS.glob("understanding/*.yaml")), CONFIGS / "easy_vqa.yaml"],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_settings_that_come_with_the_package(file):
    config = load_understanding_config(file)
    stage = file.stem.rpartition("_")[2]
    if file.parent.name != "understanding":
        return
    paper = {"1": (256, 1e-3, ("projector",)), "2": (128, 2e-5, ("projector", "language_model"))}
    assert (config.optim.batch, config.optim.lr, config.model.trained) == paper[stage]
    assert config.data.length == 2048
    assert config.optim.warmup == round(0.03 * config.optim.steps)
    assert (config.model.features, config.model.window) == ("last", 1)
