"""Pictures of units as batches of pixels, decoded in this process or by workers beside it.

What is in a batch hangs on the unit and the batch's size alone, never on who decodes it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tokenflow_ext.train.data.crops import raised
from tokenflow_ext.train.data.image_files import BrokenImageError, open_image, to_square
from tokenflow_ext.train.data.places import place
from tokenflow_ext.train.data.text_files import DataError, Tally

from .sources import Keys, Sample, Unit, samples
from .writing import Row


@dataclass
class Batch:
    """Consecutive pictures of a unit.

    ``pixels`` is uint8 [n, S, S, 3], of ``rows``. ``last`` is of the unit. ``broken`` are (name,
    kind of failure, message) of those that cannot be decoded, ``left`` counts what else was left
    out.
    """

    unit: int
    number: int
    last: bool
    pixels: torch.Tensor
    rows: list[Row]
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    left: Tally | None = None


class Decoded(IterableDataset[Any]):
    """The batches of units. Of several workers each takes whole WebDataset shards, which are read
    as streams, and some of the batches of every unit of a folder.

    Args:
        size: side of the square that is taken of each picture.
        batch_size: pictures in a batch, broken ones included.
    """

    def __init__(self, units: Sequence[Unit], size: int, batch_size: int, keys: Keys) -> None:
        self.units, self.size, self.batch_size, self.keys = units, size, batch_size, keys

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for unit, number in itertools.islice(self._tasks(), first, None, step):
                yield from self._batches(unit, number)
        except DataError as error:  # a worker's would come with its traceback as the message
            yield error

    def _tasks(self) -> Iterator[tuple[Unit, int | None]]:
        """(unit, number of a batch, or None for all of them)."""
        for unit in self.units:
            if unit.tar:
                yield unit, None
            else:
                for number in range(-(-len(unit.pictures) // self.batch_size)):
                    yield unit, number

    def _batches(self, unit: Unit, number: int | None) -> Iterator[Batch]:
        left = Tally(unit.tar, everyone=True)
        if number is not None:
            start = number * self.batch_size
            part = Unit(unit.number, unit.pictures[start : start + self.batch_size])
            batch = self._decode(unit, number, list(samples(part, self.keys, left)))
            batch.last = start + self.batch_size >= len(unit.pictures)
            yield batch
            return
        before: Batch | None = None
        found = samples(unit, self.keys, left)
        for number in itertools.count():
            some = list(itertools.islice(found, self.batch_size))
            if before is not None:
                before.last = not some
                before.left = left if before.last else None
                yield before
            if not some and number:
                return
            before = self._decode(unit, number, some)

    def _decode(self, unit: Unit, number: int, some: list[Sample]) -> Batch:
        squares, rows, broken = [], [], []
        for sample in some:
            try:
                source = place(sample.place) if sample.content is None else sample.place
                image = open_image(source, sample.content)
                squares.append(np.asarray(to_square(image, self.size)))
            except BrokenImageError as error:
                kind = re.sub(r"\d+", "N", error.why)
                name = f"{unit.source}/{sample.row.image}" if unit.tar else sample.row.image
                broken.append((name, kind, str(error)))
                continue
            rows.append(sample.row)
        shape = (len(rows), self.size, self.size, 3)
        pixels = (
            torch.from_numpy(np.stack(squares)) if rows else torch.zeros(shape, dtype=torch.uint8)
        )
        return Batch(unit.number, number, False, pixels, rows, broken)


def read_batches(dataset: Decoded, workers: int) -> Iterator[Batch]:
    """The batches of a dataset, those of a unit in order.

    Args:
        workers: processes that decode; 0 is this one.

    Raises:
        DataError: a unit that cannot be read, or a worker that has ended.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        # The loader draws a seed for its workers, by default from the global generator.
        generator=torch.Generator().manual_seed(0),
    )
    yield from raised(loader)
