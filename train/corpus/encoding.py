"""Batches of pixels to tokens, unit by unit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.data.text_files import Tally
from tokenflow_ext.train.engine.precision import arithmetic

from .decoding import Batch
from .writing import Row


@dataclass
class EncodedUnit:
    """What has been made of a unit: tokens [n, L] of ``rows``, None where no picture can be read,
    and what is left out (see :class:`.decoding.Batch`)."""

    number: int
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left: Tally | None = None
    codes: list[Tensor] = field(default_factory=list)
    _waiting: int | None = None  # batches that are to come, once the last one is known
    _seen: int = 0

    @property
    def tokens(self) -> Tensor | None:
        """int32 [n, L] on the CPU."""
        return torch.cat(self.codes) if self.codes else None

    def add(self, batch: Batch, codes: Tensor | None) -> bool:
        """Add the next batch; whether it was the last."""
        self.rows += batch.rows
        self.skipped += [name for name, _, _ in batch.broken]
        self.left = batch.left or self.left
        if codes is not None:
            self.codes.append(codes)
        self._seen += 1
        if batch.last:
            self._waiting = batch.number + 1
        return self._seen == self._waiting


class Encoder:
    """A tokenizer that takes decoded pixels.

    Args:
        dtype: of the encoders' arithmetic (:func:`arithmetic`).
    """

    def __init__(
        self, model: TokenFlowTokenizer, device: torch.device, dtype: str = "float32"
    ) -> None:
        self.model, self.device, self.dtype = model.to(device).eval(), device, dtype

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] -> tokens int32 [n, L] on the device."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = images.div_(127.5).sub_(1.0)
        with arithmetic(self.device, self.dtype):
            return self.model.encode(images).to(torch.int32)


def encode_units(
    batches: Iterable[Batch], encode: Callable[[Tensor], Tensor], ahead: int = 0
) -> Iterator[EncodedUnit]:
    """Units in the order in which they are complete. The batches of one unit come in order, those
    of several may come between each other.

    Args:
        ahead: batches that may be under way on the device before their tokens are waited for.
    """
    units: dict[int, EncodedUnit] = {}
    under_way: deque[tuple[Batch, Tensor | None]] = deque()

    def complete(left: int) -> Iterator[EncodedUnit]:
        while len(under_way) > left:
            batch, codes = under_way.popleft()
            unit = units.setdefault(batch.unit, EncodedUnit(batch.unit))
            if unit.add(batch, None if codes is None else codes.cpu()):
                yield units.pop(batch.unit)

    for batch in batches:
        under_way.append((batch, encode(batch.pixels) if batch.rows else None))
        yield from complete(ahead)
    yield from complete(0)
