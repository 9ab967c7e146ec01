"""k-means, running means and restarts, against loops over single rows and codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenflow_ext import codebook


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(rows, centres).argmin(dim=1)


def kmeans_plainly(
    rows: list[list[float]], centres: list[list[float]], iterations: int
) -> tuple[list[list[float]], list[int]]:
    """Lloyd's algorithm in plain Python; a centre without a row stays."""
    counts = [0] * len(centres)
    for _ in range(iterations):
        chosen: list[list[list[float]]] = [[] for _ in centres]
        for row in rows:
            distances = [sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centres]
            chosen[distances.index(min(distances))].append(row)
        counts = [len(part) for part in chosen]
        centres = [
            [sum(column) / len(part) for column in zip(*part, strict=True)] if part else centre
            for part, centre in zip(chosen, centres, strict=True)
        ]
    return centres, counts


def test_kmeans_is_lloyds() -> None:
    rows = torch.randn(60, 3, dtype=torch.float64)
    start = torch.cat([rows[:6], torch.full((1, 3), 99.0, dtype=torch.float64)])
    centres, counts = codebook.kmeans(
        rows, start, 4, assign=lambda centres: nearest(rows, centres), normalize=lambda x: x
    )
    expected, expected_counts = kmeans_plainly(rows.tolist(), start.tolist(), 4)
    torch.testing.assert_close(centres, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == expected_counts
    assert counts[6] == 0
    assert torch.equal(centres[6], start[6])


def test_kmeans_gives_empty_centres_spare_rows_and_normalises_both() -> None:
    rows = torch.randn(20, 3)
    start = torch.stack([rows[0], torch.full((3,), 99.0)])
    spare = torch.tensor([[7.0, 7, 7], [3, 0, 4]])
    centres, counts = codebook.kmeans(
        rows,
        start,
        1,
        assign=lambda centres: nearest(rows, centres),
        normalize=lambda x: torch.nn.functional.normalize(x, dim=-1),
        spare=lambda: spare,
    )
    mean = rows.mean(dim=0)
    torch.testing.assert_close(centres, torch.stack([mean / mean.norm(), spare[1] / 5]))
    assert counts.tolist() == [20, 0]


def test_kmeans_leaves_out_rows_without_an_index() -> None:
    rows = torch.tensor([[1.0], [3.0], [float("nan")]])
    index = torch.tensor([0, 0, -1])
    centres, counts = codebook.kmeans(
        rows, torch.zeros(1, 1), 2, assign=lambda _: index, normalize=lambda x: x
    )
    assert centres.tolist() == [[2.0]]
    assert counts.tolist() == [2]
    centres, counts = codebook.kmeans(
        rows, torch.ones(1, 1), 0, assign=lambda _: index, normalize=lambda x: x
    )
    assert (centres.tolist(), counts.tolist()) == ([[1.0]], [0])


@pytest.mark.parametrize("by_code", [False, True])
def test_running_sums_and_their_means(by_code: bool) -> None:
    hits, sums = torch.rand(4) * 5, torch.randn(4, 3)
    new_hits, new_sums = torch.tensor([2, 0, 1, 5]), torch.randn(4, 3)
    rates = [0.1, 0.2, 0.3, 0.4] if by_code else [0.1] * 4
    expected_hits = [(1 - r) * a + r * b for r, a, b in zip(rates, hits, new_hits, strict=True)]
    expected_sums = [(1 - r) * a + r * b for r, a, b in zip(rates, sums, new_sums, strict=True)]
    rate = torch.tensor(rates) if by_code else 0.1
    codebook.update_running(hits, sums, new_hits, new_sums, rate)
    torch.testing.assert_close(hits, torch.stack(expected_hits))
    torch.testing.assert_close(sums, torch.stack(expected_sums))
    means = codebook.running_means(hits, sums)
    torch.testing.assert_close(means, torch.stack([s / n for s, n in zip(sums, hits, strict=True)]))
    total = float(hits.sum())
    smoothed = [(float(n) + 0.5) / (total + 4 * 0.5) * total for n in hits]
    expected = torch.stack([s / n for s, n in zip(sums, smoothed, strict=True)])
    torch.testing.assert_close(codebook.smoothed_means(hits, sums, 0.5), expected)


def test_a_code_that_was_never_hit_has_mean_zero() -> None:
    assert codebook.running_means(torch.zeros(2), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_reset_is_of_the_named_codes_alone() -> None:
    hits, sums = torch.tensor([1.0, 2, 3]), torch.ones(3, 2)
    codes = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    where = torch.tensor([True, False, True])
    codebook.reset_running(where, codes, 10.0, hits, sums)
    assert hits.tolist() == [10, 2, 10]
    assert sums.tolist() == [[10, 20], [1, 1], [50, 60]]
    codebook.reset_running(where, codes, torch.tensor([7, 8, 9]), hits, sums)
    assert hits.tolist() == [7, 2, 9]
    assert sums.tolist() == [[7, 14], [1, 1], [45, 54]]


def test_no_rows() -> None:
    sums, counts = codebook.sum_by_code(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 4)
    assert (sums.shape, counts.tolist()) == ((4, 3), [0] * 4)
    assert not sums.any()
