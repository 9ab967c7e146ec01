"""Folders of tokens: broken off, repeated, of other tokenizers, and damaged by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.cli.commands import tokenize as command
from tokenflow_ext.train.data import captions, tokens
from tokenflow_ext.train.data.outputs import OutputError
from tokenflow_ext.train.data.text_files import DataError

SCALES = [(1, 1), (2, 2), (4, 4)]


@pytest.fixture
def folder(micro, tmp_path) -> Path:
    """Five pictures, three of them with a caption."""
    root = micro.draw_images(tmp_path / "pictures", count=5)
    for i in range(3):
        (root / f"picture{i}.txt").write_text(f"number {i}")
    return root


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def tokenize(folder, image_tokenizer, out):
    """tokenize(): two images a shard, one at a time; other arguments of ``cli.tokenize``."""

    def run(source: Path = image_tokenizer, **options) -> Path:
        return command.tokenize(
            str(folder), str(source), str(out), **{"shard_size": 2, "batch_size": 1} | options
        )

    return run


def contents(folder: Path) -> dict[str, object]:
    """What is in each file; of tokens without the order of their metadata, which is not fixed."""
    return {
        path.name: load_file(path)["tokens"].tolist()
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in folder.iterdir()
    }


def stop_after(monkeypatch, calls: int, error: BaseException) -> None:
    """The tokenizer fails after so many batches, as a kill would end the command."""
    encode, done = TokenFlowTokenizer.encode, []

    def limited(self, images):
        if len(done) == calls:
            raise error
        done.append(True)
        return encode(self, images)

    monkeypatch.setattr(TokenFlowTokenizer, "encode", limited)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_a_run_that_was_broken_off_is_gone_on_with(tokenize, out, tmp_path, monkeypatch, calls):
    tokenize()
    expected = contents(out)
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        stop_after(patch, calls, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tokenize()
    assert not (out / "index.json").exists()
    if calls >= 2:  # a shard is there, but nobody reads it
        with pytest.raises(DataError, match=f"{out} are not finished"):
            captions.Tokens(out, SCALES, 64)
        form = captions.Form(32, SCALES, 64)
        with pytest.raises(DataError, match="not finished"):
            captions.open_source(out, form, captions.CaptionConfig(), 1, 0)
        (out / f".{'0' * 16}.part").write_bytes(b"left by the kill")
    with monkeypatch.context() as patch:
        stop_after(patch, 5 - calls // 2 * 2, AssertionError("encoded anew"))
        tokenize()
    assert contents(out) == expected


def test_the_same_run_again_has_nothing_to_do(tokenize, out, capsys):
    tokenize()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    tokenize(batch_size=4)
    assert "are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["tokens-00001.safetensors", "tokens-00001.json"])
def test_a_finished_folder_that_lost_a_file_is_not_called_whole(tokenize, out, name):
    tokenize()
    (out / name).unlink()
    with pytest.raises(DataError, match=name):
        tokenize()
    with pytest.raises(DataError, match=name):
        captions.Tokens(out, SCALES, 64)


@pytest.mark.parametrize("finished", [True, False])
def test_other_tokens_are_not_mixed_in(
    tokenize, folder, out, image_tokenizer, tmp_path, monkeypatch, finished
):
    if finished:
        tokenize()
    else:
        with monkeypatch.context() as patch:
            stop_after(patch, 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                tokenize()
    before = contents(out)
    torch.manual_seed(1)
    model = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    with torch.no_grad():
        model.quantizer.codebooks[0].neg_()
    other = model.save_pretrained(tmp_path / "other")
    with pytest.raises(OutputError, match="of another tokenizer"):
        tokenize(other)
    with pytest.raises(OutputError, match="shards of another size"):
        tokenize(shard_size=3)
    (folder / "picture3.txt").write_text("a caption")
    with pytest.raises(OutputError, match="other pictures or captions"):
        tokenize()
    (folder / "picture3.txt").unlink()
    (folder / "picture4.png").unlink()
    with pytest.raises(OutputError, match="other pictures or captions"):
        tokenize()
    assert contents(out) == before


def test_a_decoder_trained_further_leaves_the_tokens_what_they_are(
    tokenize, out, image_tokenizer, tmp_path
):
    tokenize()
    model = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    with torch.no_grad():
        model.decoder.last_layer.neg_()
    tokenize(model.save_pretrained(tmp_path / "decoder"))
    assert len(captions.Tokens(out, SCALES, 64, tokenizer=lambda: tokens.fingerprint(model))) == 3
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with pytest.raises(DataError, match="holds tokens of another tokenizer"):
        captions.Tokens(out, SCALES, 64, tokenizer=lambda: tokens.fingerprint(model))


def test_two_at_once_do_not_write_into_one_folder(tokenize, out, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tokenize()
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True)"
    code += "; input()"
    other = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(out / "unfinished.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    with pytest.raises(OutputError, match="another process writes"):
        tokenize()
    other.communicate(b"\n")
    tokenize()


def test_a_folder_of_other_things_is_left_alone(tokenize, out, folder, image_tokenizer, tmp_path):
    out.mkdir()
    tokenize()  # an empty one will do
    for name, content in (("notes.txt", "mine"), ("index.json", "{}"), ("index.json", "[")):
        other = tmp_path / "other"
        other.mkdir()
        (other / name).write_text(content)
        with pytest.raises(OutputError, match="name another"):
            command.tokenize(str(folder), str(image_tokenizer), str(other))
        assert contents(other) == {name: content.encode()}
        shutil.rmtree(other)
    with pytest.raises(OutputError, match="holds other things, such as "):
        command.tokenize(str(folder), str(image_tokenizer), str(folder))
    (tmp_path / "mine").write_text("mine")
    other.mkdir()
    (other / "unfinished.json").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=r"cannot write .*unfinished\.json"):
        command.tokenize(str(folder), str(image_tokenizer), str(other))
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_that_can_be_read_blocks_nothing(tokenize, folder, out, micro):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no image below"):
        tokenize()
    micro.draw_images(folder, count=5)
    tokenize()


def test_any_name_of_a_file(tokenize, folder, out):
    """A listing is JSON, and gives the bytes of a name back."""
    raw = b'caf\xe9 \n\xff".png'
    os.rename(folder / "picture0.png", os.fsencode(folder) + b"/" + raw)
    (folder / os.fsdecode(b"bro\xfeken.png")).write_bytes(b"no image")
    index = json.loads(tokenize().read_bytes().decode("utf-8"))
    rows = [json.loads((out / shard["rows"]).read_bytes()) for shard in index["shards"]]
    names = {os.fsencode(row["image"]) for part in rows for row in part}
    assert names == {raw, *(b"picture%d.png" % i for i in range(1, 5))}
    assert [os.fsencode(name) for name in index["skipped"]] == [b"bro\xfeken.png"]


# -- damaged by hand ------------------------------------------------------------------------------


@pytest.fixture
def written(tokenize, out) -> Path:
    tokenize()
    return out


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("scales"), "scales must be"),
        (lambda i: i.update(scales=[[1, 1], [2, 2**40]]), "the tokenizer has"),
        (lambda i: i.update(scales=[[1, "1"]]), "scales must be a list of pairs"),
        (lambda i: i.update(codebook_size=10**9), "1000000000 codes"),
        (lambda i: i.update(codebook_size=64.0), "codebook_size must be a number"),
        (lambda i: i.update(version=2), "has version 2; this release reads version 1"),
        (lambda i: i.pop("version"), "has version None"),
        (lambda i: i.update(shards=[]), "shards must be a list"),
        (lambda i: i.update(shards={}), "shards must be a list"),
        (lambda i: i["shards"][0].pop("rows"), "shards must be a list"),
        (lambda i: i["shards"][0].update(count=2**40), r"holds tokens \[2, 21\]"),
        (lambda i: i["shards"][0].update(count=True), "shards must be a list"),
        (lambda i: i["shards"][0].update(tokens="../elsewhere"), "files in this folder"),
        (lambda i: i["shards"][0].update(rows="/etc/passwd"), "files in this folder"),
        (lambda i: i["shards"][0].update(tokens="."), "files in this folder"),
        (lambda i: i["shards"][0].update(tokens="a\0b"), "files in this folder"),
        (lambda i: i["shards"][0].update(tokens="gone"), "gone"),
        (lambda i: i["shards"].append(i["shards"][0]), "twice"),
        (lambda i: i.update(tokenizer=None), "tokenizer must be"),
        (lambda i: i.update(tokenizer_sha256=5), "tokenizer_sha256 must be"),
    ],
)
def test_a_damaged_index_is_named(written, change, message):
    edit(written / "index.json", change)
    with pytest.raises(DataError, match=message) as raised:
        captions.Tokens(written, SCALES, 64)
    assert str(written) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{", b"[" * 100_000, b"caf\xe9"])
def test_an_index_that_is_none(written, content):
    (written / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(written / "index.json"))):
        captions.Tokens(written, SCALES, 64)


@pytest.mark.parametrize(
    "rows",
    [{}, [{}], [1, 2], [{"image": "a"}, {"image": "b"}], [{"caption": 1}, {"caption": None}]],
)
def test_damaged_rows_are_named(written, rows):
    (written / "tokens-00000.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"tokens-00000\.json"):
        captions.Tokens(written, SCALES, 64)


def test_damaged_tokens_are_named(written):
    file = written / "tokens-00000.safetensors"
    good = load_file(file)["tokens"]
    for bad, message in (
        (good.float(), "whole numbers"),
        (good[:1], r"holds tokens \[1, 21\]"),
        (good[:, :-1].contiguous(), r"holds tokens \[2, 20\]"),
        (good.flatten(), "whole numbers"),
        (good - 1000, "tokens from -"),
        (good + 64, "tokens from"),
    ):
        save_file({"tokens": bad}, file)
        with pytest.raises(DataError, match=message) as raised:
            captions.Tokens(written, SCALES, 64)
        assert str(file) in str(raised.value)
    save_file({"other": good}, file)
    with pytest.raises(DataError, match="cannot read the tokens"):
        captions.Tokens(written, SCALES, 64)
    header = json.dumps({"tokens": {"dtype": "I32", "shape": [2**40, 21], "data_offsets": [0, 8]}})
    file.write_bytes(np.uint64(len(header)).tobytes() + header.encode() + b"\0" * 8)
    with pytest.raises(DataError, match="cannot read the tokens"):
        captions.Tokens(written, SCALES, 64)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="pipe"):
        captions.Tokens(written, SCALES, 64)


def test_folders_of_before_the_tokenizer_was_named_are_read(written):
    edit(written / "index.json", lambda index: index.pop("tokenizer_sha256"))
    assert len(captions.Tokens(written, SCALES, 64, tokenizer=lambda: pytest.fail("asked"))) == 3
