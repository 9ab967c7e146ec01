"""How codes move without a gradient: k-means, running means (EMA) and the restart of dead codes.

`MultiScaleQuantizer`, `VarQuantizer` and the quantizers of `tokenflow_ext.compat` keep a codebook
with these functions of tensors. A row is a vector that was searched with, a code's hits are how
often it was the nearest. An index of -1 leaves its row out. Sums and counts are over all processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .collectives import all_reduce


def sum_by_code(rows: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Sums of rows [N, D] by their index [N], and how many rows each sum holds, of this process.

    Returns:
        Sums [codes, D] and counts [codes] int64. N may be 0.
    """
    if len(rows) == 0:
        return rows.new_zeros(codes, rows.shape[1]), indices.new_zeros(codes)
    return ops.segment_sum(rows, indices, codes)


def reduce_counts(counts: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [K] and the number of rows left out, a scalar, summed over all processes at once."""
    counts = all_reduce(torch.cat([counts, skipped.unsqueeze(0)]))
    return counts[:-1], counts[-1]


def kmeans(
    rows: Tensor,
    centres: Tensor,
    iterations: int,
    *,
    assign: Callable[[Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
    spare: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means over the rows of all processes, the same centres on each.

    Args:
        rows: [N, D], what is averaged.
        centres: [K, D], where it begins.
        iterations: how many assignments and means.
        assign: the index of each row, [N], for centres [K, D].
        normalize: what is done to means.
        spare: gives rows [K, D] for the centres that have lost all rows. Without it they stay.

    Returns:
        Centres [K, D], and how many rows the last assignment gave to each, [K] int64.
    """
    counts = torch.zeros(len(centres), dtype=torch.int64, device=rows.device)
    for _ in range(iterations):
        sums, counts = map(all_reduce, sum_by_code(rows, assign(centres), len(centres)))
        means = normalize(sums / counts.clamp(min=1).unsqueeze(1))
        empty = centres if spare is None else normalize(spare())
        centres = torch.where(counts.unsqueeze(1) > 0, means, empty)
    return centres, counts


def update_running(
    hits: Tensor,
    sums: Tensor | None,
    new_hits: Tensor,
    new_sums: Tensor | None,
    rate: float | Tensor,
) -> None:
    """One step of the running hits [..., K] and row sums [..., K, D], in place.

    Args:
        hits, sums: exponential moving averages; no sums where only hits are kept.
        new_hits, new_sums: of this step, over all processes.
        rate: 1 - decay, one number or one a code.
    """
    sums_rate = rate
    if isinstance(rate, Tensor):
        rate = rate.to(hits)
        sums_rate = rate.unsqueeze(-1) if rate.dim() > 0 else rate
    hits.lerp_(new_hits.to(hits), rate)
    if sums is not None and new_sums is not None:
        sums.lerp_(new_sums.to(sums), sums_rate)


def running_means(hits: Tensor, sums: Tensor) -> Tensor:
    """Means [..., K, D] of the rows of each code; 0 where a code was never hit."""
    return sums / hits.clamp(min=1e-12).unsqueeze(-1)


def smoothed_means(hits: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Means [..., K, D] by Laplace-smoothed hits, as VQ-VAE (arXiv 1711.00937, A.1)."""
    total = hits.sum(dim=-1, keepdim=True)
    smoothed = (hits + eps) / (total + hits.shape[-1] * eps)
    return sums / (smoothed * total).unsqueeze(-1)


def reset_running(
    where: Tensor, codes: Tensor, to: float | Tensor, hits: Tensor, sums: Tensor | None
) -> None:
    """Sets the running hits of some codes, and their sums as if all hits had been the code itself.

    Args:
        where: which codes, [..., K] bool.
        codes: [..., K, D].
        to: the new hits, one number or one a code.
        hits, sums: as for `update_running`.
    """
    hits.copy_(torch.where(where, to, hits))
    if sums is not None:
        weights = to.unsqueeze(-1) if isinstance(to, Tensor) and to.dim() > 0 else to
        sums.copy_(torch.where(where.unsqueeze(-1), codes * weights, sums))
