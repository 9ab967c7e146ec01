"""The codes of a codebook as things to look at: how near they are, a colour each, a map.

Codes are near as the quantizer sees it. A row is brought into a form in which the quantizer's
distance is the plain Euclidean one: of each group the direction alone where it compares directions,
times the root of the group's weight.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext import MultiScaleQuantizer

# CIELAB: lightness is kept away from black and white, colours within what screens show.
_LIGHTNESS = (32.0, 90.0)
_CHROMA = 62.0


def comparable(quantizer: MultiScaleQuantizer, rows: Tensor) -> Tensor:
    """Rows [..., D], of features or of codes, in the form in which distances are Euclidean."""
    parts = []
    weights = quantizer.weights or (1.0,) * len(quantizer.dims)
    for part, weight in zip(rows.float().split(quantizer.dims, dim=-1), weights, strict=True):
        part = F.normalize(part, dim=-1) if quantizer.l2_norm else part
        parts.append(part * weight**0.5)
    return torch.cat(parts, dim=-1)


def principal_components(rows: Tensor, count: int) -> Tensor:
    """Coordinates [K, count] float64 of rows [K, D] along the directions in which they vary most.

    Of each direction the largest coordinate is positive. Directions that there are not are 0.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    found = centred @ directions.flip(1)[:, :count]
    largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    found = torch.where(largest < 0, -found, found)
    return F.pad(found, (0, count - found.shape[1]))


def colours(rows: Tensor) -> np.ndarray:
    """A colour for each code, uint8 [K, 3]: near codes have near colours.

    The first three principal components, each by rank, are lightness, green to red and blue to
    yellow in CIELAB.

    Args:
        rows: comparable codes [K, D].
    """
    from skimage.color import lab2rgb

    ranks = principal_components(rows, 3).argsort(dim=0, stable=True).argsort(dim=0).double()
    share = (ranks / max(1, len(rows) - 1)).numpy()
    low, high = _LIGHTNESS
    lab = np.stack(
        [low + (high - low) * share[:, 0], *(_CHROMA * (2 * share[:, 1:] - 1)).T], axis=-1
    )
    return (lab2rgb(lab[None])[0] * 255).round().astype(np.uint8)


class Codes:
    """The codes of a tokenizer's quantizer.

    Args:
        quantizer: one with a shared index.

    Attributes:
        rows: comparable codes [K, D] float32 on the CPU.
        colours: uint8 [K, 3], see :func:`colours`.
        places: of each code on a map, [K, 2] float64, each axis within [0, 1].
    """

    def __init__(self, quantizer: MultiScaleQuantizer) -> None:
        self.rows = comparable(quantizer, quantizer.joint_codebook().detach()).cpu()
        self.colours = colours(self.rows)
        plane = principal_components(self.rows, 2)
        plane = plane - plane.amin(dim=0)
        self.places = plane / plane.amax().clamp_min(torch.finfo(torch.float64).tiny)

    def __len__(self) -> int:
        return len(self.rows)

    def nearest(self, code: int, count: int) -> list[int]:
        """The codes nearest to one, nearest first, at most ``count``, without itself."""
        distances = (self.rows - self.rows[code]).square().sum(dim=1)
        distances[code] = torch.inf
        order = distances.argsort(stable=True).tolist()
        return order[: min(count, len(self) - 1)]

    def hex(self, code: int) -> str:
        """A code's colour as ``#rrggbb``."""
        return "#" + bytes(self.colours[code].tolist()).hex()
