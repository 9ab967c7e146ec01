"""nearest_code against float64 distances: exact, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.strategies import DEVICES, Problem, problems

from tokenflow_ext import nearest_code, reference


def assert_nearest(
    indices: torch.Tensor,
    rows: torch.Tensor,
    codebook: torch.Tensor,
    dims: list[int],
    weights: list[float],
    l2_norm: bool,
) -> None:
    """The float64 choice, or one whose distance equals the least to float64's own rounding."""
    d = reference.distances(rows.double(), codebook.double(), dims, weights, l2_norm)
    assert indices.dtype == torch.int64
    assert indices.shape == (rows.shape[0],)
    best, expected = d.min(dim=1)
    chosen = d.gather(1, indices.unsqueeze(1)).squeeze(1)
    other = d.scatter(1, expected.unsqueeze(1), torch.inf).amin(dim=1)
    # The squares of unit numbers carry an absolute error of about 1e-16.
    slack = 1e-12 * best + (1e-14 * max(weights) if l2_norm else 0)
    assert (chosen <= best + slack).all()
    clear = other > best + slack
    assert torch.equal(indices[clear], expected[clear])


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=150)
@given(problem=problems(), num_rows=st.integers(1, 300))
def test_matches_float64(device: str, problem: Problem, num_rows: int) -> None:
    dims, weights, l2_norm, codebook, _ = problem
    rows = problem.randn(num_rows, sum(dims)) * codebook.abs().mean().clamp(min=1e-3)
    indices = nearest_code(rows.to(device), codebook.to(device), dims, weights, l2_norm).cpu()
    assert_nearest(indices, rows, codebook, dims, weights, l2_norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [511, 512, 513, 8192, 32768, 131072])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_large_codebooks(device: str, size: int, l2_norm: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    codebook = torch.randn(size, 40, generator=generator)
    rows = torch.randn(65, 40, generator=generator)
    indices = nearest_code(rows.to(device), codebook.to(device), [32, 8], [1.0, 1.0], l2_norm)
    assert_nearest(indices.cpu(), rows, codebook, [32, 8], [1.0, 1.0], l2_norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", [[1], [2], [3], [1, 1]])
def test_crowded_low_dimensions(device: str, dims: list[int]) -> None:
    """Distances far below float32's resolution of the score: only exact settling is right."""
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(20000, sum(dims), generator=generator)
    rows = torch.randn(50, sum(dims), generator=generator)
    weights = [1.0] * len(dims)
    for l2_norm in (True, False):
        indices = nearest_code(rows.to(device), codebook.to(device), dims, weights, l2_norm).cpu()
        assert_nearest(indices, rows, codebook, dims, weights, l2_norm)


@st.composite
def _crowds(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, 7] and codes [K, 7]: copies, classes of lengths, and both within a little ball."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(draw(st.integers(1, 120)), 7, generator=generator)
    codes = torch.randn(draw(st.integers(1, 700)), 7, generator=generator)
    kept = draw(st.integers(1, len(codes)))
    codes = codes[torch.randint(kept, (len(codes),), generator=generator)]
    decades = draw(st.sampled_from([0.0, 0.0, 1.0, 4.0]))
    codes *= 10 ** (decades * torch.randn(len(codes), 1, generator=generator))
    spread, centre = draw(st.sampled_from([1.0, 1e-2, 1e-4])), 5 * torch.randn(7)
    codes = centre + spread * codes if spread < 1 else codes
    rows = centre + spread * rows if spread < 1 and draw(st.booleans()) else rows
    rows[torch.rand(len(rows), generator=generator) < 0.1] = 0
    return rows, codes


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=150)
@given(crowd=_crowds(), l2_norm=st.booleans())
def test_crowds(device: str, crowd: tuple[torch.Tensor, torch.Tensor], l2_norm: bool) -> None:
    """Where many codes come near to a row, the lowest of equal ones is chosen too."""
    rows, codes = crowd
    indices = nearest_code(rows.to(device), codes.to(device), [4, 3], [1.0, 0.5], l2_norm).cpu()
    assert_nearest(indices, rows, codes, [4, 3], [1.0, 0.5], l2_norm)
    first = (codes[indices, None] == codes).all(dim=2).int().argmax(dim=1)
    assert torch.equal(indices, first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_codes_close_together(device: str, spread: float, l2_norm: bool) -> None:
    """Clusters finer than a coarse ranking can tell apart, beyond its trial rows too."""
    generator = torch.Generator().manual_seed(9)
    centres = torch.randn(3, 40, generator=generator)
    codebook = centres.repeat(2000, 1) + spread * torch.randn(6000, 40, generator=generator)
    rows = centres.repeat(100, 1) + spread * torch.randn(300, 40, generator=generator)
    indices = nearest_code(rows.to(device), codebook.to(device), [32, 8], [1.0, 1.0], l2_norm)
    assert_nearest(indices.cpu(), rows, codebook, [32, 8], [1.0, 1.0], l2_norm)


def of_size(values: torch.Tensor, exponent: torch.Tensor | float) -> torch.Tensor:
    """values * 10^exponent, kept to what float32 holds."""
    largest = torch.finfo(torch.float32).max
    return (values.double() * 10.0**exponent).clamp(-largest, largest).float()


# Of rows and of codes, as powers of ten: from float32's smallest numbers to its largest.
MAGNITUDES = [(e, e) for e in (-45, -42, -38, -30, -20, -13, -7, -6, 6, 15, 18, 19, 20, 30, 38)]
MAGNITUDES += [(-30, 10), (10, -30), (38, -45), (-45, 38), (0, 25), (25, 0), (-25, 0), (0, -25)]
MAGNITUDES += [(6, 0), (0, 6), (9, 0), (-9, 0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(("rows_size", "codes_size"), MAGNITUDES)
def test_every_magnitude(device: str, l2_norm: bool, rows_size: int, codes_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for dims, weights in [([1], [1.0]), ([32, 8], [1.0, 1.0]), ([3, 2, 4], [0.25, 0.0, 3.0])]:
        rows = of_size(torch.randn(80, sum(dims), generator=generator), rows_size)
        codebook = of_size(torch.randn(300, sum(dims), generator=generator), codes_size)
        indices = nearest_code(rows.to(device), codebook.to(device), dims, weights, l2_norm)
        assert_nearest(indices.cpu(), rows, codebook, dims, weights, l2_norm)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(
    problem=problems(largest_codebook=300),
    rows_range=st.tuples(st.floats(-45, 38), st.floats(-45, 38)).map(sorted),
    codes_range=st.tuples(st.floats(-45, 38), st.floats(-45, 38)).map(sorted),
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 1.0, 2.5, 1e30]), min_size=4, max_size=4),
)
def test_mixed_magnitudes(
    device: str,
    problem: Problem,
    rows_range: list[float],
    codes_range: list[float],
    weights: list[float],
) -> None:
    dims, _, l2_norm, codebook, generator = problem
    weights = weights[: len(dims)]

    def exponents(count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator).double()

    codebook = of_size(codebook, exponents(len(codebook), *codes_range))
    rows = of_size(problem.randn(40, sum(dims)), exponents(40, *rows_range))
    indices = nearest_code(rows.to(device), codebook.to(device), dims, weights, l2_norm).cpu()
    assert_nearest(indices, rows, codebook, dims, weights, l2_norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row_size", [0, 8, 16, 17, 30])
def test_float64_decides_where_it_cannot_tell_codes_apart(device: str, row_size: int) -> None:
    """Of one channel there is one way to round: the same index as torch's, ties included."""
    generator = torch.Generator().manual_seed(6)
    rows = of_size(torch.randn(200, 1, generator=generator), row_size)
    codebook = torch.randn(700, 1, generator=generator)
    expected = (rows.double() - codebook.double().T).square().argmin(dim=1)
    got = nearest_code(rows.to(device), codebook.to(device), l2_norm=False)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_one_code_and_codes_of_zeros(device: str) -> None:
    for row in (0.0, 1e-45, 1e20, 3.4e38):
        rows = torch.full((3, 2), row, device=device)
        for code in (0.0, 1e-45, 1e20, -3.4e38):
            for l2_norm in (True, False):
                one = nearest_code(
                    rows, torch.full((1, 2), code, device=device), None, None, l2_norm
                )
                assert one.tolist() == [0, 0, 0]
        zeros = nearest_code(rows, torch.zeros(600, 2, device=device), None, None, l2_norm)
        assert zeros.tolist() == [0, 0, 0]


@pytest.mark.parametrize("power", [-495, -200, 200, 495])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_float64_inputs_from_1e150_to_1e_minus_150(power: int, l2_norm: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    codebook = torch.randn(300, 9, generator=generator, dtype=torch.float64)
    expected = reference.distances(rows, codebook, [5, 4], [1.0, 0.3], l2_norm).argmin(dim=1)
    scale = 2.0 ** (power if not l2_norm or power > 0 else -30)  # shorter ones are not normalised
    got = nearest_code(rows * scale, codebook * scale, [5, 4], [1.0, 0.3], l2_norm)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("power", [-500, -120, 120, 500])
def test_weights_count_relative_to_each_other(power: int) -> None:
    rows, codebook = torch.randn(50, 9), torch.randn(400, 9)
    expected = nearest_code(rows, codebook, [5, 4], [1.0, 0.3], l2_norm=False)
    scaled = [1.0 * 2.0**power, 0.3 * 2.0**power]
    assert torch.equal(nearest_code(rows, codebook, [5, 4], scaled, l2_norm=False), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_lowest_index_on_a_tie(device: str) -> None:
    code = torch.randn(1, 40)
    codebook = torch.cat([-code.expand(700, -1), code.expand(900, -1)]).to(device)
    rows = (code * torch.linspace(0.5, 3, 20).unsqueeze(1)).to(device)
    assert (nearest_code(rows, codebook, [32, 8]) == 700).all()
    assert (nearest_code(code.to(device), codebook, [32, 8], l2_norm=False) == 700).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_equals_a_code_finds_it(device: str) -> None:
    codebook = torch.randn(5000, 40, device=device)
    order = torch.randperm(5000, device=device)
    for l2_norm in (True, False):
        assert torch.equal(nearest_code(codebook[order], codebook, [32, 8], None, l2_norm), order)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_are_not_finite_or_zero_stay_in_range(device: str) -> None:
    codebook = torch.randn(600, 8, device=device)
    rows = torch.randn(7, 8, device=device)
    rows[1] = torch.nan
    rows[3, 2] = torch.inf
    rows[4] = 0
    rows[5] = 1e38
    clean = torch.tensor([0, 2, 6], device=device)
    for l2_norm in (True, False):
        indices = nearest_code(rows, codebook, [8], None, l2_norm)
        assert ((indices >= 0) & (indices < 600)).all()
        assert (indices[[1, 3]] == 0).all()
        alone = nearest_code(rows[clean], codebook, [8], None, l2_norm)
        assert torch.equal(indices[clean], alone), "a bad row must not reach another"


def test_strides_and_float64() -> None:
    rows, codebook = torch.randn(12, 30).T, torch.randn(12, 100).T
    assert not rows.is_contiguous()
    expected = nearest_code(rows.contiguous(), codebook.contiguous(), [8, 4])
    assert torch.equal(nearest_code(rows, codebook, [8, 4]), expected)
    assert torch.equal(nearest_code(rows.double(), codebook.double(), [8, 4]), expected)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    rows, codebook = torch.randn(2000, 40), torch.randn(3000, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nearest_code(rows, codebook, [32, 8])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, nearest_code(rows, codebook, [32, 8]))


@pytest.mark.parametrize(
    "instruction_set", ["portable", "avx2", "avx512", "avx512_vnni", "amx", "dotprod"]
)
def test_every_instruction_set(instruction_set: str) -> None:
    """The same check in a process that is held to one instruction set."""
    program = """
import torch
from quantizer.test_search import MAGNITUDES, assert_nearest, of_size
from tokenflow_ext import build_info, nearest_code
print(build_info()["cpu_instruction_set"])
generator = torch.Generator().manual_seed(0)
for num_rows, size, dims in [(1, 5, [3]), (23, 700, [32, 8]), (301, 5000, [5, 2, 1])]:
    rows = torch.randn(num_rows, sum(dims), generator=generator)
    codebook = torch.randn(size, sum(dims), generator=generator)
    for l2_norm in (True, False):
        weights = [1.0] * len(dims)
        indices = nearest_code(rows, codebook, dims, weights, l2_norm)
        assert_nearest(indices, rows, codebook, dims, weights, l2_norm)
for rows_size, codes_size in MAGNITUDES:
    for l2_norm in (True, False):
        rows = of_size(torch.randn(70, 9, generator=generator), rows_size)
        codebook = of_size(torch.randn(600, 9, generator=generator), codes_size)
        indices = nearest_code(rows, codebook, [5, 4], [1.0, 0.5], l2_norm)
        assert_nearest(indices, rows, codebook, [5, 4], [1.0, 0.5], l2_norm)
"""
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "TOKENFLOW_CPU": instruction_set, "PYTHONPATH": tests}
    run = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True
    )
    if "TOKENFLOW_CPU must be one of" in run.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == instruction_set


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rows": torch.zeros(3, 7)},
            r"rows must have sum\(dims\) = 8 columns, got shape \[3, 7\]",
        ),
        ({"rows": torch.zeros(0, 8)}, "rows must not be empty"),
        ({"rows": torch.zeros(3, 8, 1)}, "rows must have 2 dimensions"),
        ({"rows": torch.tensor(1.0), "dims": None}, r"rows must have 2 dimensions, got shape \[\]"),
        (
            {"rows": torch.zeros(3, 8, dtype=torch.int32)},
            "rows must be float32 or float64, got Int",
        ),
        ({"rows": torch.zeros(3, 8, dtype=torch.float16)}, "rows must be float32 or float64"),
        ({"rows": torch.zeros(3, 8).double()}, "codebook must have the dtype of rows"),
        ({"codebook": torch.zeros(0, 8)}, "codebook must have at least one row"),
        ({"codebook": torch.zeros(5, 9)}, "codebook must have sum"),
        ({"codebook": torch.full((5, 8), torch.nan)}, "codebook must be finite.*row 0"),
        ({"codebook": torch.eye(8) * torch.inf}, "codebook must be finite"),
        ({"dims": []}, "dims must name 1 to"),
        ({"dims": [9, -1]}, "dims must be positive, got -1"),
        ({"weights": [1.0, 1.0]}, "weights must name one weight a group"),
        ({"weights": [-1.0]}, "weights must be finite and not negative, got -1"),
        ({"weights": [float("nan")]}, "weights must be finite"),
        ({"weights": [float("inf")]}, "weights must be finite"),
        ({"dims": [2**31 + 4, 2**31 - 4]}, "dims must sum to at most 1048576, got 2147483652"),
        ({"dims": [2**32 + 8]}, "dims must sum to at most 1048576"),
        ({"dims": [2**63 - 1, 9]}, "dims must sum to at most 1048576"),
        ({"dims": [3, 2**20 - 2]}, "dims must sum to at most 1048576, got 1048574 at position 1"),
        ({"codebook": torch.zeros(1, 8).expand(2**50, 8)}, "not enough memory for codebook of"),
        ({"rows": torch.zeros(1, 8).expand(2**50, 8)}, "not enough memory for rows of"),
        ({"codebook": torch.zeros(5, 8, device="meta")}, "codebook must be on the device of rows"),
        ({"rows": torch.zeros(3, 8, device="meta")}, "codebook must be on the device of rows"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"rows": torch.randn(3, 8), "codebook": torch.randn(5, 8), "dims": [8]}
    with pytest.raises(RuntimeError, match=message):
        nearest_code(**{**arguments, **change})


def test_an_unknown_instruction_set_is_refused() -> None:
    program = "import torch, tokenflow_ext as t; t.nearest_code(torch.ones(1, 2), torch.ones(1, 2))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "TOKENFLOW_CPU": "avx3"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert "TOKENFLOW_CPU must be one of" in last
    assert "portable" in last
    assert last.endswith("got avx3")
