"""Tables of kernels, as text and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .disassembly import KINDS
from .errors import SassError
from .kernels import Kernel
from .occupancy import MULTIPROCESSORS, shared_budget


def markers(block: str) -> tuple[str, str]:
    """The lines between which a document has the block of that name."""
    return f"<!-- {block}: begin -->", f"<!-- {block}: end -->"


@dataclass(frozen=True)
class Table:
    """Rows whose first cell is a name and whose others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = []
        for row in (self.header, *self.rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        rows = [[f"`{row[0]}`", *row[1:]] for row in self.rows]
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, *rows)]
        lines.insert(1, "|" + "|".join(rule) + "|")
        return "\n".join([f"{self.title}:", "", *lines])


def _number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def resource_table(architecture: str, kernels: Sequence[Kernel]) -> Table:
    """What a block takes, and how many fit."""
    rows = []
    for kernel in kernels:
        blocks, sm = kernel.blocks, kernel.multiprocessor
        rows.append(
            [
                kernel.name,
                _number(kernel.threads),
                _number(kernel.registers),
                _number(kernel.static_shared),
                _number(kernel.barriers),
                _number(kernel.stack),
                f"{kernel.spill_stores} / {kernel.spill_loads}",
                f"{kernel.local_stores} / {kernel.local_loads}",
                _number(blocks),
                _number(kernel.occupancy, ".0%"),
                _number(shared_budget(sm, blocks) / 1024 if sm and blocks else None, ",.1f"),
                _number(kernel.instructions),
            ]
        )
    header = ["kernel", "threads", "registers", "static shared", "barriers", "stack"]
    header += ["spilled st/ld", "STL/LDL", "blocks", "occupancy", "KiB each", "instructions"]
    return Table(f"{architecture}, resources", header, rows)


def loop_table(architecture: str, kernels: Sequence[Kernel]) -> Table:
    """What a hot loop issues in an iteration, by kind."""
    looping = [(kernel.name, kernel.hot_loop) for kernel in kernels if kernel.hot_loop]
    kinds = [kind for kind in KINDS if any(loop.kinds[kind] for _, loop in looping)]
    rows = [
        [name, str(len(loop.instructions)), *(str(loop.kinds[kind] or "") for kind in kinds)]
        for name, loop in looping
    ]
    return Table(f"{architecture}, hot loops, warp instructions", ["kernel", "all", *kinds], rows)


def work_table(architecture: str, kernels: Sequence[Kernel]) -> Table:
    """Hot loops that are mostly multiply-adds: what one costs, and what that allows."""
    sm = MULTIPROCESSORS.get(architecture)
    rows = []
    for kernel in kernels:
        loop = kernel.hot_loop
        if sm is None or loop is None or not loop.multiply_adds:
            continue
        # Where multiply-adds are not what the loop is for, a rate of them says nothing.
        ffma = sum(i.mnemonic == "FFMA" for i in loop.instructions)
        if not loop.kinds["tensor"] and 2 * ffma < len(loop.instructions):
            continue
        cycles, work = loop.cycles(sm), loop.multiply_adds
        unit = "tensor" if loop.kinds["tensor"] else "float32"
        known = cycles[unit] > 0
        rows.append(
            [
                kernel.name,
                _number(work),
                _number(1024 * len(loop.instructions) / work, ",.1f"),
                _number(1024 * loop.shared_bytes / work),
                *(_number(cycles[name]) for name in ("issue", "float32", "integer", "tensor")),
                _number(cycles[unit] / max(cycles.values()) if known else None, ".0%") + f" {unit}",
            ]
        )
    header = ["kernel", "multiply-adds", "instructions / 1,024", "shared bytes / 1,024"]
    header += ["issue cycles", "float32 cycles", "integer cycles", "tensor cycles", "at most"]
    return Table(f"{architecture}, multiply-add loops", header, rows)


def tables(kernels: Sequence[Kernel]) -> list[Table]:
    """All tables, architecture by architecture."""
    made: list[Table] = []
    for architecture in dict.fromkeys(kernel.architecture for kernel in kernels):
        chosen = [kernel for kernel in kernels if kernel.architecture == architecture]
        made += [build(architecture, chosen) for build in (resource_table, loop_table, work_table)]
    return [table for table in made if table.rows]


def _around(text: str, block: str) -> tuple[str, str, str]:
    begin, end = markers(block)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SassError(f"the document needs {begin} and after it {end}, once each")
    head, rest = text.split(begin)
    inside, tail = rest.split(end)
    return head, inside.strip("\n"), tail


def block_of(text: str, block: str) -> str:
    """What a document has between the markers of a block.

    Raises:
        SassError: the document does not have each marker once, in order.
    """
    return _around(text, block)[1]


def replace_block(text: str, block: str, content: str) -> str:
    """The document with `content` between the markers of a block.

    Raises:
        SassError: the document does not have each marker once, in order.
    """
    head, _, tail = _around(text, block)
    begin, end = markers(block)
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"
