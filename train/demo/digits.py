"""Codes without a table: a digit for each channel, of signs two, of levels a few."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext import Levels, Signs, scalar
from tokenflow_ext.scalar_quantizer import ScalarQuantizer

from .codes import from_shares

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, eq=False)
class DigitCodes:
    """See :class:`.codes.Codes`. A code is the digits of its channels; it is computed, not kept.

    Attributes:
        name, columns: see :class:`.codes.Codes`.
        code: what the digits are of.
        values: of each digit, [rounds, digits, D] float32 on the CPU.
        mean, directions, ranks: of the colours: the mean [D] of the values that were looked at, the
            directions [D, 3] in which they vary most, and sorted coordinates [N, 3] along these.
    """

    name: str
    columns: slice
    code: Signs | Levels
    values: Tensor
    mean: Tensor
    directions: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, quantizer: ScalarQuantizer, columns: slice, name: str = "") -> DigitCodes:
        """One index of a quantizer. Its colours tell apart codes drawn at random."""
        dim = quantizer.code.dim
        values = quantizer.tables(torch.empty(0)).values[..., :dim].cpu()
        empty = torch.empty(0)
        made = cls(name, columns, quantizer.code, values, empty, empty, empty)
        drawn = torch.Generator().manual_seed(0)
        chosen = torch.randint(quantizer.codebook_size, (512,), generator=drawn)
        return made._coloured(made.rows_of(chosen), torch.ones(512))

    def __len__(self) -> int:
        return self.code.size

    @property
    def word(self) -> str:
        """What a digit is called."""
        return "sign" if isinstance(self.code, Signs) else "level"

    @property
    def _little(self) -> bool:
        return not isinstance(self.code, Signs) or self.code.little_endian

    def digits(self, codes: Tensor) -> Tensor:
        """Digits [N, D] int64 of codes [N]."""
        return scalar.unpack_digits(codes, self.code.counts, little_endian=self._little)

    def code_of(self, digits: Tensor) -> Tensor:
        """Codes [N] of digits [N, D], the inverse of :meth:`digits`."""
        return scalar.pack_digits(digits, self.code.counts, little_endian=self._little)

    def shown(self, channel: int, digit: int) -> str:
        """A digit as people read it: + or -, or the level, counted from the middle one."""
        if isinstance(self.code, Signs):
            return "+" if digit else _MINUS
        level = digit - self.code.counts[channel] // 2
        return f"{level:+d}".replace("-", _MINUS) if level else "0"

    def rows_of(self, codes: Tensor, part: int = 0) -> Tensor:
        """Values [N, D] of codes [N] at a round."""
        return self.values[part].gather(0, self.digits(codes))

    def row(self, code: int, part: int = 0) -> Tensor:
        """See :class:`.codes.Codes`."""
        return self.rows_of(torch.tensor([code]), part)[0]

    def comparable(self, rows: Tensor, part: int = 0) -> Tensor:
        """See :class:`.codes.Codes`: signs are compared as they are, or at unit length; of levels
        what is rounded."""
        rows = rows.float()
        if isinstance(self.code, Levels):
            values = self.values.to(rows.device)
            finer = values[part, 0] / values[0, 0]
            return scalar.bounded(rows / finer, self.code.counts, self.code.bound) * finer
        return F.normalize(rows, dim=-1) if self.code.spherical else rows

    def find(self, rows: Tensor, part: int = 0) -> Tensor:
        """See :class:`.codes.Codes`: each channel by itself."""
        values = self.values[part].to(rows.device)
        distances = (values - rows.unsqueeze(1)).abs()
        digits = torch.arange(len(values), device=rows.device)
        missing = digits[:, None] >= torch.tensor(self.code.counts, device=rows.device)
        return self.code_of(distances.masked_fill(missing, torch.inf).argmin(dim=1))

    def similar(self, code: int, count: int) -> list[tuple[int, str]]:
        """See :class:`.codes.Codes`: those that differ in one channel by one step."""
        digits = self.digits(torch.tensor([code]))
        found = []
        for channel, most in enumerate(self.code.counts):
            for step in (-1, 1):
                other = digits.clone()
                other[0, channel] += step
                digit = int(other[0, channel])
                if 0 <= digit < most:
                    name = f"channel {channel + 1}: {self.shown(channel, digit)}"
                    found.append((int(self.code_of(other)), name))
        return found[:count]

    def colours_of(self, codes: Tensor) -> np.ndarray:
        """See :class:`.codes.Codes`."""
        along = (self.rows_of(codes).double() - self.mean) @ self.directions
        ranks = torch.searchsorted(self.ranks.T.contiguous(), along.T.contiguous()).T
        return from_shares((ranks / len(self.ranks)).numpy())

    def coloured_by(self, hits: Tensor) -> DigitCodes:
        """See :class:`.codes.Codes`: by the directions in which codes that are used differ most,
        each by rank."""
        used = hits.nonzero().flatten()
        return self if len(used) < 2 else self._coloured(self.rows_of(used), hits[used])

    def _coloured(self, rows: Tensor, hits: Tensor) -> DigitCodes:
        weights = (hits.double() / hits.sum())[:, None]
        mean = (weights * rows).sum(dim=0)
        centred = rows.double() - mean
        _, directions = torch.linalg.eigh(centred.T @ (weights * centred))
        directions = directions.flip(1)[:, :3]
        directions = F.pad(directions, (0, 3 - directions.shape[1]))
        ranks = (centred @ directions).sort(dim=0).values
        return replace(self, mean=mean, directions=directions, ranks=ranks)

    def counts(self, hits: Tensor) -> list[list[int]]:
        """How often each channel has each of its digits, where codes are used so often, [K]."""
        used = hits.nonzero().flatten()
        digits, often = self.digits(used), hits[used]
        return [
            torch.zeros(most, dtype=torch.int64).index_add_(0, digits[:, channel], often).tolist()
            for channel, most in enumerate(self.code.counts)
        ]
