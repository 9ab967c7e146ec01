"""How many blocks of a kernel a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """A multiprocessor has four schedulers; each issues one warp instruction a cycle.

    CUDA C++ Programming Guide: technical specifications and arithmetic throughput a compute
    capability; the white papers of A100 and H100 for the tensor cores (dense, float16).
    """

    shared_bytes: int
    shared_bytes_block: int  # the most that one block may ask for
    float32_lanes: int  # a scheduler
    tensor_multiply_adds: int  # a scheduler and cycle
    float64_lanes: int  # a scheduler
    integer_lanes: int = 16  # a scheduler: additions, logic, comparisons, minima and maxima
    special_lanes: int = 4  # a scheduler: reciprocals, roots, and conversions from and to 64 bits
    shared_bytes_cycle: int = 32  # a scheduler's part of what shared memory delivers
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(
        164 << 10, 163 << 10, float32_lanes=16, tensor_multiply_adds=256, float64_lanes=8
    ),
    "sm_90": Multiprocessor(
        228 << 10, 227 << 10, float32_lanes=32, tensor_multiply_adds=512, float64_lanes=16
    ),
}
MULTIPROCESSORS["sm_90a"] = MULTIPROCESSORS["sm_90"]
SCHEDULERS = 4
WARP = 32
RESERVED_SHARED = 1024  # bytes of each block that the system keeps, from sm_80 on


def round_down(value: int, multiple: int) -> int:
    """The largest multiple that is not above the value."""
    return value // multiple * multiple


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


def blocks_resident(sm: Multiprocessor, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once: the rules of `cuda_occupancy.h`.

    Args:
        sm: the multiprocessor.
        threads: threads of a block.
        registers: registers of a thread.
        shared: bytes of shared memory of a block, without the reserved ones.
    """
    warps = -(-threads // WARP)
    # Registers come in runs of 256 a warp, out of the scheduler's own quarter of the file.
    warps_fitting = (
        sm.registers // SCHEDULERS // round_up(max(registers, 1) * WARP, 256) * SCHEDULERS
    )
    return min(
        sm.blocks,
        sm.threads // WARP // warps,
        warps_fitting // warps,
        sm.shared_bytes // round_up(shared + RESERVED_SHARED, 128),
    )


def shared_budget(sm: Multiprocessor, blocks: int) -> int:
    """Bytes of shared memory a block may have, static and dynamic, with `blocks` resident."""
    return min(sm.shared_bytes_block, round_down(sm.shared_bytes // blocks, 128) - RESERVED_SHARED)
