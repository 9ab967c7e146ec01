"""sample_code: frequencies against float64's probabilities, seeds, limits and bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from quantizer.strategies import DEVICES
from torch import Tensor

from tokenflow_ext import nearest_code, reference, sample_code
from tokenflow_ext.ops import METRICS

DIMS, WEIGHTS = [3, 1], [1.0, 0.5]


def scores(rows: Tensor, codebook: Tensor, l2_norm: bool, metric: str) -> Tensor:
    """[N, K] in float64, by the definition."""
    rows, codebook = (
        reference.normalize_groups(x.double(), DIMS, l2_norm) for x in (rows, codebook)
    )
    weights = torch.tensor(WEIGHTS).double().repeat_interleave(torch.tensor(DIMS))
    if metric == "dot":
        return (rows * weights) @ codebook.T
    squared = ((rows[:, None] - codebook).square() * weights).sum(-1)
    return -squared.sqrt() if metric == "l2" else -squared


def problem(codes: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 4, generator=generator), torch.randn(codes, 4, generator=generator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("l2_norm", [True, False])
def test_frequencies(device: str, dtype: torch.dtype, metric: str, l2_norm: bool) -> None:
    """A chi-square test with 12 degrees of freedom: 45 is exceeded once in 100,000."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA serves float32")
    row, codebook = (x.to(dtype) for x in problem())
    draws = 60_000
    indices = sample_code(
        row.expand(draws, -1).to(device), codebook.to(device), DIMS, WEIGHTS, l2_norm,
        temperature=0.7, metric=metric, seed=11,
    )  # fmt: skip
    expected = draws * (scores(row, codebook, l2_norm, metric) / 0.7).softmax(dim=-1)[0]
    got = torch.bincount(indices.cpu(), minlength=len(codebook))
    assert ((got - expected).square() / expected).sum() < 45


@pytest.mark.parametrize("device", DEVICES)
def test_neighbouring_draws_are_independent(device: str) -> None:
    """Pairs of rows side by side, and of codes of one block of random numbers: all 16 alike."""
    rows, codebook = torch.zeros(40_000, 1, device=device), torch.zeros(4, 1, device=device)
    indices = sample_code(rows, codebook, l2_norm=False, seed=1).cpu()
    pairs = torch.bincount(indices[::2] * 4 + indices[1::2], minlength=16)
    assert ((pairs - 1250.0).square() / 1250).sum() < 55  # 15 degrees of freedom: 1 in 500,000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", METRICS)
