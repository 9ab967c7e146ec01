"""The command ``tokenflow`` on a trained tokenizer."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tokenflow_ext._build import InstructionSetError
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train import tokenizer
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.data import image_files
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.engine import checkpoint, messages
from tokenflow_ext.train.engine.logs import over_under


@pytest.fixture(scope="module")
def run(micro, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    tokenizer.main(micro.overrides(folder, images, *micro.PIXEL_ONLY, "optim.steps=3"))
    return folder


def test_reconstruct_writes_pictures_and_tokens(run, images, tmp_path, capsys):
    names = [str(p) for p in sorted(images.iterdir())[:2]]
    out = tmp_path / "out"
    entry.main(["reconstruct", *names, "--checkpoint", str(run), "--out", str(out)])
    assert capsys.readouterr().out.count(" dB") == 2
    model = TokenFlowTokenizer.from_pretrained(checkpoint.find(run))
    for name in names:
        stem = out / Path(name).stem
        with Image.open(stem.with_suffix(".png")) as picture:
            assert picture.width < picture.height  # one above the other
        tokens = load_file(stem.with_suffix(".safetensors"))["tokens"]
        original = read_square(Path(name), 32)[None]
        assert torch.equal(tokens.long(), model.encode(original))


def test_commands_take_original_files(run, images, tmp_path, released):
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
        entry.main([name, *more, *source, "--out", str(tmp_path / name)])
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
    arguments = [
        "--checkpoint",
        str(run),
        "--out",
        str(out),
        "--shard-size",
        "2",
        "--batch-size",
        "1",
    ]
    entry.main(["tokenize", str(images), *arguments])
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
            original = read_square(images / row["image"], 32)[None]
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
    entry.main(["reconstruct", image, "--checkpoint", str(source), "--out", str(tmp_path / "o")])
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
            entry.main([*arguments, "--out", str(tmp_path / "out")])


def test_train_is_the_entry_point(monkeypatch):
    called = []
    monkeypatch.setattr(tokenizer, "main", called.append)
    entry.main(["train", "--resume", "optim.lr=1e-4"])
    assert called == [["--resume", "optim.lr=1e-4"]]


def test_originals_stand_over_reconstructions():
    originals, made = torch.full((3, 3, 4, 4), -1.0), torch.full((3, 3, 4, 4), 0.5)
    sheet = over_under(originals, made, columns=2, least=4)
    assert sheet.shape == (2 * 12 + 4, 12, 3)
    assert (sheet[:4, :4] == 0).all()
    assert (sheet[6:10, :4] == 191).all()
    assert (sheet[16:20, :4] == 0).all()
    assert (sheet[16:, 6:10] == 255).all()  # the second row holds one image alone


# -- outputs and names ----------------------------------------------------------------------------


def folder_of(path: Path) -> dict[bytes, bytes]:
    return {os.fsencode(file.name): file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def reconstruct(image_tokenizer, tmp_path):
    """reconstruct(images, more arguments): into ``tmp_path / "out"`` where nothing else is said."""

    def call(images: list[Path], *more: str) -> None:
        common = ["--checkpoint", str(image_tokenizer), "--out", str(tmp_path / "out")]
        entry.main(["reconstruct", *map(str, images), *common, *more])

    return call


def test_pictures_of_one_name_get_names_of_their_own(reconstruct, images, tmp_path):
    given = []
    for number, name in enumerate(("a/x.png", "b/x.png", "c/X.PNG", "d/x.jpg", "e/é.png")):
        path = tmp_path / name
        path.parent.mkdir()
        shutil.copy(images / f"picture{number % 3}.png", path)
        given.append(path)
    (tmp_path / "f").mkdir()
    given.append(tmp_path / "f" / "e\u0301.png")
    given[-1].symlink_to(given[0])
    reconstruct([*given, given[0]])
    made = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert made == {"x.png", "x~2.png", "X~3.png", "x~4.png", "é.png", "e\u0301~2.png", "x~5.png"}
    for name in made:
        with safe_open(tmp_path / "out" / f"{name[:-4]}.safetensors", framework="pt") as file:
            source = json.loads(file.metadata()["image"])
        assert Path(source).stem == name[:-4].partition("~")[0]
        with Image.open(source) as image:
            above = np.array(image_files.to_square(image.convert("RGB"), 32))
        sheet = np.array(Image.open(tmp_path / "out" / name))
        assert np.array_equal(sheet[: 8 * 32 : 8, : 8 * 32 : 8], above)


def test_no_file_is_written_over(reconstruct, images, tmp_path, monkeypatch):
    own, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(images, own)
    photo = own / "picture0.png"
    before = folder_of(own)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_tokenizer", lambda *_: pytest.fail("a model was read"))
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match=r"picture0\.png is one of the inputs"):
                reconstruct([photo], "--out", str(own), *more)
        out.mkdir()
        for make in (
            lambda: (out / "picture0.png").symlink_to(photo),
            lambda: os.link(photo, out / "picture0.png"),
            lambda: (out / "picture0.png").symlink_to("nowhere"),
            lambda: (out / "picture0.safetensors").write_bytes(b"somebody's"),
            lambda: os.mkfifo(out / "picture0.png"),
        ):
            make()
            there = set(os.listdir(out))
            with pytest.raises(SystemExit, match=r"picture0\.\w+ is (one|there already)"):
                reconstruct([photo])
            assert set(os.listdir(out)) == there
            for name in there:
                (out / name).unlink()
        assert folder_of(own) == before
    reconstruct([photo])
    first = folder_of(out)
    with pytest.raises(SystemExit, match="is there already"):
        reconstruct([own / "picture1.png", photo])
    assert folder_of(out) == first
    reconstruct([photo], "--overwrite")
    assert folder_of(own) == before


def test_a_broken_picture_among_others_is_named_before_the_first_is_written(
    reconstruct, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda *_: pytest.fail("a model was read"))
    (tmp_path / "broken.png").write_bytes((images / "picture0.png").read_bytes()[:200])
    with pytest.raises(SystemExit, match=r"cannot read the image .*broken\.png"):
        reconstruct([images / "picture0.png", tmp_path / "broken.png"])
    assert not (tmp_path / "out").exists()


def test_pictures_of_any_name(reconstruct, images, tmp_path, capsys):
    long, odd = b"x" * 251, b"caf\xe9\n\x1b[31m"
    for raw in (long, odd):
        shutil.copy(images / "picture0.png", os.fsencode(tmp_path) + b"/" + raw + b".png")
    reconstruct([tmp_path / os.fsdecode(raw + b".png") for raw in (long, odd)])
    said = capsys.readouterr().out
    assert said.count("\n") == 2
    assert "caf\\xe9\\n\\x1b[31m.png: 21 tokens" in said
    found = {path.stem: path for path in (tmp_path / "out").glob("*.safetensors")}
    assert {os.fsencode(stem) for stem in found} == {b"x" * 243, odd}
    content = found[os.fsdecode(odd)].read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert os.fsencode(json.loads(metadata["image"])).endswith(b"/" + odd + b".png")


def test_one_picture_has_one_psnr(image_tokenizer, images, tmp_path, capsys):
    """What reconstruct prints is what evaluate measures."""
    common = ["--checkpoint", str(image_tokenizer), "--device", "cpu"]
    paths = sorted(images.glob("*.png"))
    entry.main(["reconstruct", *map(str, paths), *common, "--out", str(tmp_path / "a")])
    printed = re.findall(r"([\d.]+) dB", capsys.readouterr().out)
    entry.main(["evaluate", "--data", str(images), *common, "--out", str(tmp_path / "b")])
    rows = [json.loads(line) for line in (tmp_path / "b" / "images.jsonl").read_text().splitlines()]
    assert [f"{row['psnr']:.2f}" for row in rows] == printed


def test_a_reconstruction_that_is_not_finite(reconstruct, images, tmp_path, monkeypatch):
    def broken(self, tokens):
        return torch.full((1, 3, 32, 32), torch.nan), None

    monkeypatch.setattr(TokenFlowTokenizer, "decode", broken)
    with pytest.raises(SystemExit, match=r"picture0\.png is not finite"):
        reconstruct([images / "picture0.png"])
    assert not (tmp_path / "out").exists()


# -- before the start, and ends -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["reconstruct", "tokenize", "evaluate", "analyse"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "nonsense"], "device 'nonsense' is none of"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--out", "FILE"], "cannot write into .*file"),
        (["--out", "FILE/below"], "cannot write into .*file"),
        (["--out", "PIPE"], "cannot write into .*pipe"),
        (["--out", "/proc/nowhere/below"], "cannot write into /proc/nowhere"),
        (["--checkpoint", "nowhere"], "nothing at nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    image_tokenizer, images, tmp_path, monkeypatch, command, more, message
):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    given = [
        word.replace("FILE", str(tmp_path / "file")).replace("PIPE", str(tmp_path / "pipe"))
        for word in more
    ]
    what = {"reconstruct": [str(images / "picture0.png")], "tokenize": [str(images)]}
    words = [command, *what.get(command, ["--data", str(images)]), "--device", "cpu"]
    words += ["--checkpoint", str(image_tokenizer), "--out", str(tmp_path / "out"), *given]
    if command == "analyse" and "--checkpoint" in more:
        words.remove("--checkpoint")
        words.remove(str(image_tokenizer))
    monkeypatch.setattr(TokenFlowTokenizer, "from_pretrained", lambda *_: pytest.fail("read"))
    with pytest.raises(SystemExit, match=message) as raised:
        entry.main(words)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenize", ".", "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["tokenize", ".", "--shard-size", "-1"], "--shard-size must be 1 or more, got -1"),
        (["tokenize", "nowhere"], "no folder at nowhere"),
        (["reconstruct", "."], r"cannot read \.: a folder"),
        (["reconstruct", "PIPE"], "pipe"),
        (["reconstruct", "a\0b"], "cannot read a"),
        (["tokenize", ".", "--batch-size", str(2**40)], "--batch-size must be 2147483647 or less"),
        (["tokenize", ".", "--out", ""], "--out names no folder"),
        (["tokenize", ".", "--out", "a\0b"], "cannot write into a"),
        (["reconstruct", "a\udce9.png"], r"cannot read a\\xe9\.png: No such file"),
        (["evaluate", "--data", ".", "--pictures", "-1"], "--pictures must be 0 or more"),
    ],
)
def test_wrong_options_and_files(image_tokenizer, tmp_path, words, message):
    os.mkfifo(tmp_path / "pipe")
    given = [str(tmp_path / "pipe") if word == "PIPE" else word for word in words]
    common = ["--checkpoint", str(image_tokenizer), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message) as raised:
        entry.main([given[0], *common, *given[1:]])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["nonsense"], ["reconstruct", "--nonsense"], ["fid", "a"], []])
def test_unknown_words_are_named_by_argparse(words, capsys):
    with pytest.raises(SystemExit) as raised:
        entry.main(words)
    assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reconstruct", "tokenize", "evaluate", "analyse"])
def test_a_full_disk_is_named_and_nothing_looks_finished(
    image_tokenizer, images, tmp_path, monkeypatch, command
):
    what = {"reconstruct": [str(images / "picture0.png")], "tokenize": [str(images)]}
    words = [command, *what.get(command, ["--data", str(images)])]
    out = tmp_path / "out"
    common = ["--checkpoint", str(image_tokenizer), "--device", "cpu", "--out", str(out)]
    write = Path.write_bytes
    for room in (0, 1):  # the disk is full at once, or after a file

        def full(self, content, left=[room]):  # noqa: B006
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return write(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(SystemExit, match=f"error: cannot write {out}/.*: No space left"):
                entry.main([*words, *common])
        left = sorted(os.listdir(out)) if out.exists() else []
        # Tokens are gone on with.
        begun = ["tokens-00000.safetensors", "unfinished.json"]
        assert left == (begun if command == "tokenize" and room else [])
    entry.main([*words, *common])


def test_an_unknown_instruction_set_is_one_line(monkeypatch):
    def refuse():
        raise InstructionSetError("TOKENFLOW_CPU must be one of portable, avx2, got avx3")

    monkeypatch.setattr(messages, "build_info", refuse)
    with pytest.raises(SystemExit, match="error: TOKENFLOW_CPU must be one of"):
        entry.main(["fid", "here", "there"])


def test_a_python_without_build_facts_runs_commands(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenflow_ext._build_info", None)
    with pytest.raises(SystemExit, match="error: no folder at here"):
        entry.main(["fid", "here", "there"])


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for name in [name for name in sys.modules if name.startswith("tokenflow_ext.train")]:
        monkeypatch.delitem(sys.modules, name)
    entry = importlib.import_module("tokenflow_ext.train.cli.entry")
    with pytest.raises(SystemExit, match=r"error: tqdm is not installed: pip install 'tokenflow"):
        entry.main()
