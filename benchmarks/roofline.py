"""What the machine can do at best, and how much of it a piece of work needs.

The ceilings are sampled in every round of timing, between the candidates, so that whatever slows
the machine down is seen by both: a fraction of a ceiling is taken within a round.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import DIMS, Case
from benchmarks.timing import seconds

DIM = sum(DIMS)
COPY = "copy"
MULTIPLY_ADD = "float32 multiply-add"
MATRIX_PRODUCT = "float32 matrix product"
BYTE_PRODUCT = "int8 dot product"

COPIED_BYTES = 256 * 2**20  # much more than a last-level cache holds
NATIVE_SECONDS = 0.02

Sample = Callable[[], float]
"""Does some work of one kind and returns its rate: operations or bytes a second."""


@dataclass(frozen=True)
class Ceiling:
    """One limit of a device."""

    name: str
    meaning: str
    sample: Sample


class Native:
    """peak.cpp, compiled for this machine; without a compiler `reason` says so."""

    def __init__(self, folder: Path) -> None:
        self.library: ctypes.CDLL | None = None
        self.reason = ""
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            self.reason = "no C++ compiler"
            return
        target = folder / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        result = subprocess.run(
            [compiler, *flags, str(source), "-o", str(target)], capture_output=True, text=True
        )
        if result.returncode:
            self.reason = f"peak.cpp does not compile: {result.stderr.strip()[:200]}"
            return
        self.library = ctypes.CDLL(str(target))

    def sample(self, function: str, threads: int) -> Sample:
        """Samples a rate of peak.cpp, 0 where the CPU has no such instruction."""
        call = getattr(self.library, function)
        call.argtypes, call.restype = [ctypes.c_int, ctypes.c_double], ctypes.c_double
        return lambda: call(threads, NATIVE_SECONDS)


def _copy(device: str) -> Sample:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * COPIED_BYTES / seconds(lambda: target.copy_(source))


def _matrix_product(device: str, dtype: torch.dtype, precision: str = "highest") -> Sample:
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side).to(device, dtype)
    out = torch.empty_like(a)

    def sample() -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return 2 * side**3 / seconds(lambda: torch.mm(a, a, out=out))
        finally:
            torch.set_float32_matmul_precision(before)

    return sample


@contextmanager
def ceilings(device: str) -> Iterator[tuple[list[Ceiling], dict[str, str]]]:
    """The limits of a device, each sampled once to warm up, and why others are not measured."""
    found = [
        Ceiling(COPY, f"torch copy of {COPIED_BYTES >> 20} MiB, read + written", _copy(device)),
        Ceiling(
            MATRIX_PRODUCT, "torch.mm of square matrices", _matrix_product(device, torch.float32)
        ),
    ]
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":
            half = [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
            found.append(
                Ceiling(
                    "TF32 matrix product",
                    "torch.mm at precision 'high'",
                    _matrix_product(device, torch.float32, "high"),
                )
            )
            found += [
                Ceiling(f"{name} matrix product", "torch.mm", _matrix_product(device, dtype))
                for name, dtype in half
            ]
        else:
            native = Native(Path(folder))
            threads = torch.get_num_threads()
            for name, function, count in [
                (MULTIPLY_ADD, "float_multiply_add_rate", threads),
                (f"{MULTIPLY_ADD}, 1 thread", "float_multiply_add_rate", 1),
                (BYTE_PRODUCT, "byte_dot_product_rate", threads),
            ]:
                if native.library is None:
                    missing[name] = native.reason
                    continue
                sample = native.sample(function, count)
                if sample() > 0:
                    found.append(Ceiling(name, "peak.cpp, from registers alone", sample))
                else:
                    missing[name] = "no such instruction on this CPU"
        for ceiling in found:
            ceiling.sample()
        yield found, missing


# ------------------------------------------------------------------ what work needs


@dataclass(frozen=True)
class Work:
    """Operations of the search, and bytes that have to cross memory at least once."""

    operations: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes


def search_work(rows: int, codes: int) -> Work:
    """2 N K D operations; rows and codes read, an int64 index a row written."""
    return Work(2 * rows * codes * DIM, 4 * DIM * (rows + codes) + 8 * rows)


def quantizer_work(case: Case) -> Work:
    """The search of all scales, and every input and output once.

    Forward reads h and the codebook and writes quantized features, indices and hits; backward reads
    h, the codebook, the indices and a gradient and writes two gradients. What is not the search
    (pooling, upsampling, losses) is not counted: at K = 8,192 it is less than a hundredth.
    """
    plane = 4 * DIM * case.batch * case.sides[-1] ** 2
    codebook = 4 * DIM * case.codebook_size
    moved = 2 * plane + codebook + 8 * case.tokens + 8 * case.codebook_size
    if case.mode == "forward+backward":
        moved += 3 * plane + 2 * codebook + 8 * case.tokens
    return Work(2 * case.tokens * case.codebook_size * DIM, moved)


def arithmetic_ceilings(rates: Iterable[str]) -> list[str]:
    """The ceilings that a search is held against: float32 first, then int8 where it is measured."""
    rates = list(rates)
    first = MULTIPLY_ADD if MULTIPLY_ADD in rates else MATRIX_PRODUCT
    return [first, *(name for name in (BYTE_PRODUCT,) if name in rates)]


def least_seconds(work: Work, arithmetic: float, copy: float) -> float:
    """The roofline: nothing that computes at most at this arithmetic rate is faster."""
    return max(work.operations / arithmetic, work.bytes / copy)


def fractions_of_bounds(
    work: Work, times: Sequence[float], rates: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """For each arithmetic ceiling, the median over rounds of the least time over the time taken."""
    return {
        name: statistics.median(
            least_seconds(work, arithmetic, copy) / taken
            for taken, arithmetic, copy in zip(times, rates[name], rates[COPY], strict=True)
        )
        for name in arithmetic_ceilings(rates)
    }
