"""The documents that hold what this prints, and whether they still do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .devices import DEVICES, Device
from .estimates import Counts
from .examples import count_table, rate_table, time_table
from .kernels import Kernel
from .objects import ROOT
from .report import block_of, replace_block, tables
from .source import Sources
from .variants import variant_table

SOURCES = Sources((ROOT / "csrc/cuda", ROOT / "csrc/common"))
KERNELS_PAGE = ROOT / "docs/kernels.md"


Made = Callable[[Sequence[Kernel], Mapping[Device, Counts]], str]


def _machine_code(kernels: Sequence[Kernel], _: Mapping[Device, Counts]) -> str:
    return "\n\n".join(table.markdown() for table in tables(kernels))


def _estimates(_: Sequence[Kernel], counts: Mapping[Device, Counts]) -> str:
    devices = "\n".join(f"- {device.name}: {device.source}." for device in counts)
    made = (count_table(counts), time_table(counts), rate_table(counts))
    return "\n\n".join([devices, *(table.markdown() for table in made)])


def _arithmetic(_: Sequence[Kernel], counts: Mapping[Device, Counts]) -> str:
    return variant_table(counts).markdown()


#: Each block: the document, the block's name, and what makes it.
BLOCKS: list[tuple[Path, str, Made]] = [
    (ROOT / "docs/benchmarks/machine-code/report.md", "sass", _machine_code),
    (KERNELS_PAGE, "estimates", _estimates),
    (KERNELS_PAGE, "arithmetic", _arithmetic),
]
#: Documents are of the devices that times are estimated for, whatever else was compiled.
ARCHITECTURES = frozenset(device.architecture for device in DEVICES)


def _contents(
    kernels: Sequence[Kernel], compiler: str
) -> Iterator[tuple[Path, str, Callable[[], str]]]:
    """Each block's document and name, and what makes its text."""
    chosen = [kernel for kernel in kernels if kernel.architecture in ARCHITECTURES]
    counts = {device: Counts(chosen, SOURCES, device) for device in DEVICES}
    for path, name, make in BLOCKS:
        yield path, name, lambda make=make: f"Compiled by {compiler}.\n\n{make(chosen, counts)}"


def write(kernels: Sequence[Kernel], compiler: str) -> None:
    """Renews every block."""
    for path, name, content in _contents(kernels, compiler):
        path.write_text(replace_block(path.read_text(), name, content()))


def out_of_date(kernels: Sequence[Kernel], compiler: str) -> tuple[list[str], list[str]]:
    """The blocks that are not what they would be, and those that cannot be compared.

    Another compiler makes other machine code.
    """
    old, other = [], []
    compiled = {kernel.architecture for kernel in kernels}
    for path, name, content in _contents(kernels, compiler):
        held, called = block_of(path.read_text(), name), f"{path.name} ({name})"
        if not held.startswith(f"Compiled by {compiler}.\n") or not compiled >= ARCHITECTURES:
            other.append(called)
        elif held != content():
            old.append(called)
    return old, other
