"""Checks, before anything is timed, that ours and a baseline compute the same thing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DIMS, Call, Case
from benchmarks.searches import NEAR_TIE
from tokenflow_ext import ops


def unit_groups(rows: Tensor) -> Tensor:
    """Rows [..., 40] with each group at unit length, float64."""
    groups = rows.double().split(list(DIMS), dim=-1)
    return torch.cat([F.normalize(group, dim=-1) for group in groups], dim=-1)


def check_near_ties(
    rows: Tensor, codebook: Tensor, ours: Tensor, theirs: Tensor, near_tie: float = NEAR_TIE
) -> int:
    """How many of the indices [N] differ, all of them near-ties of rows [N, 40].

    Raises:
        AssertionError: two different choices whose distances are further apart than a near-tie.
    """
    differ = (ours != theirs).nonzero().flatten()
    z, codes = unit_groups(rows[differ]), unit_groups(codebook)
    gap = (z - codes[ours[differ]]).square().sum(1) - (z - codes[theirs[differ]]).square().sum(1)
    worst = float(gap.abs().max()) if len(gap) else 0.0
    assert worst <= near_tie, f"indices differ where distances differ by {worst:.3g}"
    return len(differ)


def check_results(case: Case, call: Call, ours: tuple, theirs: tuple) -> int:
    """Compares indices, losses, features and gradients; returns how many indices differ.

    A near-tie decided the other way changes what the finer scales of that image quantize, so an
    image is compared up to its first scale that differs, and values where no index differs.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    (out, grads), (other, other_grads) = ours, theirs
    sizes = [(side, side) for side in case.sides]
    codebook = torch.cat([c.detach() for c in call.codebooks], dim=1)
    rows = ops.multiscale_rows(call.h.detach(), codebook, out.indices, DIMS, sizes)
    per_scale = [side * side for side in case.sides]
    first_difference = torch.zeros(case.batch, dtype=torch.bool, device=call.h.device)
    for z, a, b in zip(
        *(t.split(per_scale, dim=1) for t in (rows, out.indices, other.indices)), strict=True
    ):
        same_residual = ~first_difference
        check_near_ties(
            z[same_residual].flatten(0, 1),
            codebook,
            a[same_residual].flatten(),
            b[same_residual].flatten(),
        )
        first_difference |= (a != b).any(dim=1)

    differ = int((out.indices != other.indices).sum())
    exact = not bool(first_difference.any())
    loss_tolerance = 1e-5 if exact else 1e-2
    _close("vq_loss", out.vq_loss, other.vq_loss, loss_tolerance)
    _close("commitment_loss", out.commitment_loss, other.commitment_loss, loss_tolerance)
    same = ~first_difference
    if bool(same.any()):
        _close("quantized", out.quantized[same], other.quantized[same], 1e-4)
        if grads is not None:
            _close("gradient of h", grads[0][same], other_grads[0][same], 1e-4)
    if exact and grads is not None:
        for number, pair in enumerate(zip(grads[1:], other_grads[1:], strict=True)):
            _close(f"gradient of codebooks[{number}]", *pair, 1e-4)
    if exact:
        hits = out.usage.hits if hasattr(out, "usage") else out.hits
        assert torch.equal(hits.long(), other.hits.long()), "hits differ"
    return differ


def _close(name: str, ours: Any, theirs: Any, tolerance: float) -> None:
    scale = theirs.detach().abs().max().clamp(min=1e-30)
    error = float((ours - theirs).detach().abs().max() / scale)
    assert error <= tolerance, f"{name} differs by {error:.3g} of its largest value"
