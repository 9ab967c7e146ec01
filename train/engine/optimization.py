"""How a model is optimized: precision, learning rate, and a step of AdamW over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tokenflow_ext.train.config import OptimConfig, TextOptimConfig

from . import parallel
from .distributed import Processes

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(step: int, config: OptimConfig | TextOptimConfig) -> float:
    """The factor of the learning rate at an optimizer step: linear warm-up, then the schedule."""
    if step < config.warmup:
        return config.warmup_lr + (1 - config.warmup_lr) * (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    if config.schedule == "linear":
        down = max(0.0, done - config.flat) / (1 - config.flat)
        return 1 - (1 - config.final_lr) * down
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Where forward passes and losses are computed at ``optim.precision``."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class OptimizedModel:
    """A model with all that trains it: AdamW, its schedule, loss scaling, exchange of gradients.

    Args:
        module: gradients of all its parameters are clipped together.
        parameters: those that are trained, or groups of them with learning rates of their own,
            which the schedule scales as it does ``lr``.
        lr: the learning rate.
        config: the section ``optim`` of the run.
        group: the processes that share each batch.
        start: the optimizer step of the run from which on this model is trained.
        called: what a training step calls; None is the module. It may wrap the module.
        kept: parameters that :func:`parallel.split_weights` left whole on every process.
        find_unused: a training step may leave parameters without a gradient.

    Attributes:
        parallel: what to call in a training step, for DDP's sake; set by :meth:`distribute`.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        config: OptimConfig | TextOptimConfig,
        group: Processes,
        *,
        start: int = 0,
        called: nn.Module | None = None,
        kept: Iterable[nn.Parameter] = (),
        find_unused: bool = False,
    ) -> None:
        self.module, self.config, self.group, self.start = module, config, group, start
        self.parallel = module if called is None else called
        self.kept, self.find_unused = tuple(kept), find_unused
        first, second = config.betas
        self.optimizer = torch.optim.AdamW(
            parameters, lr=lr, betas=(first, second), weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(start + step, config)
        )
        half = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=half)

    def distribute(self) -> None:
        """Share the work among the processes, once the weights are what training starts with."""
        options = {"find_unused_parameters": True} if self.find_unused else {}
        self.parallel = parallel.distribute(self.parallel, self.group, **options)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def exchange(self, last: bool) -> AbstractContextManager[Any]:
        """For the passes of a micro-batch; gradients are exchanged in the last one of a step."""
        return parallel.exchange(self.parallel, last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss (0-dim) to those of the step."""
        self.scaler.scale(loss / self.config.accumulate).backward()

    def update(self) -> Tensor:
        """One step of the optimizer and the schedule; returns the gradients' norm (0-dim)."""
        if parallel.is_split(self.module):
            parallel.average_gradients(self.kept, self.group)
        with record_function("optimizer"):
            self.scaler.unscale_(self.optimizer)
            limit = self.config.max_grad_norm
            norm = parallel.clip_gradients(
                self.module.parameters(), limit if limit > 0 else math.inf
            )
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        return norm

    def state(self) -> dict[str, Any]:
        """Of optimizer, schedule and loss scaling (every process calls this)."""
        return {
            "optimizer": parallel.optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`; options stay those that this one was made with.

        Raises:
            ValueError: another optimizer's or schedule's.
        """
        parallel.load_optimizer_state(self.optimizer, state["optimizer"])
        parallel.load_scheduler_state(self.scheduler, state["scheduler"])
        if state["scaler"]:  # of a run without loss scaling it is empty
            self.scaler.load_state_dict(state["scaler"])
