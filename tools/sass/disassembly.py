"""What the compiler made of the CUDA kernels, read from their machine code; no GPU is needed.

`make cuda-compile` leaves one object a source file in build/cmake/cuda, each with machine code for
every architecture. For each kernel this prints what decides how many of its blocks a multiprocessor
holds, whether registers were spilled, and what its hot loop issues:

    python -m benchmarks.sass                          tables of all kernels
    python -m benchmarks.sass --check                  fails where local memory is used
    python -m benchmarks.sass --write docs/kernels.md  renews the tables of the documentation

The loops come from the control-flow graph that the branches of the disassembly make: a loop is a
strongly connected part of it, and what remains of a loop without its header holds the loops inside.
A loop's instructions are counted once an iteration, with those that a branch may skip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake" / "cuda"
BEGIN, END = "<!-- sass: begin -->", "<!-- sass: end -->"
PACKAGES = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}


class SassError(RuntimeError):
    """The tools, the objects or the text that they print are not what this needs."""


# --- Hardware -------------------------------------------------------------------------------------


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
    integer_lanes: int = 16  # a scheduler: additions, logic, comparisons, minima and maxima
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10, 163 << 10, float32_lanes=16, tensor_multiply_adds=256),
    "sm_90": Multiprocessor(228 << 10, 227 << 10, float32_lanes=32, tensor_multiply_adds=512),
}
SCHEDULERS = 4
WARP = 32
RESERVED_SHARED = 1024  # bytes of each block that the system keeps, from sm_80 on


def _down(value: int, multiple: int) -> int:
    return value // multiple * multiple


def _up(value: int, multiple: int) -> int:
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
    warps_fitting = sm.registers // SCHEDULERS // _up(max(registers, 1) * WARP, 256) * SCHEDULERS
    return min(
        sm.blocks,
        sm.threads // WARP // warps,
        warps_fitting // warps,
        sm.shared_bytes // _up(shared + RESERVED_SHARED, 128),
    )


def shared_budget(sm: Multiprocessor, blocks: int) -> int:
    """Bytes of shared memory a block may have, static and dynamic, with `blocks` resident."""
    return min(sm.shared_bytes_block, _down(sm.shared_bytes // blocks, 128) - RESERVED_SHARED)


# --- Instructions ---------------------------------------------------------------------------------

# Kinds in the order of the tables' columns. A uniform instruction (UIADD3, VOTEU) is of the kind of
# its plain one.
MNEMONICS = {
    "tensor": "HMMA IMMA DMMA BMMA QMMA HGMMA IGMMA QGMMA BGMMA",
    "float32": "FFMA FFMA2 FADD FADD2 FMUL FMUL2 FFMA32I FADD32I FMUL32I",
    "float16": "HFMA2 HADD2 HMUL2 HFMA2_32I HADD2_32I HMUL2_32I",
    "float64": "DFMA DADD DMUL DSETP DMNMX",
    "min/max": "FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 VIADDMNMX HMNMX2 VHMNMX",
    "special": "MUFU I2F I2FP F2I F2IP F2F F2FP FRND FCHK I2I I2IP",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM ATOMS",
    "global load": "LDG LD",
    "async load": "LDGSTS UBLKCP UTMALDG",
    "global store": "STG ST RED REDG ATOM ATOMG UTMASTG UTMAREDG",
    "local": "LDL STL",
    "integer": "IADD IADD3 IADD32I VIADD IMAD IMUL IABS ISCADD LEA LOP LOP3 LOP32I SHF SHL SHR "
    "BMSK SGXT BREV FLO POPC IDP IDP4A PRMT VABSDIFF VABSDIFF4",
    "move": "MOV MOV32I MOVM SEL FSEL S2R S2UR CS2R R2UR LDC LDCU",
    "shuffle": "SHFL REDUX CREDUX VOTE MATCH",
    "compare": "ISETP FSETP HSETP2 PSETP PLOP3 P2R R2P FSET HSET2 P2UR R2UP",
    "branch": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV YIELD KILL NANOSLEEP",
    "barrier": "BAR MEMBAR DEPBAR LDGDEPBAR WARPSYNC ENDCOLLECTIVE ERRBAR CGAERRBAR CCTL SYNCS "
    "FENCE ARRIVES WARPGROUP CGABAR_ARV CGABAR_WAIT ACQBULK",
}
KINDS = (*MNEMONICS, "other")
_KIND_OF = {mnemonic: kind for kind, names in MNEMONICS.items() for mnemonic in names.split()}

_SHAPE = re.compile(r"\.(16|8)(8)(4|8|16|32|64|128|256)(?=\.|$)")
_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)(?=\.|$)")
_ZERO_PRODUCT = re.compile(r"U?R\d+, -?U?RZ, U?RZ,")
_LABEL = re.compile(r"\.L_\w+")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    opcode: str  # with its modifiers: HMMA.16816.F32
    operands: str = ""
    guard: str = ""  # the predicate that decides whether it runs: !P0
    note: str = ""  # what nvdisasm says of it: SpillRefill, BRANCH_TARGETS ...
    source: tuple[str, int] | None = None  # file and line, in the kernel where code was inlined

    @property
    def mnemonic(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        # 0 x 0 + b is how the compiler moves a value through a pipe that has room.
        if self.mnemonic in ("IMAD", "UIMAD", "HFMA2") and (
            ".MOV" in self.opcode or _ZERO_PRODUCT.match(self.operands)
        ):
            return "move"
        name = self.mnemonic
        for candidate in (name, name.removeprefix("U"), name.removesuffix("U")):
            if candidate in _KIND_OF:
                return _KIND_OF[candidate]
        return "other"

    @property
    def integer_lanes(self) -> bool:
        """Whether it takes the lanes of comparisons and integers; products take those of FFMA."""
        if self.mnemonic.startswith("U"):  # once a warp, on lanes of its own
            return False
        return self.kind in ("min/max", "compare") or (
            self.kind == "integer" and self.mnemonic not in ("IMAD", "IMUL", "IDP", "IDP4A")
        )

    @property
    def bytes_lane(self) -> int:
        """Bytes that a memory instruction moves for a lane."""
        width = re.search(r"\.(128|64|U16|S16|U8|S8)(?=\.|$)", self.opcode)
        if width is None:
            return 4
        digits = int(width.group(1).lstrip("US"))
        return digits // 8

    @property
    def shared_bytes(self) -> int:
        """Bytes that a warp moves from or to shared memory."""
        if self.mnemonic in ("LDSM", "STSM"):
            # .M88.{1,2,4} matrices of 128 bytes.
            matrices = re.search(r"\.M\w+\.([24])(?=\.|$)", self.opcode)
            return 128 * (int(matrices.group(1)) if matrices else 1)
        if self.kind in ("shared load", "shared store") or self.mnemonic == "LDGSTS":
            return WARP * self.bytes_lane
        return 0

    @property
    def multiply_adds(self) -> int:
        """Float32 and tensor multiply-adds of a warp."""
        if self.kind == "tensor":
            shape = _SHAPE.search(self.opcode) or _GROUP_SHAPE.search(self.opcode)
            if shape is None:
                return 0
            m, n, k = map(int, shape.groups())
            return m * n * k // (4 if "GMMA" in self.mnemonic else 1)  # a group is four warps
        return {"FFMA": WARP, "FFMA32I": WARP, "FFMA2": 2 * WARP}.get(self.mnemonic, 0)

    @property
    def tensor_rate(self) -> float:
        """A tensor instruction's multiply-adds a cycle over those of float16; 0 where not known."""
        if self.mnemonic in ("QMMA", "QGMMA") or re.search(
            r"^I\w*MMA\..*\.[US]8(?=\.|$)", self.opcode
        ):
            return 2
        if self.mnemonic in ("HMMA", "HGMMA"):
            return 0.5 if ".TF32" in self.opcode else 1
        return 0

    @property
    def targets(self) -> list[str]:
        """Labels to which control may go from here."""
        if self.mnemonic not in ("BRA", "BRX", "JMP", "JMX", "CALL", "WARPSYNC", "BREAK"):
            return []
        return _LABEL.findall(self.operands + self.note)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.guard:
            return True
        if self.mnemonic in ("BRA", "JMP"):  # BRA P0, label and BRA.DIV UR4, label may not be taken
            return not self.operands.startswith("`(")
        return self.mnemonic not in ("BRX", "JMX", "EXIT", "RET", "KILL")