def test_temperature_zero_and_nearly_so(device: str, metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, codebook = (
        torch.randn(50, 4, generator=generator),
        torch.randn(300, 4, generator=generator),
    )
    expected = scores(rows, codebook, False, metric).argmax(dim=1)
    for temperature in (0.0, 1e-300, 1e-12):
        got = sample_code(
            rows.to(device), codebook.to(device), DIMS, WEIGHTS, False,
            temperature=temperature, metric=metric, seed=0,
        )  # fmt: skip
        assert torch.equal(got.cpu(), expected)
    twice = codebook.repeat(2, 1).to(device)
    got = sample_code(rows.to(device), twice, DIMS, WEIGHTS, False, temperature=0.0, metric=metric)
    assert torch.equal(got.cpu(), expected), "the lowest index on a tie"
    if metric != "dot":
        assert torch.equal(got.cpu(), nearest_code(rows, codebook, DIMS, WEIGHTS, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 1e38])
def test_any_magnitude(device: str, size: float) -> None:
    """Rows, codes and temperature times a power of ten, or normalised: nearly the same draws."""
    generator = torch.Generator().manual_seed(5)
    rows, codebook = torch.rand(400, 4, generator=generator), torch.rand(60, 4, generator=generator)

    def draw(scale: float, l2_norm: bool, temperature: float) -> Tensor:
        scaled = [(x * scale).to(device) for x in (rows, codebook)]
        return sample_code(
            *scaled, DIMS, WEIGHTS, l2_norm, temperature=temperature, seed=4, metric="l2"
        )

    assert (draw(size, False, 0.3 * size) == draw(1.0, False, 0.3)).float().mean() > 0.99
    if size > 1e-12:
        assert (draw(size, True, 0.3) == draw(1.0, True, 0.3)).float().mean() > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_and_offsets(device: str) -> None:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(150, 4, generator=generator).to(device)
    codebook = torch.randn(90, 4, generator=generator).to(device)
    all_rows = sample_code(rows, codebook, seed=5)
    assert torch.equal(sample_code(rows, codebook, seed=5), all_rows)
    assert torch.equal(sample_code(rows, codebook, seed=5 + 2**64), all_rows)
    assert not torch.equal(sample_code(rows, codebook, seed=6), all_rows)
    parts = [sample_code(rows[a:b], codebook, seed=5, offset=a) for a, b in [(0, 67), (67, 150)]]
    assert torch.equal(torch.cat(parts), all_rows)
    order = torch.randperm(150, generator=generator).to(device)
    got = sample_code(rows[order], codebook, seed=torch.tensor(5, device=device), offset=order)
    assert torch.equal(got, all_rows[order])
    seeds = torch.arange(150, device=device)
    each = sample_code(rows, codebook, seed=seeds)
    assert torch.equal(sample_code(rows[70:71], codebook, seed=70), each[70:71])
    torch.manual_seed(1)
    first, second = sample_code(rows, codebook), sample_code(rows, codebook)
    torch.manual_seed(1)
    assert torch.equal(sample_code(rows, codebook), first)
    assert not torch.equal(first, second)


def test_threads_and_instruction_sets_draw_the_same() -> None:
    program = """
import torch
from tokenflow_ext import sample_code
generator = torch.Generator().manual_seed(0)
rows, codebook = torch.randn(300, 9, generator=generator), torch.randn(500, 9, generator=generator)
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(sum(sample_code(rows, codebook, [5, 4], seed=2).tolist()))
"""
    printed = {
        line
        for name in ("", "portable")
        for line in subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "TOKENFLOW_CPU": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    }
    assert len(printed) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_finite(device: str) -> None:
    rows = torch.randn(5, 4, device=device)
    clean = sample_code(rows, codebook := torch.randn(40, 4, device=device), seed=1)
    rows[1], rows[3, 2] = torch.nan, torch.inf
    for metric in METRICS:
        got = sample_code(rows, codebook, seed=1, metric=metric)
        assert got[1] == got[3] == 0
    got = sample_code(rows, codebook, seed=1)
    assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])


def test_operator_registration() -> None:
    rows, codebook = torch.randn(6, 4), torch.randn(9, 4)
    tensors = (torch.arange(6), torch.tensor(3))
    for seed, offset in [(None, None), tensors]:
        torch.library.opcheck(
            torch.ops.tokenflow_ext.sample_code,
            (rows, codebook, DIMS, WEIGHTS, True, 0, 0.5, 1, seed, 2, offset),
        )
    compiled = torch.compile(lambda x: sample_code(x, codebook, seed=3), fullgraph=True)
    assert torch.equal(compiled(rows), sample_code(rows, codebook, seed=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cosine"}, "metric must be one of l2, squared_l2, dot, got 'cosine'"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and not negative, got inf"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"seed": torch.zeros(3)}, "seed must hold integers, got torch.float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed must be one number .* shape \[2\]"),
        ({"offset": torch.zeros(1, 2, dtype=torch.int64)}, "offset must be one number or one for"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"offset": torch.zeros(3, dtype=torch.int64, device="meta")}, "offset must be on the dev"),
        ({"generator": torch.Generator()}, "seed and generator exclude each other"),
        ({"rows": torch.zeros(0, 4)}, "rows must not be empty"),
        ({"rows": torch.zeros(3, 5)}, "rows must have sum"),
        ({"codebook": torch.full((9, 4), torch.nan)}, "codebook must be finite"),
        ({"codebook": torch.zeros(9, 4).double()}, "codebook must have the dtype of rows"),
        ({"codebook": torch.zeros(9, 4, device="meta")}, "codebook must be on the device of rows"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"rows": torch.randn(3, 4), "codebook": torch.randn(9, 4), "dims": [4], "seed": 1}
    with pytest.raises((RuntimeError, ValueError), match=message):
        sample_code(**{**arguments, **change})
