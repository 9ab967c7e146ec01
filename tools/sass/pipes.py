"""What instructions occupy of a scheduler: one issues in a cycle, and each kind takes its lanes."""

from __future__ import annotations

from collections.abc import Iterable

from .disassembly import Instruction
from .occupancy import WARP, Multiprocessor

PIPES = ("issue", "float32", "integer", "float64", "special", "shared", "tensor")


def cycles(
    instructions: Iterable[Instruction],
    sm: Multiprocessor,
    weights: Iterable[float] | None = None,
) -> dict[str, float]:
    """The least cycles that a warp takes of a scheduler, by what it occupies.

    Args:
        instructions: of the warp.
        sm: the multiprocessor.
        weights: how often each is run; once where not given.

    Returns:
        Cycles of each of `PIPES`. "shared" is the scheduler's part of what shared memory delivers,
        each lane's own word counted. "tensor" is 0 where a tensor instruction's rate is not known.
    """
    taken = dict.fromkeys(PIPES, 0.0)
    instructions = list(instructions)
    known = all(i.tensor_rate for i in instructions if i.kind == "tensor")
    for i, times in zip(instructions, weights or [1.0] * len(instructions), strict=True):
        if not times:
            continue
        taken["issue"] += times
        taken["integer"] += times * i.integer_lanes * WARP / sm.integer_lanes
        taken["shared"] += times * i.shared_bytes / sm.shared_bytes_cycle
        if i.kind == "float32":
            taken["float32"] += times * WARP / sm.float32_lanes
        elif i.kind == "float64":
            taken["float64"] += times * WARP / sm.float64_lanes
        elif i.kind == "special":
            taken["special"] += times * WARP / sm.special_lanes
        elif i.kind == "tensor" and known:
            taken["tensor"] += times * i.multiply_adds / (i.tensor_rate * sm.tensor_multiply_adds)
    return taken