@dataclass
class Code:
    """A kernel's instructions, with those of the functions that it calls, and its labels."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows


_SECTION = re.compile(r"\.text\.(\S+):$")
_LABEL_LINE = re.compile(r"([.$\w]+):$")
_INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"\s*(?P<operands>[^;]*?)\s*;"
)
_NOTE = re.compile(r'\(\*"(.*?)"\*\)')
_SOURCE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')


def parse_sass(text: str) -> dict[str, Code]:
    """Kernels of `nvdisasm -c -gi`, by their mangled names."""
    kernels: dict[str, Code] = {}
    code: Code | None = None
    source: tuple[str, int] | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            code = kernels.setdefault(section.group(1), Code())
            source = None
        elif code is None:
            continue
        elif location := _SOURCE.match(line):
            # One line for each level of inlining, the kernel's own last.
            source = (Path(location.group(1)).name, int(location.group(2)))
        elif label := _LABEL_LINE.match(line):
            code.labels[label.group(1)] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            operands = found["operands"]
            code.instructions.append(
                Instruction(
                    address=int(found["address"], 16),
                    opcode=found["opcode"],
                    operands=_NOTE.sub("", operands).strip(),
                    guard=found["guard"] or "",
                    note=" ".join(_NOTE.findall(operands)),
                    source=source,
                )
            )
    return kernels


# --- Loops ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A loop's own instructions: those of loops inside it are not among them."""

    instructions: tuple[Instruction, ...]
    innermost: bool

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
        tensor = [i for i in self.instructions if i.kind == "tensor"]
        cycles = {
            "issue": float(len(self.instructions)),
            "float32": self.kinds["float32"] * WARP / sm.float32_lanes,
            "integer": sum(i.integer_lanes for i in self.instructions) * WARP / sm.integer_lanes,
            "tensor": 0.0,
        }
        if all(i.tensor_rate for i in tensor):
            cycles["tensor"] = sum(
                i.multiply_adds / (i.tensor_rate * sm.tensor_multiply_adds) for i in tensor
            )
        return cycles


