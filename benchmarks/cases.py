"""What is measured: the pyramids, the inputs and the calls, ours and the baselines'."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import baselines
from tokenflow_ext import MultiScaleQuantizer

DIMS = (32, 8)
PYRAMIDS = {
    "B": (1, 2, 4, 6, 8, 10, 12, 14),
    "XL": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
    "tiny": (1, 2),  # warms up, never measured
}
Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    pyramid: str
    codebook_size: int
    mode: Mode
    batch: int
    device: str = "cpu"

    @property
    def sides(self) -> tuple[int, ...]:
        return PYRAMIDS[self.pyramid]

    @property
    def rows(self) -> int:
        """Rows of the largest scale, N of the largest N x K matrix."""
        return self.batch * self.sides[-1] ** 2


@dataclass
class Call:
    """A quantizer with its inputs; calling it does the measured work.

    It returns (output, gradients of [h, *codebooks]) or (output, None) in forward mode.
    """

    function: Callable[[Tensor], Any]
    h: Tensor
    codebooks: list[Tensor]
    grad: Tensor | None

    def __call__(self) -> tuple[Any, tuple[Tensor, ...] | None]:
        if self.grad is None:
            with torch.no_grad():
                return self.function(self.h), None
        out = self.function(self.h)
        loss = out.vq_loss + out.commitment_loss
        wanted = [self.h, *self.codebooks]
        return out, torch.autograd.grad([out.quantized, loss], wanted, [self.grad, None])


def _baseline(step: Callable[..., Any]) -> Callable[[Case, MultiScaleQuantizer], Callable]:
    def build(case: Case, quantizer: MultiScaleQuantizer) -> Callable[[Tensor], Any]:
        codebooks = list(quantizer.codebooks)
        return lambda h: step(h, codebooks, case.sides, quantizer.beta)

    return build


@functools.cache
def _compiled_eager() -> Callable[..., Any]:
    return torch.compile(baselines.eager, dynamic=False)


# Name -> function of (case, quantizer that holds the codebooks).
IMPLEMENTATIONS: dict[str, Callable[[Case, MultiScaleQuantizer], Callable[[Tensor], Any]]] = {
    "ours": lambda case, quantizer: quantizer,
    "released": _baseline(baselines.released),
    "eager": _baseline(baselines.eager),
    "compiled": _baseline(lambda *args: _compiled_eager()(*args)),
}


def build(case: Case, name: str, seed: int = 0) -> Call:
    """The call of one implementation; the same inputs for the same seed, on any device."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = MultiScaleQuantizer(case.codebook_size, DIMS, case.sides, scale_drop=0.0)
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook.copy_(torch.randn(codebook.shape, generator=generator))
    quantizer.to(case.device)
    backward = case.mode == "forward+backward"
    quantizer.train(backward)
    shape = (case.batch, sum(DIMS), case.sides[-1], case.sides[-1])
    h = torch.randn(shape, generator=generator).to(case.device).requires_grad_(backward)
    grad = torch.randn(shape, generator=generator).to(case.device) if backward else None
    function = IMPLEMENTATIONS[name](case, quantizer)
    return Call(function, h, list(quantizer.codebooks), grad)
