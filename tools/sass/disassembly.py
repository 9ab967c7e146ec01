"""Instructions, and kernels as nvdisasm prints them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .occupancy import WARP

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
    frames: tuple[tuple[str, int], ...] = ()  # file and line; where code was inlined, its own first

    @property
    def source(self) -> tuple[str, int] | None:
        """File and line in the kernel, to which code was inlined."""
        return self.frames[-1] if self.frames else None

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
    frames: list[tuple[str, int]] = []
    complete = True  # what follows begins another place
    for line in text.splitlines():
        if section := _SECTION.match(line):
            code = kernels.setdefault(section.group(1), Code())
            frames, complete = [], True
        elif code is None:
            continue
        elif location := _SOURCE.match(line):
            # One line for each level of inlining, the kernel's own last.
            if complete:
                frames, complete = [], False
            frames.append((Path(location.group(1)).name, int(location.group(2))))
        elif label := _LABEL_LINE.match(line):
            if label.group(1).startswith("$"):  # a function of the compiler's, of no source
                frames, complete = [], True
            code.labels[label.group(1)] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            complete = True
            operands = found["operands"]
            code.instructions.append(
                Instruction(
                    address=int(found["address"], 16),
                    opcode=found["opcode"],
                    operands=_NOTE.sub("", operands).strip(),
                    guard=found["guard"] or "",
                    note=" ".join(_NOTE.findall(operands)),
                    frames=tuple(frames),
                )
            )
    return kernels
