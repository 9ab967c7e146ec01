"""A kernel as compiled: registers, shared and local memory, its hot loop."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from . import protocols
from .control_flow import Loop, find_loops, hot_loop
from .disassembly import KINDS, Code
from .occupancy import (
    MULTIPROCESSORS,
    RESERVED_SHARED,
    WARP,
    Multiprocessor,
    blocks_resident,
    round_up,
)

#: What is left of a kernel without a body: the stack's pointer, and the end.
_RETURNING = frozenset({"MOV", "LDC", "EXIT", "BRA", "NOP"})


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture."""

    architecture: str
    name: str  # without namespaces and parameters
    symbol: str
    registers: int  # a thread
    threads: int | None  # the most a block may have: __launch_bounds__
    static_shared: int  # bytes
    stack: int  # bytes of a thread's stack frame
    barriers: int | None
    instructions: int
    spill_stores: int  # bytes, as ptxas counts them: each instruction once
    spill_loads: int
    local_stores: int  # instructions, spills among them
    local_loads: int
    loops: int
    hot_loop: Loop | None = None
    protocol: tuple[str, ...] = ()  # what is wrong with fences, loads and copies
    code: Code = field(default_factory=Code, repr=False)

    @property
    def empty(self) -> bool:
        """Whether it only returns: a kernel made for another architecture."""
        return all(i.mnemonic in _RETURNING for i in self.code.instructions)

    @property
    def multiprocessor(self) -> Multiprocessor | None:
        return MULTIPROCESSORS.get(self.architecture)

    @property
    def blocks(self) -> int | None:
        """Resident blocks by registers, threads and static shared memory; None where not known."""
        sm = self.multiprocessor
        if sm is None or self.threads is None:
            return None
        return blocks_resident(sm, self.threads, self.registers, self.static_shared)

    @property
    def occupancy(self) -> float | None:
        """Resident warps over those that a multiprocessor can hold."""
        sm, blocks = self.multiprocessor, self.blocks
        if sm is None or blocks is None or self.threads is None:
            return None
        return blocks * round_up(self.threads, WARP) / sm.threads

    def problem(self) -> str | None:
        """What the kernel keeps in local memory or does against a protocol, or None."""
        parts = list(self.protocol)
        if self.stack:
            parts.append(f"a stack frame of {self.stack} bytes")
        if self.spill_stores or self.spill_loads:
            parts.append(
                f"spills ({self.spill_stores} bytes stored, {self.spill_loads} bytes loaded)"
            )
        if self.local_stores or self.local_loads:
            hot = self.hot_loop.kinds["local"] if self.hot_loop else 0
            parts.append(
                f"local memory ({self.local_stores} STL, {self.local_loads} LDL; "
                f"{hot} of them in the hot loop)"
            )
        return ", ".join(parts) or None

    def as_json(self) -> dict[str, object]:
        """All numbers, for `--json`."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("protocol", "code"):
            del record[name]
        record |= {"blocks": self.blocks, "occupancy": self.occupancy}
        if (loop := self.hot_loop) is not None:
            sm, work = self.multiprocessor, loop.multiply_adds
            record["hot_loop"] = {
                "address": loop.instructions[0].address,
                "source": loop.lines,
                "instructions": len(loop.instructions),
                "kinds": {kind: loop.kinds[kind] for kind in KINDS if loop.kinds[kind]},
                "multiply_adds": work,
                "kinds_per_multiply_add": {
                    kind: loop.kinds[kind] / work for kind in KINDS if work and loop.kinds[kind]
                },
                "shared_bytes": loop.shared_bytes,
                "cycles": loop.cycles(sm) if sm else None,
            }
        return record


@dataclass
class Resources:
    """What a cubin says of a kernel beside its code."""

    registers: int
    stack: int
    shared: int
    threads: int | None = None
    barriers: int | None = None


_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INFO = re.compile(r"^\.nv\.info\.(\S+)$((?:\n(?!\.).*)*)", re.MULTILINE)


def _attribute(text: str, name: str) -> list[int] | None:
    found = re.search(rf"Attribute:\s*EIATTR_{name}\n.*\n\s*Value:\s*((?:0x[0-9a-f]+\s*)+)", text)
    return [int(value, 16) for value in found.group(1).split()] if found else None


def parse_resources(usage: str, elf: str) -> dict[str, Resources]:
    """Kernels of `cuobjdump -res-usage` and of the `.nv.info` sections of `cuobjdump -elf`."""
    kernels = {
        name: Resources(int(registers), int(stack), int(shared))
        for name, registers, stack, shared in _USAGE.findall(usage)
    }
    for name, info in _INFO.findall(elf):
        if name not in kernels:
            continue
        threads = _attribute(info, "REQNTID") or _attribute(info, "MAX_THREADS")
        if threads:
            kernels[name].threads = threads[0] * threads[1] * threads[2]
        kernels[name].barriers = (_attribute(info, "NUM_BARRIERS") or [0])[0]
    return kernels


def short_name(demangled: str) -> str:
    """A kernel's name with its template arguments: no return type, namespace or parameters."""
    text = demangled.replace("(anonymous namespace)::", "")
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if depth == 0 and character == "(":
            text = text[:position]
            break
        if depth == 0 and character in " :":
            start = position + 1
    return re.sub(r"\w+::", "", text[start:])


def make_kernel(
    architecture: str, symbol: str, name: str, resources: Resources, code: Code
) -> Kernel:
    """Puts together what is known of a kernel."""
    stores = [i for i in code.instructions if i.mnemonic == "STL"]
    loads = [i for i in code.instructions if i.mnemonic == "LDL"]
    spilled = [sum(i.bytes_lane for i in part if "Spill" in i.note) for part in (stores, loads)]
    loops = find_loops(code)
    # From sm_90 on, the reserved bytes come first in a block's shared memory and are counted.
    reserved = RESERVED_SHARED if int(re.sub(r"\D", "", architecture)) >= 90 else 0
    return Kernel(
        architecture=architecture,
        name=name,
        symbol=symbol,
        registers=resources.registers,
        threads=resources.threads,
        static_shared=max(0, resources.shared - reserved),
        stack=resources.stack,
        barriers=resources.barriers,
        instructions=sum(i.mnemonic != "NOP" for i in code.instructions),
        spill_stores=spilled[0],
        spill_loads=spilled[1],
        local_stores=len(stores),
        local_loads=len(loads),
        loops=len(loops),
        hot_loop=hot_loop(loops),
        protocol=tuple(protocols.problems(name, code)),
        code=code,
    )
