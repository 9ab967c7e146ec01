"""Loops of a kernel, and what an iteration takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .disassembly import Code, Instruction
from .occupancy import Multiprocessor
from .pipes import cycles


@dataclass(frozen=True)
class Loop:
    """A loop's own instructions: those of loops inside it are not among them."""

    instructions: tuple[Instruction, ...]
    innermost: bool
    depth: int = 1  # loops that it is in, itself among them

    @cached_property
    def kinds(self) -> Counter[str]:
        return Counter(instruction.kind for instruction in self.instructions)

    @property
    def multiply_adds(self) -> int:
        """A warp and iteration: those of the tensor cores where it uses them, else of float32."""
        tensor = sum(i.multiply_adds for i in self.instructions if i.kind == "tensor")
        return tensor or sum(i.multiply_adds for i in self.instructions)

    @property
    def shared_bytes(self) -> int:
        return sum(i.shared_bytes for i in self.instructions)

    @property
    def lines(self) -> str:
        """Where it is in the source: file:first-last."""
        sources = [i.source for i in self.instructions if i.source]
        if not sources:
            return ""
        file = Counter(name for name, _ in sources).most_common(1)[0][0]
        lines = [line for name, line in sources if name == file]
        return f"{file}:{min(lines)}-{max(lines)}"

    def cycles(self, sm: Multiprocessor) -> dict[str, float]:
        """The least cycles that a warp's iteration takes of a scheduler, by what it occupies."""
        taken = cycles(self.instructions, sm)
        return {name: taken[name] for name in ("issue", "float32", "integer", "tensor")}


Graph = dict[int, set[int]]


def _reached(graph: Graph, start: int, nodes: set[int]) -> set[int]:
    seen, pending = {start}, [start]
    while pending:
        new = (graph[pending.pop()] & nodes) - seen
        seen |= new
        pending.extend(new)
    return seen


def _nested(
    forward: Graph, backward: Graph, nodes: set[int], depth: int = 1
) -> list[tuple[set[int], bool, int]]:
    """Loops within `nodes`, outer ones first: their own nodes, whether none is inside, depth."""
    loops = []
    left = set(nodes)
    while left:
        node = min(left)
        part = _reached(forward, node, nodes) & _reached(backward, node, nodes)
        left -= part
        if len(part) == 1 and node not in forward[node]:
            continue
        entries = [n for n in part if backward[n] - part]
        inner = _nested(forward, backward, part - {min(entries, default=node)}, depth + 1)
        loops.append((part.difference(*(nodes for nodes, _, _ in inner)), not inner, depth))
        loops += inner
    return loops


def find_loops(code: Code) -> list[Loop]:
    """All loops of a kernel, outer ones before those inside them."""
    instructions = code.instructions
    starts = {0, *code.labels.values()}
    starts |= {n + 1 for n, i in enumerate(instructions) if i.targets or not i.falls_through}
    order = sorted(start for start in starts if start < len(instructions))
    blocks = dict(zip(order, [*order[1:], len(instructions)], strict=True))

    forward: Graph = {start: set() for start in blocks}
    for start, end in blocks.items():
        last = instructions[end - 1]
        targets = {code.labels[label] for label in last.targets if label in code.labels}
        if last.falls_through:
            targets.add(end)
        forward[start] = targets & blocks.keys()
    backward: Graph = {start: set() for start in blocks}
    for start, targets in forward.items():
        for target in targets:
            backward[target].add(start)

    loops = []
    for nodes, innermost, depth in _nested(forward, backward, set(blocks)):
        body = [i for start in sorted(nodes) for i in instructions[start : blocks[start]]]
        # A kernel ends in a branch to itself that nothing reaches.
        if any(i.mnemonic != "BRA" for i in body):
            loops.append(Loop(tuple(body), innermost, depth))
    return loops


def hot_loop(loops: Iterable[Loop]) -> Loop | None:
    """The loop that is taken for the kernel's main one.

    It is the innermost loop with the most tensor instructions; where tensor instructions are in
    outer loops only, the one of these with the most; without any, the innermost loop with the most
    FFMA, the longest of equals.
    """
    loops = list(loops)
    inner = [loop for loop in loops if loop.innermost]

    def rank(loop: Loop) -> tuple[int, int, int]:
        ffma = sum(i.mnemonic == "FFMA" for i in loop.instructions)
        return loop.kinds["tensor"], ffma, len(loop.instructions)

    best = max(inner, key=rank, default=None)
    if best is not None and not best.kinds["tensor"]:
        outer = max(loops, key=rank)
        return outer if outer.kinds["tensor"] else best
    return best