Graph = dict[int, set[int]]


def _reached(graph: Graph, start: int, nodes: set[int]) -> set[int]:
    seen, pending = {start}, [start]
    while pending:
        new = (graph[pending.pop()] & nodes) - seen
        seen |= new
        pending.extend(new)
    return seen


def _nested(forward: Graph, backward: Graph, nodes: set[int]) -> list[tuple[set[int], bool]]:
    """Loops within `nodes`, outer ones first: their own nodes, and whether none is inside."""
    loops = []
    left = set(nodes)
    while left:
        node = min(left)
        part = _reached(forward, node, nodes) & _reached(backward, node, nodes)
        left -= part
        if len(part) == 1 and node not in forward[node]:
            continue
        entries = [n for n in part if backward[n] - part]
        inner = _nested(forward, backward, part - {min(entries, default=node)})
        loops.append((part.difference(*(nodes for nodes, _ in inner)), not inner))
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
    for nodes, innermost in _nested(forward, backward, set(blocks)):
        body = [i for start in sorted(nodes) for i in instructions[start : blocks[start]]]
        # A kernel ends in a branch to itself that nothing reaches.
        if any(i.mnemonic != "BRA" for i in body):
            loops.append(Loop(tuple(body), innermost))
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


# --- Kernels --------------------------------------------------------------------------------------


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
        return blocks * _up(self.threads, WARP) / sm.threads

    def problem(self) -> str | None:
        """What the kernel keeps in local memory, or None."""
        parts = []
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
        record = asdict(self)
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
    )


# --- Tools ----------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: on PATH, in the toolkit, or in its package.

    Raises:
        SassError: it is in none of them; the message names the package.
    """
    if path := shutil.which(name):
        return path
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for toolkit in filter(None, toolkits):
        if path := shutil.which(name, path=str(Path(toolkit) / "bin")):
            return path
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(file.locate())
    raise SassError(
        f"{name} is neither on PATH nor in CUDA_HOME/bin: `pip install {package}` brings it"
    )


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise SassError(f"{' '.join(map(str, command))}: {said[-1] if said else 'failed'}")
    return result.stdout


def demangle(symbols: Sequence[str]) -> list[str]:
    """The symbols' C++ names, or the symbols themselves where there is no c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not symbols:
        return list(symbols)
    return _run(tool, *symbols).splitlines()


