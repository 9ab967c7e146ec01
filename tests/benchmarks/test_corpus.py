"""The benchmark of `tokenflow tokenize`, at a size that says nothing of speed."""

from __future__ import annotations

import json

import pytest

from benchmarks import corpus
from tokenflow_ext.train.corpus.sources import Keys, open_corpus


def test_the_corpus_has_as_many_images_as_asked(tmp_path):
    pattern = corpus.make_corpus(tmp_path / "made", 7, 3)
    units = open_corpus([pattern], 1, Keys()).units
    assert [len(corpus._members(unit.tar)) for unit in units] == [3, 2, 2]


@pytest.mark.once
def test_a_table(tmp_path):
    corpus.main(["--images", "12", "--shards", "2", "--rounds", "1", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    for row in ("decoding alone", "encoding alone", "tokenize, two processes", "by tens"):
        assert f"| {row} " in table
    (result,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    speeds = {name: row["speed"] for name, row in result["rows"].items()}
    allowed = 1 / (1 / speeds["decoding alone"] + 1 / speeds["encoding alone"])
    assert result["of what both allow"] == pytest.approx(speeds["tokenize"] / allowed)


@pytest.mark.parametrize("words", [["--images", "0"], ["--images", "3", "--shards", "4"]])
def test_sizes_that_mean_nothing(words):
    with pytest.raises(SystemExit):
        corpus.main(words)
