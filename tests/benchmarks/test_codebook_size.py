"""The comparison of codebook sizes: its rows, what is kept, its plot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from weights import needs_lite0

from benchmarks import codebook_size
from tokenflow_ext.train.data import easy_vqa
from tokenflow_ext.train.evaluation import judge


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Pictures with captions in easy-VQA's form; nothing is fetched."""
    colours = {"red": (255, 0, 0), "teal": (0, 128, 128)}
    y, x = np.mgrid[0:64, 0:64] - 32
    for split in ("train", "test"):
        folder = tmp_path / "easy-vqa" / split
        folder.mkdir(parents=True)
        captions = []
        for colour, value in colours.items():
            for shape in ("circle", "rectangle"):
                inside = x * x + y * y < 300 if shape == "circle" else (abs(x) < 20) & (abs(y) < 9)
                pixels = np.full((64, 64, 3), 240, np.uint8)
                pixels[inside] = value
                for i in range(2):
                    name = f"{colour}_{shape}_{i}.png"
                    Image.fromarray(pixels - i).save(folder / name)
                    captions.append(json.dumps({"file_name": name, "text": f"a {colour} {shape}"}))
        (folder / "metadata.jsonl").write_text("\n".join(captions))
    monkeypatch.setattr(easy_vqa, "fetch", lambda folder: folder)
    monkeypatch.setattr(judge, "_LEAST", 12)  # what it says is not looked at
    return tmp_path


def command(out, *more):
    codebook_size.main(
        ["--sizes", "64", "128", "--steps", "2", "--tokenizer-steps", "1", "--each", "2",
         "--out", str(out), "optim.batch=4", "data.evaluated=2", "output.pictures=1",
         "model.width=32", "model.heads=2", "model.depth=1", *more]
    )  # fmt: skip


@needs_lite0
@pytest.mark.once
def test_a_table_and_a_plot(out, capsys):
    command(out)
    found = json.loads((out / "results.json").read_text())["rows"]
    assert [row["codes"] for row in found] == [64, 128]
    for row in found:
        assert row["drawings"] == 8
        assert 0 < row["usage"] <= 1
        assert 0 <= row["class"] <= 1
        with np.load(out / f"var_{row['codes']}" / "drawn.npz") as drawn:
            assert drawn["arr_0"].shape == (8, 64, 64, 3)
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| 64    | {found[0]['usage']:.1%}" in table
    with Image.open(out / "codebook_size.png") as image:
        assert image.width > image.height
    result = out / "var_128" / "result.json"
    before = result.stat().st_mtime_ns
    command(out)
    assert result.stat().st_mtime_ns == before


def test_bad_settings(tmp_path):
    for nothing in (["--sizes", "0"], ["--each", "0"]):
        with pytest.raises(SystemExit):
            codebook_size.main(nothing)
    with pytest.raises(SystemExit, match=r"error: .*optim"):
        codebook_size.main(["--out", str(tmp_path / "o"), "optim.none=1"])