def read_cubin(cubin: Path) -> tuple[list[Kernel], str]:
    """The kernels of a cubin and the compiler that made it."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    elf = _run(cuobjdump, "-elf", cubin)
    sass = _run(nvdisasm, "-c", "-gi", cubin)
    architecture = re.search(r"\.target\s+(sm_\w+)", sass)
    if architecture is None:
        raise SassError(f"{cubin}: nvdisasm names no architecture")
    compiler = re.search(r"Tool Name:\s*(ptxas)\n\s*Tool Version:.*\bV([\d.]+)", elf)
    resources = parse_resources(_run(cuobjdump, "-res-usage", cubin), elf)
    codes = parse_sass(sass)
    if missing := resources.keys() ^ codes.keys():
        raise SassError(f"{cubin}: {', '.join(sorted(missing))} has no code or no resource usage")
    names = map(short_name, demangle(list(resources)))
    return [
        make_kernel(architecture.group(1), symbol, name, resources[symbol], codes[symbol])
        for symbol, name in zip(resources, names, strict=True)
    ], " ".join(compiler.groups()) if compiler else "an unknown compiler"


def read_objects(paths: Iterable[Path]) -> tuple[list[Kernel], str]:
    """Kernels of objects, libraries and cubins, by architecture, in the files' order.

    Returns:
        The kernels, and the compilers' names and versions.

    Raises:
        SassError: a tool is missing, or a file holds no machine code.
    """
    kernels: list[Kernel] = []
    compilers: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        for number, path in enumerate(paths):
            if not path.is_file():
                raise SassError(f"{path} does not exist: `make cuda-compile` makes the objects")
            cubins = [path]
            if not _is_cubin(path):
                folder = Path(scratch) / str(number)
                folder.mkdir()
                _run(find_tool("cuobjdump"), "-xelf", "all", path.resolve(), cwd=folder)
                cubins = sorted(folder.iterdir())
            if not cubins:
                raise SassError(f"{path} holds no machine code")
            for cubin in cubins:
                found, compiler = read_cubin(cubin)
                kernels += found
                compilers.add(compiler)
    if not kernels:
        raise SassError("no kernel in these files")
    kernels.sort(key=lambda kernel: kernel.architecture)
    return kernels, ", ".join(sorted(compilers))


def _is_cubin(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(20)
    return head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == 190  # EM_CUDA


def built_objects(folder: Path) -> list[Path]:
    """The objects of the CMake build, one for each source: what older sources left is not read."""
    return [folder / f"{source.name}.o" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


# --- Tables ---------------------------------------------------------------------------------------


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


def replace_block(text: str, block: str) -> str:
    """The document with `block` between the two markers.

    Raises:
        SassError: the document does not have each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SassError(f"the document needs {BEGIN} and after it {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables or the outcome of the check; 1 where the check fails, 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "objects", nargs="*", type=Path, help="objects, libraries or cubins (default: those built)"
    )
    parser.add_argument(
        "--build",
        type=Path,
        default=BUILD,
        metavar="FOLDER",
        help="what `make cuda-compile` filled",
    )
    parser.add_argument("--markdown", action="store_true", help="print tables for the documents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables between the markers of FILE"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a kernel spills, has a stack frame or touches local memory",
    )
    options = parser.parse_args(arguments)
    try:
        kernels, compiler = read_objects(options.objects or built_objects(options.build))
        markdown = "\n\n".join(
            [f"Compiled by {compiler}.", *(t.markdown() for t in tables(kernels))]
        )
        if options.json:
            record = {"compiler": compiler, "kernels": [kernel.as_json() for kernel in kernels]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.write:
            options.write.write_text(replace_block(options.write.read_text(), markdown))
    except (SassError, OSError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    if options.check:
        problems = [(kernel, text) for kernel in kernels if (text := kernel.problem())]
        for kernel, text in problems:
            print(f"sass: {kernel.architecture} {kernel.name}: {text}", file=sys.stderr)
        if problems:
            return 1
        counts = Counter(kernel.architecture for kernel in kernels)
        found = ", ".join(f"{number} kernels for {name}" for name, number in counts.items())
        print(f"{found}: no stack frame, spill or local memory access")
    elif options.markdown:
        print(markdown)
    elif not options.write:
        print(f"compiled by {compiler}")
        print("", *(table.text() + "\n" for table in tables(kernels)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
