"""Watching for numbers that are not finite, without waiting for the device at every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext.models.serialization.pretrained import not_finite

from .distributed import Processes


class LossWatch:
    """Remembers, on the device, which of the values of steps were not finite."""

    def __init__(self, group: Processes) -> None:
        self.group = group
        self._names: list[str] = []
        self._bad: Tensor | None = None

    def add(self, values: dict[str, Tensor], names: Iterable[str]) -> None:
        """Note the values of a step under these names: those of the steps before (see
        :meth:`differs`), unless :meth:`take` was called since."""
        self._names = sorted(names)
        bad = ~torch.stack([values[name].detach().float() for name in self._names]).isfinite()
        self._bad = bad if self._bad is None else self._bad | bad

    def differs(self, names: Iterable[str]) -> bool:
        """Whether values under other names are noted."""
        return self._bad is not None and sorted(names) != self._names

    def take(self) -> list[str]:
        """Names of the values that were not finite on any process since the last call (every
        process calls this)."""
        if self._bad is None:
            return []
        counts = self.group.sum_(self._bad.float()).tolist()
        self._bad = None
        return [name for name, count in zip(self._names, counts, strict=True) if count]


def bad_numbers(state: dict[str, Any], weights: dict[str, Tensor]) -> list[str]:
    """What in a checkpoint is not finite; the values before the first step do not matter."""
    return not_finite({k: v for k, v in state.items() if k != "first"} | {"weights": weights})
