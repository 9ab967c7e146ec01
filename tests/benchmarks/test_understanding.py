"""The comparison of what a language model reads: rows, their figures, what is kept."""

from __future__ import annotations

import io
import json
import statistics
import zipfile

import pytest
from PIL import Image, ImageDraw

from benchmarks import understanding
from tokenflow_ext.models import TokenizerConfig
from tokenflow_ext.train.config import load_config, load_understanding_config
from tokenflow_ext.train.data import easy_vqa

COLOURS = ("red", "teal", "blue")


def draw(colour: str, shape: str) -> bytes:
    image, file = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((16, 16, 48, 48), fill=colour)
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with data in the form of easy-VQA's."""
    folder = tmp_path_factory.mktemp("compared")
    wheel = folder / "data.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split in easy_vqa.SPLITS:
            questions, number = [], 0
            for colour in COLOURS:
                for shape in ("circle", "rectangle"):
                    questions += [
                        ["what color is it?", colour, number],
                        ["what shape is it?", shape, number],
                        ["is it red?", "yes" if colour == "red" else "no", number],
                    ]
                    place = f"easy_vqa/data/{split}/images/{number}.png"
                    archive.writestr(place, draw(colour, shape))
                    number += 1
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(questions))
    easy_vqa.unpack(wheel, folder / "easy-vqa")
    return folder


def command(out, *more):
    understanding.main(
        ["--rows", "pixel_alone", "--seeds", "2", "--steps", "2", "--tokenizer-steps", "1",
         "--out", str(out), "optim.batch=4", "data.evaluated=2", "output.pictures=1",
         "model.backbone.hidden_size=16", "model.backbone.num_attention_heads=2", *more]
    )  # fmt: skip


def test_a_table_of_every_seed(out, capsys, monkeypatch):
    monkeypatch.setattr(understanding, "TOKENIZERS", {
        "pixel": (*understanding.TOKENIZERS["pixel"], "codebook.kmeans_batches=0",
                  "data.held_out_crops=2", "optim.batch=2"),
    })  # fmt: skip
    command(out)
    found = json.loads((out / "results.json").read_text())
    assert [(row["row"], row["seed"]) for row in found["rows"]] == [
        ("pixel_alone", 0), ("pixel_alone", 1),
    ]  # fmt: skip
    floor = found["rows"][0]["floor"]
    assert floor == {
        "all": pytest.approx(9 / 18),  # 2 of 6 colours, 3 of 6 shapes, 4 of 6 yes or no
        "colour": pytest.approx(1 / 3),
        "shape": 0.5,
        "yes/no": pytest.approx(2 / 3),
    }
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    values = [100 * row["right"]["all"] for row in found["rows"]]
    cell = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert f"| pixel codebook alone | {cell}" in table
    assert "| without looking      | 50.0 " in table
    run = load_understanding_config(out / "pixel_last_0" / "config.yaml")
    assert run.data.tokens == run.data.held_out_tokens == str(out / "tokens_pixel")
    # What is there is kept.
    result = out / "pixel_last_0" / "result.json"
    before = result.stat().st_mtime_ns
    command(out)
    assert result.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", understanding.TOKENIZERS)
def test_tokenizers_differ_in_their_branches_alone(name, tmp_path):
    config = load_config(
        understanding.CONFIGS / "easy_vqa_tokenizer.yaml", list(understanding.TOKENIZERS[name])
    ).model
    joint = load_config(understanding.CONFIGS / "easy_vqa_tokenizer.yaml", []).model
    branches = {"joint": ("semantic", "pixel"), "semantic": ("semantic",), "pixel": ("pixel",)}
    assert config.branches == branches[name]
    assert config.quantizer == joint.quantizer
    assert (config.grid, config.image_size) == (joint.grid, joint.image_size)
    assert isinstance(config, TokenizerConfig)


def test_every_row_has_its_own_run_but_the_repeated_one():
    runs = [(row.tokenizer, row.features) for row in understanding.ROWS.values()]
    assert len(set(runs)) == len(runs) - 1
    assert {row.tokenizer for row in understanding.ROWS.values()} == set(understanding.TOKENIZERS)


def test_bad_settings(tmp_path):
    for nothing in (["--seeds", "0"], ["--questions", "0"], ["--rows"]):
        with pytest.raises(SystemExit):
            understanding.main(nothing)
    with pytest.raises(SystemExit, match=r"error: .*optim"):
        understanding.main(["--out", str(tmp_path / "o"), "optim.none=1"])
