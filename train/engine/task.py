"""What is trained, apart from how: the protocol between a task and the loop (:mod:`.loop`).

A task builds models and their optimizers, reads batches, and turns a batch into gradients; it knows
what to evaluate, show and save. The loop makes the steps: schedule, accumulation, loss scaling, the
average of the weights, checkpoints, resuming, logs. Neither looks into the other:

    batch = next(task.batches(position))        for every micro-batch
    task.micro_step(batch, step)                forward and backward: gradients
    model.update()                              for every model in task.optimized
    task.ema.update(step); task.after_step()
    task.evaluate(), task.pictures(), task.save()    from time to time, with the averaged weights
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tokenflow_ext.models.serialization.state_dict import read_weights

from .ema import EMA
from .optimization import OptimizedModel


class Dataset(Protocol):
    """What a run trains on, as far as the loop is concerned."""

    def describe(self) -> str:
        """The data in a few words."""
        ...


class Task(Protocol):
    """One kind of training. A subclass makes the attributes and fills in what has no default; it is
    made on every process alike, as ``Task(config, group, resuming)``.

    A task seeds the generators (stream 0 of the run's seed) before it draws weights. Where
    ``resuming``, a checkpoint is loaded into it next, so nothing that the checkpoint holds needs to
    be drawn or read.

    Attributes:
        model: what is evaluated and saved.
        optimized: the models with their optimizers, by name, in the order of their updates. The
            first is ``model``; a checkpoint holds each other one under its name.
        ema: of the model's weights; None keeps no average.
        dataset: what is trained on.
        progress: values of a step beside the progress bar.
        evaluation: what the log calls an evaluation, and what its lines say it is of.
        metrics: the values of an evaluation for the summary: by key, (name, format).
    """

    model: nn.Module
    optimized: dict[str, OptimizedModel]
    ema: EMA | None
    dataset: Dataset
    progress: tuple[str, ...]
    evaluation: tuple[str, str]
    metrics: dict[str, tuple[str, str]]

    # -- training ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Before the first step of a new run, weights whole on every process."""

    def batches(self, position: int) -> Iterator[Any]:
        """This process's micro-batches from a data position on, without an end, ready for
        :meth:`micro_step`. A thread may run it ahead: it draws nothing from the global generators
        and reads no weight that is trained."""
        ...

    def micro_step(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Forward and backward passes of a micro-batch (:meth:`OptimizedModel.backward`, once for
        each model that is trained at ``step``, counted from 0); returns its losses, each 0-dim."""
        ...

    def after_step(self, step: int, position: int) -> None:
        """Once the weights were updated: ``step`` steps are done."""

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Values of the model as it is now, in evaluation, alike on every process (every process
        calls this)."""
        ...

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Two rows of images [B, 3, S, S] to show, as :meth:`evaluate`; None where there are none
        (every process calls this)."""
        ...

    def headline(self) -> str:
        """What is trained, on what, for the start of a run."""
        ...

    def step_values(self) -> dict[str, float]:
        """Further values of a step, alike on every process."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Further entries of the run's summary."""
        return {}

    def summary_head(self) -> str:
        """Head of the table at the end of a run."""
        return ""

    def listing(self) -> Iterator[str]:
        """All data by name, the held-out ones too; alike on every process and when resumed."""
        ...

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the model with these weights, ready for use (the first process alone)."""
        ...

    def check(self, path: Path) -> None:
        """That the (whole) checkpoint at ``path`` is of this model.

        Raises:
            CheckpointError: it is not.
        """

    def weights(self, path: Path) -> dict[str, Tensor]:
        """The model's weights in the checkpoint at ``path``, by the names that it has here.

        Raises:
            CheckpointError: a file that is missing, damaged or not finite.
        """
        return read_weights(path)

    def restore(self, path: Path) -> None:
        """Take up what the checkpoint at ``path`` holds besides weights and optimizers."""
