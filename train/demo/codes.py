"""The codes of an index as things to look at: how near they are, a colour each, a map.

Codes are near as the quantizer sees it. Rows are brought into a form in which the quantizer's
distance is the plain Euclidean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext import MultiScaleQuantizer

# CIELAB: lightness is kept away from black and white, colours within what screens show.
_LIGHTNESS = (32.0, 90.0)
_CHROMA = 62.0


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


def from_shares(shares: np.ndarray) -> np.ndarray:
    """Colours uint8 [N, 3] of shares [N, 3] within [0, 1]: lightness, green to red and blue to
    yellow in CIELAB."""
    from skimage.color import lab2rgb

    low, high = _LIGHTNESS
    lab = np.stack(
        [low + (high - low) * shares[:, 0], *(_CHROMA * (2 * shares[:, 1:] - 1)).T], axis=-1
    )
    return (lab2rgb(lab[None])[0] * 255).round().astype(np.uint8)


def colours(rows: Tensor) -> np.ndarray:
    """A colour for each code, uint8 [K, 3]: near codes have near colours.

    The first three principal components, each by rank, see :func:`from_shares`.

    Args:
        rows: comparable codes [K, D].
    """
    ranks = principal_components(rows, 3).argsort(dim=0, stable=True).argsort(dim=0).double()
    return from_shares((ranks / max(1, len(rows) - 1)).numpy())


class Codes(Protocol):
    """The codes of one index.

    Attributes:
        name: of the group that has the index; "" where there is one index.
        columns: the channels of features that the index is of.
    """

    name: str
    columns: slice

    def __len__(self) -> int:
        """How many there are."""

    def comparable(self, rows: Tensor, part: int = 0) -> Tensor:
        """Features [..., D] of the columns, at a round, in the form in which distances are."""

    def row(self, code: int, part: int = 0) -> Tensor:
        """A code at a round in that form, [D']."""

    def find(self, rows: Tensor, part: int = 0) -> Tensor:
        """The codes [N] nearest to comparable rows [N, D']."""

    def similar(self, code: int, count: int) -> list[tuple[int, str]]:
        """Codes like one, and what to call each, at most ``count``."""

    def colours_of(self, codes: Tensor) -> np.ndarray:
        """Colours uint8 [N, 3] of codes [N]."""

    def coloured_by(self, hits: Tensor) -> Codes:
        """The same with colours that tell apart codes that are used so often, [K]."""


def hexes(codes: Codes, chosen: Tensor | Sequence[int]) -> list[str]:
    """The colours of codes as ``#rrggbb``."""
    found = codes.colours_of(torch.as_tensor(chosen))
    return ["#" + bytes(colour).hex() for colour in found.tolist()]


def hex_of(codes: Codes, code: int) -> str:
    """That of one."""
    return hexes(codes, [code])[0]


class TableCodes:
    """The rows of a table, or of several that share an index.

    Of each group the direction alone is compared where the quantizer compares directions, times the
    root of the group's weight. Where it takes the largest inner product of rows as they are, codes
    get one more channel, which makes all of one length: then the nearest has the largest.

    Args:
        quantizer: of tables, whose index is meant.
        book: which of the quantizer's indices.
        columns: of features, see :class:`Codes`; by default all.
        name: see :class:`Codes`.

    Attributes:
        rows: comparable codes [K, D'] float32 on the CPU.
        colours: uint8 [K, 3], see :func:`colours`.
        places: of each code on a map, [K, 2] float64, each axis within [0, 1].
    """

    @torch.no_grad()
    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        book: int = 0,
        columns: slice | None = None,
        name: str = "",
    ) -> None:
        self.name, self.columns = name, slice(0, quantizer.dim) if columns is None else columns
        own = quantizer.has_own_indices
        table = quantizer.joint_codebook().cpu()
        self._dims = quantizer.dims[:1] if own else quantizer.dims
        self._weights = (1.0,) if own else quantizer.weights
        self._l2_norm = quantizer.l2_norm
        self._longer = quantizer.metric == "dot" and not quantizer.l2_norm
        rows = self._grouped(table[book] if own else table)
        if self._longer:
            lengths = rows.double().square().sum(dim=1)
            rest = (lengths.amax() - lengths).sqrt().float()
            rows = torch.cat([rows, rest[:, None]], dim=1)
        self.rows = rows
        self.colours = colours(self.rows)
        plane = principal_components(self.rows, 2)
        plane = plane - plane.amin(dim=0)
        self.places = plane / plane.amax().clamp_min(torch.finfo(torch.float64).tiny)

    def _grouped(self, rows: Tensor) -> Tensor:
        parts = []
        for part, weight in zip(rows.float().split(self._dims, -1), self._weights, strict=True):
            part = F.normalize(part, dim=-1) if self._l2_norm else part
            parts.append(part * weight**0.5)
        return torch.cat(parts, dim=-1)

    def __len__(self) -> int:
        return len(self.rows)

    def comparable(self, rows: Tensor, part: int = 0) -> Tensor:
        """See :class:`Codes`; all rounds have one table."""
        return F.pad(self._grouped(rows), (0, int(self._longer)))

    def row(self, code: int, part: int = 0) -> Tensor:
        """See :class:`Codes`."""
        return self.rows[code]

    def find(self, rows: Tensor, part: int = 0) -> Tensor:
        """See :class:`Codes`."""
        return torch.cdist(rows, self.rows.to(rows.device)).argmin(dim=1)

    def nearest(self, code: int, count: int) -> list[int]:
        """The codes nearest to one, nearest first, at most ``count``, without itself."""
        distances = (self.rows - self.rows[code]).square().sum(dim=1)
        distances[code] = torch.inf
        order = distances.argsort(stable=True).tolist()
        return order[: min(count, len(self) - 1)]

    def similar(self, code: int, count: int) -> list[tuple[int, str]]:
        """See :class:`Codes`: the nearest, by their numbers."""
        return [(other, str(other)) for other in self.nearest(code, count)]

    def colours_of(self, codes: Tensor) -> np.ndarray:
        """See :class:`Codes`."""
        return self.colours[codes.numpy()]

    def coloured_by(self, hits: Tensor) -> TableCodes:
        """See :class:`Codes`: colours are of the whole table."""
        return self
