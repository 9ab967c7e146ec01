"""FSQ by its definition."""

from __future__ import annotations

import math

import torch


def fsq(z: torch.Tensor, count: int, bound: str) -> torch.Tensor:
    """The value of FSQ's definition, in float64."""
    if bound == "tanh":
        half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
        bounded = torch.tanh(z + math.atanh(offset / half)) * half - offset
        return bounded.round() / (count // 2)
    bounded = z.tanh() if bound == "symmetric" else z.clamp(-1, 1)
    return 2 / (count - 1) * ((count - 1) * (bounded + 1) / 2 + 0.5).floor() - 1


def fsq_bounded(z: torch.Tensor, counts: torch.Tensor, bound: str) -> torch.Tensor:
    """The value of FSQ's definition before it is rounded."""
    if bound != "tanh":
        return z.tanh() if bound == "symmetric" else z.clamp(-1, 1)
    half, offset = (counts - 1) * 1.001 / 2, 0.5 * (counts % 2 == 0)
    return ((z + (offset / half).atanh()).tanh() * half - offset) / counts.div(2).floor()
