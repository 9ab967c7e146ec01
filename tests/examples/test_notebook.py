"""The notebook of examples/ runs from its first cell to its last, and is saved without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def cells(kind: str) -> list[dict]:
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def test_saved_without_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    assert cells("code")
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all((NOTEBOOK.parent / target).exists() for target in targets), targets


def test_runs(capsys: pytest.CaptureFixture) -> None:
    from matplotlib import pyplot

    names: dict = {"__name__": "__main__"}
    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    try:
        with torch.random.fork_rng():
            for cell in cells("code"):
                exec(compile("".join(cell["source"]), f"tour.ipynb {cell['id']}", "exec"), names)
        drawn = len(pyplot.get_fignums())
    finally:
        pyplot.close("all")
        pyplot.switch_backend(before)
    output = capsys.readouterr().out
    assert drawn == 5
    first, last = map(float, re.search(r"relative error ([\d.]+) -> ([\d.]+)", output).groups())
    assert last < first / 2
    errors = [float(error) for error in re.findall(r"squared error ([\d.]+)", output)]
    assert len(errors) == 6
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    share = float(re.search(r"changes (\d+)% of the pixels", output)[1])
    assert 100 / 16 < share < 50  # a square of the 4 x 4 scale, and what lies around it
