"""``tokenflow analyse``: clusters whose answer is known, files, processes, messages."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import types
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train import data
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.data.outputs import OutputError
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.evaluation import analyse, cluster_pictures, clusters, preprocess
from tokenflow_ext.train.evaluation.clusters import Clusters

ALONE = Processes(0, 1, torch.device("cpu"))
SIZE = 16

# Each picture by the side that its red, and its green, leans to; and how many there are of it.
PICTURES = {(0, 0): 3, (0, 1): 2, (1, 0): 1, (1, 1): 1}
# Codes 0 to 3 point to (red, green) like this, code 4 away from all, code 5 is code 0 again.
CODES = [(0, 0), (0, 1), (1, 0), (1, 1), (None, None), (0, 0)]


class ByColour:
    """A tokenizer whose semantic features are a picture's red and whose pixel features its green,
    each as a point on the unit circle, codes placed by hand."""

    def __init__(self, semantic_weight: float = 1.0) -> None:
        self.config = types.SimpleNamespace(branches=("semantic", "pixel"), image_size=SIZE)
        weights = (semantic_weight, 1.0)
        self.quantizer = MultiScaleQuantizer(len(CODES), (2, 2), (4,), weights=weights)
        circle = {0: (1.0, 0.0), 1: (0.0, 1.0), None: (-1.0, 0.0)}
        with torch.no_grad():
            for group, codebook in enumerate(self.quantizer.codebooks):
                codebook.copy_(torch.tensor([circle[code[group]] for code in CODES]))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        share = (images[:, :2].mean(dim=(2, 3)) + 1) / 2
        h = torch.stack([1 - share, share], dim=2).flatten(1)[..., None, None]
        # What differs over the grid is gone in the mean, and would mislead anything else.
        return h + torch.tensor([[5.0, -5.0], [-5.0, 5.0]])


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    """A folder of the pictures above."""
    folder = tmp_path_factory.mktemp("coloured")
    for (red, green), count in PICTURES.items():
        for i in range(count):
            pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = 40 + 180 * red, 30 + 180 * green + i
            Image.fromarray(pixels).save(folder / f"{red}{green}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def found(coloured) -> dict[str, Clusters]:
    images = preprocess.CenterCropDataset(sorted(coloured.glob("*.png")), SIZE)
    codes, _ = clusters.assign(ByColour(), images, clusters.CODEBOOKS, ALONE, batch=3)
    pairs = zip(clusters.CODEBOOKS, codes, strict=True)
    return {by: Clusters("by-hand", by, len(CODES), row) for by, row in pairs}


def test_codes_placed_by_hand(found):
    """Sorted paths: 00 x 3, 01 x 2, 10, 11. Alone, a codebook takes the first code that fits."""
    assert found["joint"].assigned.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert found["semantic"].assigned.tolist() == [0, 0, 0, 0, 0, 2, 2]
    assert found["pixel"].assigned.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert found["joint"].largest_first() == [(0, 3), (1, 2), (2, 1), (3, 1)]
    assert found["semantic"].largest_first() == [(0, 5), (2, 2)]
    assert found["pixel"].counts.tolist() == [4, 3, 0, 0, 0, 0]
    assert found["pixel"].members(1, 10) == [3, 4, 6]
    assert found["pixel"].members(0, 2) == [0, 2]


def test_weights_decide_the_joint_codebook_alone():
    """Red says code 4, half way between green's: with red's weight at 0 only green counts."""
    h = torch.tensor([-1.0, 0.0, 0.1, 0.9]).view(1, 4, 1, 1)
    assert clusters.nearest(ByColour(4.0), h, "joint").item() == 4
    assert clusters.nearest(ByColour(0.0), h, "joint").item() == 1
    assert clusters.nearest(ByColour(0.0), h, "semantic").item() == 4


def test_facts_of_the_clusters(found):
    facts = analyse._facts(found["semantic"])
    assert (facts["codes_filled"], facts["filled"]) == (2, pytest.approx(2 / 6))
    expected = np.exp(-(5 / 7) * np.log(5 / 7) - (2 / 7) * np.log(2 / 7))
    assert facts["perplexity"] == pytest.approx(expected)


def test_the_plot_has_the_sorted_sizes(found):
    (axis,) = cluster_pictures.plot(list(found.values())).axes
    assert axis.get_yscale() == "log"
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {
        "by-hand, joint: 66.7% of 6": [[1, 3], [2, 2], [3, 1], [4, 1]],
        "by-hand, semantic: 33.3% of 6": [[1, 5], [2, 2]],
        "by-hand, pixel: 33.3% of 6": [[1, 4], [2, 3]],
    }


def test_a_sheet_shows_the_clusters_in_rows():
    dark, light = np.full((32, 32, 3), 10, np.uint8), np.full((32, 32, 3), 200, np.uint8)
    sheet = cluster_pictures.cluster_sheet([("a", [dark, light]), ("bb", [light])], columns=3)
    assert sheet.shape[0] == 2 * (64 + 4)  # enlarged to 64
    left = sheet.shape[1] - 3 * 64
    first, second = sheet[2 + 32, left + 32 :: 64, 0], sheet[68 + 2 + 32, left + 32 :: 64, 0]
    assert first.tolist() == [10, 200, 255]
    assert second.tolist() == [200, 255, 255]
    assert (sheet[:, :left] < 128).any()  # the names


def test_photographs_are_cut_into_squares():
    images = preprocess.PhotographCrops(SIZE)
    assert len(images) == 3225  # as docs/guides/analysis.md says
    sides = {"astronaut": 64, "coffee": 50, "rocket": 53, "chelsea": 37, "moon": 64}  # an eighth
    paths = {path.stem: path for path in data.photographs()}
    few = preprocess.PhotographCrops(SIZE, limit=7)
    assert len(few) == 7
    checked = 0
    for index, name in enumerate(few.paths):
        stem, place = str(name).split()
        if stem in sides:
            x, y = map(int, place.split(","))
            whole = np.array(Image.open(paths[stem]).convert("RGB"))
            expected = whole[y : y + sides[stem], x : x + sides[stem]]
            assert np.array_equal(np.array(few.open(index)), expected)
            checked += 1
    assert checked >= 2
    assert few[3][1].shape == (3, SIZE, SIZE)


def test_names_of_checkpoints():
    sources = ["runs/a", "runs/b/checkpoints/step_00000003", "other/a", "runs/a/"]
    assert analyse.names_of(sources) == ["a", "b-step_00000003", "a~2", "a~3"]


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint_tokenizer(micro, images, tmp_path_factory) -> Path:
    """A saved tokenizer of both branches that was never trained."""
    folder = tmp_path_factory.mktemp("joint") / "joint"
    torch.manual_seed(0)
    config = load_config(None, micro.overrides(folder, images))
    return TokenFlowTokenizer(config.model).save_pretrained(folder)


def by_distances(folder: Path, images: Path, groups: slice) -> list[int]:
    """Codes by all the distances of normalised rows, in float64."""
    model = TokenFlowTokenizer.from_pretrained(folder)
    squares = preprocess.CenterCropDataset(sorted(images.glob("*.png")), model.config.image_size)
    pixels = preprocess.to_float(torch.stack([squares[i][1] for i in range(len(squares))]))
    with torch.no_grad():
        rows = model.features(pixels).mean(dim=(2, 3)).double()
    distances = torch.zeros(len(rows), model.quantizer.codebook_size, dtype=torch.float64)
    parts = zip(rows.split(model.quantizer.dims, dim=1), model.quantizer.codebooks, strict=True)
    for part, codebook in list(parts)[groups]:
        distances += torch.cdist(F.normalize(part), F.normalize(codebook.double())).square()
    return distances.argmin(dim=1).tolist()


def test_the_command(joint_tokenizer, image_tokenizer, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(images), "--out", str(out), "--device", "cpu", "--members", "2"]
    arguments += ["--checkpoint", str(joint_tokenizer), "--checkpoint", str(image_tokenizer)]
    entry.main(["analyse", *arguments])
    report = json.loads((out / "analysis.json").read_text())
    expected = {
        ("joint", "joint"): by_distances(joint_tokenizer, images, slice(0, 2)),
        ("joint", "semantic"): by_distances(joint_tokenizer, images, slice(0, 1)),
        ("joint", "pixel"): by_distances(joint_tokenizer, images, slice(1, 2)),
        ("saved", "pixel"): by_distances(image_tokenizer, images, slice(0, 1)),
    }
    assert [(a["tokenizer"], a["by"]) for a in report["analyses"]] == list(expected)
    for one, codes in zip(report["analyses"], expected.values(), strict=True):
        counts = {code: codes.count(code) for code in codes}
        assert dict(one["clusters"]) == counts
        assert one["filled"] == len(counts) / 64
        for listed in one["largest"]:
            names = [
                p.name
                for p, c in zip(sorted(images.glob("*.png")), codes, strict=True)
                if c == listed["code"]
            ]
            assert {Path(name).name for name in listed["shown"]} <= set(names)
        assert (out / one["picture"]).is_file()
    for suffix in ("png", "svg"):
        assert (out / f"clusters.{suffix}").stat().st_size > 1000
    assert report["tokenizers"][0]["data_sha256"] == report["tokenizers"][1]["data_sha256"]
    said = capsys.readouterr().out
    for text in ("joint, semantic", "87.4%", "27.1%", "2.5%", "8,192 codes, ImageNet"):
        assert text in said, text
    assert "3 images for 64 codes: no more than 4.7% can be filled" in " ".join(said.split())


def test_one_codebook_of_several(joint_tokenizer, image_tokenizer, images, tmp_path):
    """Where a tokenizer has not the codebook asked for, its joint one is all there is."""
    sources = [str(joint_tokenizer), str(image_tokenizer)]
    common = [sources, str(images), str(tmp_path), ALONE]
    report = analyse.run(*common, asked=["joint"])
    assert [a["by"] for a in report["analyses"]] == ["joint", "joint"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"\.png is there already"):
        analyse.run(*common, asked=["pixel"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    report = analyse.run(*common, asked=["pixel"], limit=2, overwrite=True)
    assert [a["images"] for a in report["analyses"]] == [2, 2]
    assert json.loads((tmp_path / "analysis.json").read_text())["data"]["images"] == 2


def test_checkpoints_and_pictures_of_any_name(image_tokenizer, images, tmp_path):
    """Names that are no UTF-8, that a plot would take for mathematics, and two that differ in
    nothing but their case."""
    names = [b"$a_{\xe9", b"_X", b"_x", b"\n<&>"]
    sources = []
    for raw in names:
        folder = tmp_path / os.fsdecode(raw)
        shutil.copytree(image_tokenizer, folder)
        sources.append(str(folder))
    pictures = tmp_path / "pictures"
    shutil.copytree(images, pictures)
    os.rename(pictures / "picture0.png", os.fsencode(pictures) + b"/\xe9.png")
    out = tmp_path / "out"
    analyse.run(sources, str(pictures), str(out), ALONE)
    report = json.loads((out / "analysis.json").read_bytes().decode("utf-8"))
    found = [os.fsencode(one["tokenizer"]) for one in report["analyses"]]
    assert found == [*names[:2], b"_x~2", names[3]]
    assert all((out / one["picture"]).is_file() for one in report["analyses"])
    shown = {os.fsencode(p) for e in report["analyses"][0]["largest"] for p in e["shown"]}
    assert os.fsencode(pictures) + b"/\xe9.png" in shown
    svg = ElementTree.fromstring((out / "clusters.svg").read_bytes())
    assert svg.tag.endswith("svg")


@pytest.mark.once
def test_two_processes_are_one(micro, joint_tokenizer, images, tmp_path):
    script = Path(entry.__file__).with_name("__main__.py")
    outs = {world: tmp_path / f"out{world}" for world in (1, 2)}
    runs = []
    for world, out in outs.items():
        arguments = ["analyse", "--checkpoint", str(joint_tokenizer), "--data", str(images)]
        arguments += ["--out", str(out), "--device", "cpu"]
        runs.append(micro.launch(arguments, processes=world, script=script))
    said = [micro.finish(process) for process in runs]
    assert said[1].count("87.4%") == 1  # one process speaks
    one, two = (json.loads((out / "analysis.json").read_text()) for out in outs.values())
    assert one["analyses"] == two["analyses"]
    assert one["tokenizers"] == two["tokenizers"]


def test_errors_end_with_one_line(image_tokenizer, images, tmp_path, monkeypatch):
    common = ["analyse", "--checkpoint", str(image_tokenizer), "--device", "cpu"]
    common += ["--out", str(tmp_path / "out")]
    for more, message in (
        (["--data", str(tmp_path / "none")], "no folder at"),
        (["--data", str(images), "--by", "semantic"], "no codebook semantic: its branches are pix"),
        (["--data", str(images), "--members", "0"], "--members must be 1 or more, got 0"),
        (["--data", str(images), "--limit", "0"], "--limit must be 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            entry.main([*common, *more])
    assert not (tmp_path / "out").exists()

    there = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(SystemExit, match="needs matplotlib: pip install matplotlib"):
        entry.main([*common, "--data", str(images)])
