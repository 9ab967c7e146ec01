"""What is measured: the pyramids, the inputs and the calls, ours and the baselines'."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.searches import SEARCHES
from tokenflow_ext import MultiScaleQuantizer

DIMS = (32, 8)
PYRAMIDS = {
    "B": (1, 2, 4, 6, 8, 10, 12, 14),
    "XL": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
    "tiny": (1, 2),  # warms up, never measured
}
Mode = Literal["forward", "forward+backward"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
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
    def tokens(self) -> int:
        """Rows of all scales."""
        return self.batch * sum(side * side for side in self.sides)

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


Make = Callable[[Case, MultiScaleQuantizer], Callable[[Tensor], Any]]


def _baseline(step: Callable[..., Any]) -> Make:
    def make(case: Case, quantizer: MultiScaleQuantizer) -> Callable[[Tensor], Any]:
        codebooks = list(quantizer.codebooks)
        return lambda h: step(h, codebooks, case.sides, quantizer.beta)

    return make


def _searching(name: str) -> Make:
    """The eager form around another search."""

    def make(case: Case, quantizer: MultiScaleQuantizer) -> Callable[[Tensor], Any]:
        search = SEARCHES[name].prepare(case.codebook_size, sum(DIMS), case.device)
        return _baseline(functools.partial(baselines.eager, search=search))(case, quantizer)

    return make


@functools.cache
def _compiled_eager() -> Callable[..., Any]:
    return torch.compile(baselines.eager, dynamic=False)


@dataclass(frozen=True)
class Implementation:
    """Something that does the work of a case."""

    make: Make
    """(case, quantizer that holds the codebooks) -> function of features."""
    includes: str
    """What a call does, for the report."""
    bytes_per_score: int
    """Memory it may need for each element of the largest N x K matrix, to tell whether it fits."""
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False

    @property
    def foreign(self) -> bool:
        """Other people's code does the work: where it fails, the table says so."""
        return self.compiled or self.package is not None


IMPLEMENTATIONS = {
    "ours": Implementation(lambda case, quantizer: quantizer, "`MultiScaleQuantizer`", 0),
    "released": Implementation(
        _baseline(baselines.released),
        "what TokenFlow's authors published, written anew: at every scale both codebooks "
        "normalised, three distance matrices [N, K], argmin, a one-hot matrix, area and bicubic "
        "F.interpolate. Their code also forms the mean square of two distance matrices and, in "
        "training, a softmax entropy times zero and the distinct codes of a window; this does not",
        24,
    ),
    "eager": Implementation(
        _baseline(baselines.eager),
        "the plainest good eager form: the codebook normalised once, one matrix product, argmax, "
        "gather",
        8,
    ),
    "compiled": Implementation(
        _baseline(lambda *args: _compiled_eager()(*args)),
        "torch.compile of the eager form",
        8,
        compiled=True,
    ),
    "VectorQuantize": Implementation(
        _searching("VectorQuantize"),
        "the eager form with vector-quantize-pytorch's VectorQuantize as the search: cosine "
        "similarity over both groups joined, codes copied in once a call, its own updates off",
        24,
        "vector_quantize_pytorch",
    ),
    "faiss": Implementation(
        _searching("faiss IndexFlatIP"),
        "the eager form with faiss's IndexFlatIP as the search, filled anew in each call",
        8,
        "faiss",
        ("cpu",),
    ),
}


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    return psutil.virtual_memory().available


def available_baselines(case: Case, compile_too: bool) -> dict[str, str | None]:
    """Each baseline of a case, with the reason if it cannot be run here."""
    found: dict[str, str | None] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        if name == "ours" or case.device not in implementation.devices:
            continue
        if implementation.compiled and not compile_too:
            continue
        needed = implementation.bytes_per_score * case.rows * case.codebook_size
        free = free_memory(case.device)
        if implementation.package and importlib.util.find_spec(implementation.package) is None:
            found[name] = "not installed"
        elif needed > 0.8 * free:
            found[name] = f"needs {needed / 2**30:.1f} of {free / 2**30:.1f} GiB free"
        else:
            found[name] = None
    return found


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
    function = IMPLEMENTATIONS[name].make(case, quantizer)
    return Call(function, h, list(quantizer.codebooks), grad)
