"""Tokens in half precision: what is counted."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import image_tokenizer
from understanding_models import picture, pixels

from benchmarks import half_precision


def test_shares_are_of_the_tokens(tmp_path, capsys):
    tokenizer = image_tokenizer().eval()
    images = pixels(6)
    found = dict(half_precision.shares(tokenizer, images.split(4)))
    assert found.keys() == {"bfloat16", "float16"}
    exact = tokenizer.encode(images)
    for name, differs in found.items():
        rounded = copy.deepcopy(tokenizer).to(getattr(torch, name))
        with torch.no_grad():
            tokens = rounded.encode(images.to(getattr(torch, name)))
        assert differs.equal(tokens != exact)
    assert found["bfloat16"].sum() > found["float16"].sum()

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    half_precision.main(["--checkpoint", str(tmp_path / "tokenizer"), "--data", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 images")
    assert [line.split()[0] for line in lines[1:]] == ["bfloat16", "float16"]
    assert len(lines[1].split()) == 2 + 4
    with pytest.raises(SystemExit, match="error: "):
        half_precision.main(["--checkpoint", str(tmp_path / "none"), "--data", str(folder)])
