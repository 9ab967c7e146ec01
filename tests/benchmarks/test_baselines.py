"""The baselines compute what ours computes; the check before timing notices where one does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from benchmarks.agreement import check_near_ties, check_results, unit_groups
from benchmarks.cases import DIMS, IMPLEMENTATIONS, MODES, Case, available_baselines, build
from benchmarks.searches import SEARCHES
from tokenflow_ext import nearest_code

BASELINES = [
    name
    for name, item in IMPLEMENTATIONS.items()
    if name != "ours" and not item.compiled and "cpu" in item.devices
]


def skip_without(package: str | None) -> None:
    if package:
        pytest.importorskip(package)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_agrees(name, mode) -> None:
    skip_without(IMPLEMENTATIONS[name].package)
    case = Case("B", 64, mode, batch=2)
    ours = build(case, "ours")
    assert check_results(case, ours, ours(), build(case, name)()) <= 2  # near-ties


@pytest.mark.parametrize(
    "name", [n for n, s in SEARCHES.items() if "cpu" in s.devices and not s.compiled]
)
def test_search_agrees(name) -> None:
    skip_without(SEARCHES[name].package)
    rows, codebook = torch.randn(50, sum(DIMS)), torch.randn(300, sum(DIMS))
    query = SEARCHES[name].prepare(300, sum(DIMS), "cpu")(unit_groups(codebook).float())
    found = query(unit_groups(rows).float())
    check_near_ties(rows, codebook, nearest_code(rows, codebook, DIMS), found)


class TestWrongBaseline:
    case = Case("tiny", 32, "forward+backward", batch=2)

    def results(self):
        ours = build(self.case, "ours")
        return ours, ours(), build(self.case, "eager")()

    def test_index(self) -> None:
        ours, expected, (out, grads) = self.results()
        wrong = out._replace(indices=(out.indices + 1) % self.case.codebook_size)
        with pytest.raises(AssertionError, match="indices differ"):
            check_results(self.case, ours, expected, (wrong, grads))

    @pytest.mark.parametrize("field", ["quantized", "vq_loss", "commitment_loss"])
    def test_value(self, field) -> None:
        ours, expected, (out, grads) = self.results()
        wrong = out._replace(**{field: getattr(out, field) * 1.01})
        with pytest.raises(AssertionError, match=field):
            check_results(self.case, ours, expected, (wrong, grads))

    def test_gradient(self) -> None:
        ours, expected, (out, grads) = self.results()
        with pytest.raises(AssertionError, match=r"gradient of codebooks\[1\]"):
            check_results(self.case, ours, expected, (out, (*grads[:2], grads[2] * 1.01)))


class TestWhatCanRun:
    case = Case("XL", 131072, "forward", batch=2)

    def test_leaves_out_what_does_not_fit(self, monkeypatch) -> None:
        monkeypatch.setattr(cases, "free_memory", lambda device: 3 * 2**30)
        found = available_baselines(self.case, compile_too=False)
        assert found["released"] == "needs 4.3 of 3.0 GiB free"  # 24 bytes for 1458 x 131072 scores
        assert found["eager"] is None

    def test_leaves_out_what_is_not_installed(self, monkeypatch) -> None:
        monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: None)
        assert (
            available_baselines(Case("B", 64, "forward", 1), compile_too=False)["faiss"]
            == "not installed"
        )

    def test_compiles_on_request(self) -> None:
        small = Case("B", 64, "forward", 1)
        assert "compiled" not in available_baselines(small, compile_too=False)
        assert "compiled" in available_baselines(small, compile_too=True)
