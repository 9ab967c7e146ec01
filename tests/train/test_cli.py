"""The command ``tokenflow`` on a trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train import checkpoint, cli, tokenizer
from tokenflow_ext.train.logs import over_under


@pytest.fixture(scope="module")
def run(micro, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    tokenizer.main(micro.overrides(folder, images, *micro.PIXEL_ONLY, "optim.steps=3"))
    return folder


def test_reconstruct_writes_pictures_and_tokens(run, images, tmp_path, capsys):
    names = [str(p) for p in sorted(images.iterdir())[:2]]
    out = tmp_path / "out"
    cli.main(["reconstruct", *names, "--checkpoint", str(run), "--out", str(out)])
    assert capsys.readouterr().out.count(" dB") == 2
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    for name in names:
        stem = out / Path(name).stem
        with Image.open(stem.with_suffix(".png")) as picture:
            assert picture.width < picture.height  # one above the other
        tokens = load_file(stem.with_suffix(".safetensors"))["tokens"]
        original = cli.read_square(Path(name), 32)[None]
        assert torch.equal(tokens.long(), model.encode(original))


def test_commands_take_released_files(run, images, tmp_path, released):
    """Each command that uses a tokenizer hands file and resolution to the one reader."""
    file, asked = released(checkpoint.find(run))
    picture, folder = str(min(images.glob("*.png"))), str(images)
    source = ["--checkpoint", str(file), "--resolution", "256", "--device", "cpu"]
    for name, *more in (
        ("reconstruct", picture),
        ("tokenize", folder),
        ("evaluate", "--data", folder),
        ("analyse", "--data", folder),
    ):
        cli.main([name, *more, *source, "--out", str(tmp_path / name)])
    assert asked == [(file, 256)] * 4
    expected = checkpoint.digest(file)
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert metrics["tokenizer"]["sha256"] == expected
    analysis = json.loads((tmp_path / "analyse" / "analysis.json").read_text())
    assert analysis["tokenizers"][0]["sha256"] == expected


def test_tokenize_writes_shards_and_an_index(run, images, tmp_path):
    (images / "picture1.txt").write_text("Waves of colour.\nMore.\n")
    (images / "broken.png").write_bytes(b"no image")
    out = tmp_path / "tokens"
    arguments = ["--checkpoint", str(run), "--out", str(out), "--shard", "2", "--batch", "1"]
    cli.main(["tokenize", str(images), *arguments])
    index = json.loads((out / "index.json").read_text())
    assert (index["images"], index["codebook_size"], index["tokens_per_image"]) == (3, 64, 21)
    assert [shard["count"] for shard in index["shards"]] == [1, 2]
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    captions = {}
    for shard in index["shards"]:
        with safe_open(out / shard["tokens"], framework="pt") as file:
            tokens = file.get_tensor("tokens")
            assert json.loads(file.metadata()["scales"]) == [[1, 1], [2, 2], [4, 4]]
        assert tokens.dtype == torch.int32
        rows = json.loads((out / shard["rows"]).read_text())
        assert len(rows) == len(tokens)
        for row, line in zip(rows, tokens, strict=True):
            captions[row["image"]] = row["caption"]
            original = cli.read_square(images / row["image"], 32)[None]
            assert torch.equal(line.long(), model.encode(original)[0])
    (images / "picture1.txt").unlink()
    (images / "broken.png").unlink()
    assert index["skipped"] == ["broken.png"]
    expected = {"picture0.png": None, "picture1.png": "Waves of colour.", "picture2.png": None}
    assert captions == expected


@pytest.mark.parametrize("place", ["checkpoint", "saved"])
def test_every_kind_of_checkpoint_path(run, images, tmp_path, place):
    source = checkpoint.available(run / "checkpoints")[-1]
    if place == "saved":
        source = TokenFlowTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    image = str(sorted(images.iterdir())[0])
    cli.main(["reconstruct", image, "--checkpoint", str(source), "--out", str(tmp_path / "o")])
    assert len(list((tmp_path / "o").iterdir())) == 2


def test_errors_end_with_one_line(run, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    for arguments, message in (
        (["reconstruct", "nowhere.png", "--checkpoint", str(run)], r"nowhere\.png"),
        (["reconstruct", "x.png", "--checkpoint", str(tmp_path / "none")], "nothing at"),
        (["tokenize", str(tmp_path / "none"), "--checkpoint", str(run)], "no folder"),
        (["tokenize", str(broken), "--checkpoint", str(run)], "can be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main([*arguments, "--out", str(tmp_path / "out")])


def test_train_is_the_entry_point(monkeypatch):
    called = []
    monkeypatch.setattr(tokenizer, "main", called.append)
    cli.main(["train", "--resume", "optim.lr=1e-4"])
    assert called == [["--resume", "optim.lr=1e-4"]]


def test_originals_stand_over_reconstructions():
    originals, made = torch.full((3, 3, 4, 4), -1.0), torch.full((3, 3, 4, 4), 0.5)
    sheet = over_under(originals, made, columns=2, least=4)
    assert sheet.shape == (2 * 12 + 4, 12, 3)
    assert (sheet[:4, :4] == 0).all()
    assert (sheet[6:10, :4] == 191).all()
    assert (sheet[16:20, :4] == 0).all()
    assert (sheet[16:, 6:10] == 255).all()  # the second row holds one image alone
