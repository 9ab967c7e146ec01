"""Entropies of a soft choice of codes by distance, a few rows at a time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 22  # distances in memory at a time


def entropy_loss(
    rows: Tensor,
    codes: Tensor,
    *,
    temperature: float = 0.01,
    gamma: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """Mean entropy of a row's choice of code, less gamma times that of the mean choice (0-dim).

    The choice is softmax(-|row - code|^2 / temperature). Of the distances of rows [N, D] to codes
    [K, D] a few rows' are in memory at a time, in the gradient too, where they are computed again.
    """
    parts = [
        checkpoint(
            _choices, part, codes, temperature, use_reentrant=False, preserve_rng_state=False
        )
        for part in rows.split(max(1, CHUNK // len(codes)))
    ]
    share = sum(chosen for chosen, _ in parts) / len(rows)
    mean = sum(entropy for _, entropy in parts) / len(rows)
    return mean + gamma * (share * (share + eps).log()).sum()


def _choices(rows: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums over rows: of the probabilities of codes, [K], and of their entropies, 0-dim."""
    squares = rows.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
    scores = (2 * rows @ codes.T - squares) / temperature
    # Not exp of the logarithms: a CPU's takes ten times as long where results underflow.
    p, log_p = F.softmax(scores, dim=1), F.log_softmax(scores, dim=1)
    return p.sum(dim=0), -(p * log_p).sum()
