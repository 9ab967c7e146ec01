"""The ablation: rows are trained once, measured by the evaluation, and tabled as they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import ablation
from tokenflow_ext.models import WeightsError
from tokenflow_ext.models.towers.teachers import find_efficientnet_lite0
from tokenflow_ext.train.engine import checkpoint

SETTINGS = ("optim.batch=2", "data.held_out_crops=8", "codebook.kmeans_batches=2")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A VQGAN, a VQKD and a larger codebook, two steps each."""
    try:
        find_efficientnet_lite0()
    except WeightsError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("ablation")
    call(folder)
    return folder


def call(folder: Path, *more: str) -> None:
    arguments = ["--out", str(folder), "--rows", "vqgan", "vqkd", "--codebook-sizes", "2048"]
    ablation.main([*arguments, "--steps", "2", *SETTINGS, *more])


def test_every_row_has_the_evaluations_figures(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["vqgan", "vqkd", "codes_2048"]
    for row in rows:
        figures = json.loads((out / row["name"] / "evaluation" / "metrics.json").read_text())
        for name, value in figures["figures"].items():
            assert row[name] == value, name
        # The evaluation saw the run's own held-out crops.
        summary = json.loads((out / row["name"] / "summary.json").read_text())
        for name in ("psnr", "cosine"):
            if name in summary["last"]:
                assert row[name] == pytest.approx(summary["last"][name], rel=5e-3)
    assert [row["tokens"] for row in rows] == [64, 64, 204]
    assert [row["codebook_size"] for row in rows] == [1024, 1024, 2048]
    assert rows[1]["psnr"] is None
    assert rows[0]["cosine"] is None
    assert rows[0]["codebook_parameters"] == 1024 * 8
    assert rows[1]["codebook_parameters"] == 1024 * 32
    assert rows[2]["codebook_parameters"] == 2048 * 40
    assert len({row["data_sha256"] for row in rows}) == 1


def test_the_three_files_agree(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    text = (out / "table.md").read_text()
    for row, line in zip(rows, lines, strict=True):
        for name in ("psnr", "cosine", "usage", "perplexity"):
            assert line[name] == ("" if row[name] is None else str(row[name]))
        cells = next(x for x in text.splitlines() if x.startswith(f"| {row['label']} "))
        for name, form in (("psnr", "{:.2f}"), ("cosine", "{:.3f}"), ("codebook_size", "{:,}")):
            if row[name] is not None:
                assert f"| {form.format(row[name])} " in cells
    for fact in ("2 steps, 4 crops each", *SETTINGS, "torch ", "commit ", "-m benchmarks.ablation"):
        assert fact in text, fact


def test_finished_rows_are_kept(out):
    files = sorted(out.rglob("result.json"))
    before = [(file, file.stat().st_mtime_ns) for file in files]
    assert len(before) == 3
    call(out)
    assert [(file, file.stat().st_mtime_ns) for file in files] == before


def test_a_broken_off_row_is_continued(out):
    """Its training is whole already: the checkpoint stays, the measuring is made up for."""
    row = out / "vqgan"
    before = json.loads((row / "result.json").read_text())
    newest = checkpoint.available(row / "checkpoints")[-1]
    written = (newest / "manifest.json").stat().st_mtime_ns
    (row / "result.json").unlink()
    call(out)
    assert json.loads((row / "result.json").read_text()) == before
    assert (newest / "manifest.json").stat().st_mtime_ns == written


def test_rows_of_other_settings_are_not_mixed(out):
    with pytest.raises(SystemExit, match=r"error: .*vqgan holds a run of other settings"):
        call(out, "optim.lr=1e-3")
    with pytest.raises(SystemExit, match=r"error: .*vqgan\.yaml .*: unknown field optim\.nothing"):
        call(out, "optim.nothing=1")
    with pytest.raises(SystemExit):
        ablation.main(["--rows", "nothing", "--out", str(out)])
