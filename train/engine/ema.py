"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .parallel import local_part, whole


class EMA:
    """The moving average of weights, each split over processes as the weight is.

    The decay starts low, as (1 + t) / (10 + t), so that the first steps are forgotten.

    Args:
        parameters: those that change in training, by name.
        decay: the share of the average that a step keeps, in the end.

    Attributes:
        weights: the averages, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        mine = [local_part(w) for w in self.weights.values()]
        return mine, [local_part(p.detach()) for p in self.parameters.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer step ``step`` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(*self._pairs(), None)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for mine, theirs in zip(*self._pairs(), strict=True):
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the place of the weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def averaged_state(
        self, model: nn.Module, state: dict[str, Tensor], keep: bool
    ) -> dict[str, Tensor]:
        """``state`` with the averages in the place of the weights that they are of; what has no
        average is shared with it, not copied (every process calls this).

        Args:
            state: :func:`parallel.model_state` of the model.
            keep: as there; otherwise the result is empty.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        found = dict(state)
        for key, value in model.state_dict(keep_vars=True).items():
            if id(value) in names:
                average = whole(self.weights[names[id(value)]])
                if keep:
                    found[key] = average.detach().cpu().clone()
        return found
