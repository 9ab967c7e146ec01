"""The comparison of one model with two: rows, their figures, what is kept."""

from __future__ import annotations

import json
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import unified
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.evaluation import judge

UNSEEN = "a red circle"


@pytest.fixture(autouse=True)
def short_training_of_the_judge(monkeypatch):
    """What it says is not looked at."""
    monkeypatch.setattr(judge, "_LEAST", 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures, captions and questions in easy-VQA's form, and an untrained image tokenizer."""
    root = tmp_path_factory.mktemp("data")
    colours = {"red": (255, 0, 0), "teal": (0, 128, 128)}
    y, x = np.mgrid[0:64, 0:64] - 32
    for split in ("train", "test"):
        (root / split).mkdir()
        captions, entries = [], []
        for colour, value in colours.items():
            for shape in ("circle", "rectangle"):
                inside = x * x + y * y < 300 if shape == "circle" else (abs(x) < 20) & (abs(y) < 9)
                pixels = np.full((64, 64, 3), 240, np.uint8)
                pixels[inside] = value
                name, caption = f"{colour}_{shape}.png", f"a {colour} {shape}"
                Image.fromarray(pixels).save(root / split / name)
                captions.append(json.dumps({"file_name": name, "text": caption}))
                for kind, answer in (("colour", colour), ("shape", shape)):
                    turns = [("human", f"<image>\nwhat {kind}?"), ("gpt", answer)]
                    said = [{"from": role, "value": text} for role, text in turns]
                    entries.append(
                        {"image": f"{split}/{name}", "caption": caption, "kind": kind,
                         "conversations": said}
                    )  # fmt: skip
        (root / split / "metadata.jsonl").write_text("\n".join(captions))
        (root / f"{split}.json").write_text(json.dumps(entries))
    given = ["model.semantic.tower.kind=none", "model.teacher.kind=none"]
    torch.manual_seed(0)
    config = load_config(unified.machine.ROOT / "train/configs/easy_vqa_tokenizer.yaml", given)
    TokenFlowTokenizer(config.model).save_pretrained(root / "tokenizer")
    return root


def command(data, out, *more):
    unified.main(
        ["--out", str(out), "--real", str(data), "--each", "1", f"tokenizer={data / 'tokenizer'}",
         f"data.path={data / 'train.json'}", f"data.held_out={data / 'test.json'}",
         "data.tokens=null", "data.held_out_tokens=null", f"drawing.path={data / 'train'}",
         f"drawing.unseen={UNSEEN}", "optim.steps=2", "optim.batch=4", "data.evaluated=2",
         "output.pictures=1", "model.backbone.hidden_size=16", "model.backbone.num_hidden_layers=1",
         "model.backbone.intermediate_size=16", "model.backbone.num_attention_heads=2", *more]
    )  # fmt: skip


def test_the_table_is_of_the_runs(data, tmp_path, capsys):
    command(data, tmp_path, "--rows", "answering", "drawing", "--seeds", "2")
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["row"], row["seed"]) for row in found["rows"]] == [
        ("answering", 0), ("drawing", 0), ("answering", 1), ("drawing", 1),
    ]  # fmt: skip
    answering, drawing = found["rows"][:2]
    assert "drawings" not in answering
    assert "right" not in drawing
    assert answering["floor"]["all"] == 0.5
    counts = {name: group["drawings"] for name, group in drawing["drawings"].items()}
    assert counts == {"captions of training": 3, "captions held out": 1}
    assert drawing["judge"]["pictures"] == 4
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    values = [100 * row["right"]["all"] for row in found["rows"] if "right" in row]
    cell = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert re.search(rf"\| a model that answers +\| {re.escape(cell)} ", table)
    # What is there is kept.
    result = tmp_path / "drawing_0" / "result.json"
    before = result.stat().st_mtime_ns
    command(data, tmp_path, "--rows", "drawing")
    assert result.stat().st_mtime_ns == before


def test_the_joint_row_has_both(data, tmp_path):
    command(data, tmp_path, "--rows", "both")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"right", "floor", "drawings", "judge"} <= row.keys()
    assert "answers as the judge" in row["drawings"]["captions held out"]


def test_rows_differ_in_their_ways_alone(tmp_path):
    configs = {row: unified.configuration(row, 3, tmp_path, ()) for row in unified.ROWS}
    assert configs["both"].ways == ("answering", "drawing")
    for row, config in configs.items():
        config.ways = config.run = None
        assert config.seed == 3
        assert config == configs["both"], row


def test_bad_settings(tmp_path):
    for nothing in (["--seeds", "0"], ["--each", "0"], ["--rows"]):
        with pytest.raises(SystemExit):
            unified.main(nothing)
    with pytest.raises(SystemExit, match=r"error: .*optim"):
        unified.main(["--out", str(tmp_path / "o"), "optim.none=1"])
