"""What a kernel's machine code must keep to so that other threads see what they should.

None of it shows on a CPU: the emulation has no caches and no reordering.
"""

from __future__ import annotations

import re

from .disassembly import Code, Instruction

#: Kernels in which the last block to arrive reads what the others wrote.
LAST_BLOCK = frozenset({"sum_segments_kernel"})

#: Kernels that read what threads of the same launch write: not by the cache for constants.
READS_OWN_WRITES = LAST_BLOCK | {"scalar_quantize_kernel"}


def problems(name: str, code: Code) -> list[str]:
    """What is wrong with the fences, loads and asynchronous copies of the kernel `name`."""
    kernel = name.partition("<")[0]
    found = []
    if kernel in LAST_BLOCK:
        found += _arrival(code.instructions)
    if kernel in READS_OWN_WRITES:
        cached = sum(i.mnemonic == "LDG" and ".CONSTANT" in i.opcode for i in code.instructions)
        if cached:
            found.append(f"{cached} loads by the cache for constants of what the launch writes")
    return found + _copies(code.instructions) + _warpgroups(code.instructions)


def _arrival(instructions: list[Instruction]) -> list[str]:
    """The counter of blocks: fence, atomic, fence, with no access to what is counted between."""
    arrivals = [
        number
        for number, i in enumerate(instructions)
        if i.mnemonic in ("ATOM", "ATOMG") and not i.operands.startswith(("RZ", "PT, RZ"))
    ]
    if not arrivals:
        return ["no atomic counts the blocks that have arrived"]
    found = []
    for number in arrivals:
        before = [i.mnemonic for i in instructions[:number]]
        after = [i.mnemonic for i in instructions[number + 1 :]]
        if "MEMBAR" not in before or "STG" in before[_last(before, "MEMBAR") :]:
            found.append("no fence between what a block writes and its arrival")
        if "MEMBAR" not in after or "LDG" in after[: after.index("MEMBAR")]:
            found.append("no fence between an arrival and what the last block reads")
    return found


def _last(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def _copies(instructions: list[Instruction]) -> list[str]:
    """A wait lets run one group of copies fewer than were begun: the oldest has arrived."""
    begun, found = 0, []
    for i in instructions:
        if i.mnemonic == "LDGDEPBAR":
            begun += 1
        elif i.mnemonic == "DEPBAR" and begun:
            running = re.search(r"SB0, (0x[0-9a-f]+|\d+)", i.operands)
            left = int(running.group(1), 0) if running else 0
            if left != begun - 1:
                found.append(f"a wait leaves {left} of {begun} groups of copies")
            return found
    return ["copies that nobody waits for"] if begun else found


def _warpgroups(instructions: list[Instruction]) -> list[str]:
    """Products of warpgroups: a fence before them, a wait after, and only then an arrival."""
    running, fenced, found = False, False, []
    for i in instructions:
        if i.opcode.startswith("WARPGROUP.ARRIVE"):
            fenced = True
        elif "GMMA" in i.mnemonic:
            if not fenced:
                found.append("products of a warpgroup without a fence before them")
                fenced = True
            running = True
        elif i.opcode.startswith("WARPGROUP.DEPBAR") and i.operands.endswith("0x0"):
            running = fenced = False
        elif running and (i.opcode.startswith("SYNCS.ARRIVE") or i.mnemonic == "FMNMX"):
            found.append(f"{i.mnemonic} before the wait for products of a warpgroup")
            running = False
    return [*found, "products of a warpgroup that nobody waits for"] if running else found
