"""What times the counted instructions, the bytes and the peak rates of a device allow.

A launch takes at least as long as its instructions occupy the schedulers and lanes of the
multiprocessor with most blocks, as its bytes take through the L2 or from memory, and as the chain
of loads and dependent instructions of one warp takes, as often as blocks follow each other. The
estimate is the largest of these. Where products and other instructions do not run side by side,
the times of their lanes add up: a range is given where there are products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .devices import (
    BARRIER_CYCLES,
    DEPENDENT_CYCLES,
    L2_BYTES_CYCLE,
    L2_CYCLES,
    LEAST_MICROSECONDS,
    Device,
)
from .errors import SassError
from .kernels import Kernel
from .occupancy import SCHEDULERS
from .pipes import PIPES, cycles
from .programs import Program
from .source import Listing, Sources

BYTES_TERMS = ("L2", "memory")
TERMS = (*PIPES, *BYTES_TERMS, "latency")


#: From the cycles of a program to those of another that does the same.
Change = Callable[[dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: how many warps run the program, and what all of them move."""

    program: Program
    warps: int
    block_warps: int
    l2_bytes: float = 0
    memory_bytes: float = 0
    balanced: bool = False  # shared out evenly, and with work for more than a chain of loads


@dataclass(frozen=True)
class Times:
    """Microseconds of a launch by what takes them: `TERMS`."""

    terms: dict[str, float]

    @property
    def least(self) -> float:
        """Everything side by side."""
        return max(*self.terms.values(), LEAST_MICROSECONDS)

    @property
    def most(self) -> float:
        """Products and what takes the other lanes one after the other."""
        if not self.terms["tensor"]:
            return self.least
        return max(self.least, sum(self.terms[name] for name in ("tensor", "integer", "float32")))

    @property
    def binds(self) -> str:
        """The term that is the estimate."""
        term = max(self.terms, key=lambda name: self.terms[name])
        return term if self.terms[term] >= LEAST_MICROSECONDS else "launch"


class Counts:
    """Cycles of programs, by the machine code of one architecture."""

    def __init__(self, kernels: Iterable[Kernel], sources: Sources, device: Device) -> None:
        self._kernels = {k.name: k for k in kernels if k.architecture == device.architecture}
        self._sources = sources
        self._device = device
        self._listings: dict[str, Listing] = {}
        self._found: dict[Program, dict[str, float]] = {}

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name.

        Raises:
            SassError: there is none in the objects.
        """
        if name not in self._kernels:
            raise SassError(f"no {name} for {self._device.architecture} in the objects")
        return self._kernels[name]

    def cycles(self, program: Program) -> dict[str, float]:
        """What a warp that runs the program takes of a scheduler, by `PIPES`."""
        if program not in self._found:
            code = self.kernel(program.kernel).code
            if program.kernel not in self._listings:
                self._listings[program.kernel] = Listing(code, self._sources)
            times = self._listings[program.kernel].weights(program.parts, program.once)
            taken = cycles(code.instructions, self._device.sm, times)
            if not any("GMMA" in i.mnemonic for i in code.instructions):
                taken["tensor"] /= self._device.mma_share
            self._found[program] = taken
        return self._found[program]

    def times(self, launch: Launch, change: Change | None = None) -> Times:
        """What a launch takes, if `change` makes of its cycles what other code would take."""
        device, taken = self._device, self.cycles(launch.program)
        if change is not None:
            taken = change(taken)
        blocks = -(-launch.warps // launch.block_warps)
        share = blocks / device.multiprocessors
        busiest = share if launch.balanced else math.ceil(share)
        warps = busiest * launch.block_warps / SCHEDULERS
        terms = {pipe: warps * taken[pipe] / device.cycles_microsecond for pipe in PIPES}
        l2 = L2_BYTES_CYCLE * device.cycles_microsecond
        terms["L2"] = launch.l2_bytes / l2
        terms["memory"] = 1e6 * launch.memory_bytes / device.copy_bandwidth
        program = launch.program
        chain = program.loads * L2_CYCLES + program.barriers * BARRIER_CYCLES
        chain += taken["issue"] * DEPENDENT_CYCLES
        resident = self.kernel(program.kernel).blocks or 1
        rounds = 0 if launch.balanced else math.ceil(busiest / resident)
        terms["latency"] = rounds * chain / device.cycles_microsecond
        return Times(terms)


@dataclass(frozen=True)
class Line:
    """One kernel of an example: its launches, and what was measured of it on a device."""

    example: str
    kernel: str
    launches: Callable[[Device], list[Launch]]
    measured: dict[str, str]  # by the device's name

    def estimate(self, counts: Counts, device: Device) -> tuple[float, float, str]:
        """The least and the most microseconds, and the term that takes most of the least."""
        times = [counts.times(launch) for launch in self.launches(device)]
        binds: dict[str, float] = {}
        for t in times:
            binds[t.binds] = binds.get(t.binds, 0.0) + t.least
        longest = max(binds, key=lambda term: binds[term])
        return sum(t.least for t in times), sum(t.most for t in times), longest
