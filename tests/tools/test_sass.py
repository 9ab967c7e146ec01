"""tools/sass: what it reads out of disassembly, and where its check fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sass import objects, protocols
from sass.__main__ import main
from sass.control_flow import find_loops, hot_loop
from sass.disassembly import Instruction, parse_sass
from sass.errors import SassError
from sass.kernels import make_kernel, parse_resources, short_name
from sass.objects import PACKAGES, find_tool, read_objects
from sass.occupancy import MULTIPROCESSORS, blocks_resident, shared_budget
from sass.report import block_of, markers, replace_block

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = markers("sass")


KERNEL = "_ZN4demo6kernelILi8EEEvPKfPf"


def disassembly(body: str, name: str = KERNEL) -> str:
    """A kernel as `nvdisasm -c -gi` prints it, from labels and instructions without addresses."""
    lines = ["\t.target\tsm_90", f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"]
    address = 0
    for line in filter(None, map(str.strip, body.splitlines())):
        if line.endswith(":") or line.startswith("//##"):
            lines.append(line if line.endswith(":") else f"\t{line}")
        else:
            lines.append(f"        /*{address:04x}*/         {line} ;")
            address += 16
    return "\n".join(lines)


def code_of(body: str):
    return parse_sass(disassembly(body))[KERNEL]


def instruction(text: str):
    return code_of(text).instructions[0]


# A product whose inner loop has a rare path at the kernel's end, an outer loop around it, and the
# branch to itself that closes every kernel.
NESTED = """
    LDC R1, c[0x0][0x28]
    @!P0 EXIT
    .L_x_1:
    //## File "/a/demo.cu", line 40
    BAR.SYNC.DEFER_BLOCKING 0x0
    BSSY B0, `(.L_x_4)
    .L_x_2:
    //## File "/a/tile.cuh", line 7 inlined at "/a/demo.cu", line 44
    //## File "/a/demo.cu", line 44
    LDS.128 R4, [R2]
    LDS R8, [R3+0x40]
    FFMA R9, R4, R8, R9
    FFMA R10, R5, R8, R10
    //## File "/a/demo.cu", line 43
    ISETP.GE.AND P1, PT, R0, 0x8, PT
    @P2 BRA `(.L_x_5)
    .L_x_3:
    @!P1 BRA `(.L_x_2)
    .L_x_4:
    BSYNC B0
    STG.E desc[UR4][R6.64], R9
    BRA P3, `(.L_x_1)
    EXIT
    .L_x_5:
    MUFU.RCP R8, R8
    BRA `(.L_x_3)
    .L_x_6:
    BRA `(.L_x_6)
    NOP
"""

SPILLING = """
    STL [R1+0x90], R18                                (*"SpillRefill"*)
    STL.64 [R1+0x88], R20                             (*"SpillRefill"*)
    STL [R12], R13
    .L_x_0:
    LDL.LU R18, [R1+0x90]                             (*"SpillRefill"*)
    LDL.LU.128 R20, [R1+0x80]                         (*"SpillRefill"*)
    FFMA R0, R18, R18, R0
    @P0 BRA `(.L_x_0)
    EXIT
"""

USAGE = f"""
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function {KERNEL}:
  REG:40 STACK:272 SHARED:1152 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = f"""
.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: {KERNEL}(0x10)	register count: 25

.nv.info.{KERNEL}
	<0x1>
	Attribute:	EIATTR_NUM_BARRIERS
	Format:	EIFMT_BVAL
	Value:	0x2
	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x40 0x4 0x1

.nv.info.other
	<0x1>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x20 0x1 0x1
"""


class TestInstructions:
    def test_parts(self) -> None:
        found = instruction("@!UP0 LDG.E.128 R4, desc[UR6][R2.64+0x10]")
        assert (found.guard, found.opcode) == ("!UP0", "LDG.E.128")
        assert found.operands == "R4, desc[UR6][R2.64+0x10]"
        assert found.bytes_lane == 16

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor"),
            ("FFMA R4, R8, R12, R4", "float32"),
            ("FMNMX R4, R8, R12, !PT", "min/max"),
            ("LDSM.16.M88.4 R4, [R8]", "shared load"),
            ("LDGSTS.E.BYPASS.128 [R4], [R8.64]", "async load"),
            ("LDG.E R4, [R8.64]", "global load"),
            ("IMAD.WIDE.U32 R4, R8, 0x4, R4", "integer"),
            ("IMAD.MOV.U32 R4, RZ, RZ, R8", "move"),
            ("IMAD.U32 R4, RZ, RZ, UR8", "move"),
            ("HFMA2.MMA R4, -RZ, RZ, 0, 0", "move"),
            ("HFMA2 R4, R8, R12, R4", "float16"),
            ("UIADD3 UR4, UR4, 0x1, URZ", "integer"),
            ("ULDC.64 UR4, c[0x0][0x208]", "move"),
            ("VOTEU.ALL UP0, P1", "shuffle"),
            ("FSETP.GT.AND P0, PT, R4, R5, PT", "compare"),
            ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier"),
            ("NOP", "other"),
        ],
    )
    def test_kind(self, text: str, kind: str) -> None:
        assert instruction(text).kind == kind

    @pytest.mark.parametrize(
        ("opcode", "multiply_adds"),
        [
            ("FFMA", 32),
            ("FADD", 0),
            ("HMMA.16816.F32", 16 * 8 * 16),
            ("HMMA.1688.F32.TF32", 16 * 8 * 8),
            ("HMMA.884.F32.F32.STEP0", 8 * 8 * 4),
            ("IMMA.16832.S8.S8", 16 * 8 * 32),
            ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ],
    )
    def test_multiply_adds(self, opcode: str, multiply_adds: int) -> None:
        assert Instruction(0, opcode).multiply_adds == multiply_adds

    @pytest.mark.parametrize(
        ("opcode", "bytes_warp"),
        [
            ("LDS", 128),
            ("LDS.U8", 32),
            ("LDS.128", 512),
            ("STS.64", 256),
            ("LDSM.16.M88", 128),
            ("LDSM.16.MT88.4", 512),
            ("LDGSTS.E.BYPASS.LTC128B.128", 512),
            ("LDG.E.128", 0),
        ],
    )
    def test_shared_bytes(self, opcode: str, bytes_warp: int) -> None:
        assert Instruction(0, opcode).shared_bytes == bytes_warp

    @pytest.mark.parametrize(
        ("text", "falls_through", "targets"),
        [
            ("BRA `(.L_x_3)", False, [".L_x_3"]),
            ("@P0 BRA `(.L_x_3)", True, [".L_x_3"]),
            ("BRA !P0, `(.L_x_3)", True, [".L_x_3"]),
            ("BRA.DIV ~URZ, `(.L_x_3)", True, [".L_x_3"]),
            ('BRX R2 -0x40 (*"BRANCH_TARGETS .L_x_3,.L_x_4"*)', False, [".L_x_3", ".L_x_4"]),
            ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", True, []),
            ("RET.REL.NODEC R2 `(_Z5framePKiPf)", False, []),
            ("@P0 EXIT", True, []),
            ("BSSY B0, `(.L_x_3)", True, []),
        ],
    )
    def test_control(self, text: str, falls_through: bool, targets: list[str]) -> None:
        found = instruction(text)
        assert found.falls_through == falls_through
        assert found.targets == targets


class TestLoops:
    def test_depth(self) -> None:
        assert [loop.depth for loop in find_loops(code_of(NESTED))] == [1, 2]

    def test_nested(self) -> None:
        outer, inner = find_loops(code_of(NESTED))
        assert [loop.innermost for loop in (outer, inner)] == [False, True]
        # The rare path returns into the inner loop and is part of it.
        assert inner.kinds == {
            "shared load": 2,
            "float32": 2,
            "compare": 1,
            "branch": 3,
            "special": 1,
        }
        assert outer.kinds == {"barrier": 1, "branch": 3, "global store": 1}
        assert inner.multiply_adds == 64
        assert inner.shared_bytes == 512 + 128
        assert inner.lines == "demo.cu:43-44"

    def test_frames(self) -> None:
        code = code_of(
            NESTED.replace("EXIT\n    .L_x_5", "EXIT\n$__division:\nFADD R0, R0, R1\n    .L_x_5")
        )
        frames = {i.opcode: i.frames for i in code.instructions}
        assert frames["FFMA"] == (("tile.cuh", 7), ("demo.cu", 44))  # its own place first
        assert frames["BAR.SYNC.DEFER_BLOCKING"] == (("demo.cu", 40),)
        assert frames["LDC"] == frames["FADD"] == ()  # the compiler's own

    def test_straight_code(self) -> None:
        assert find_loops(code_of("MOV R0, R1\nEXIT\n.L_x_0:\nBRA `(.L_x_0)")) == []

    def test_loops_one_after_the_other(self) -> None:
        first = ".L_x_0:\nFADD R0, R0, R1\n@P0 BRA `(.L_x_0)\n"
        second = ".L_x_1:\nFFMA R0, R0, R1, R2\n@P0 BRA `(.L_x_1)\nEXIT"
        loops = find_loops(code_of(first + second))
        assert [len(loop.instructions) for loop in loops] == [2, 2]
        assert hot_loop(loops) == loops[1]

    def test_tensor_before_length(self) -> None:
        tensor = ".L_x_0:\nHMMA.16816.F32 R0, R4, R8, R0\n@P0 BRA `(.L_x_0)\n"
        longer = ".L_x_1:\n" + "FFMA R0, R0, R1, R2\n" * 9 + "@P0 BRA `(.L_x_1)\nEXIT"
        assert hot_loop(find_loops(code_of(tensor + longer))).kinds["tensor"] == 1

    def test_tensor_outside_an_inner_loop(self) -> None:
        body = ".L_x_0:\nHMMA.16816.F32 R0, R4, R8, R0\n.L_x_1:\nLDG.E R4, [R8.64]\n"
        body += "@P1 BRA `(.L_x_1)\n@P0 BRA `(.L_x_0)\nEXIT"
        assert hot_loop(find_loops(code_of(body))).kinds["tensor"] == 1

    def test_integer_lanes(self) -> None:
        body = (
            ".L_x_0:\nFMNMX R0, R1, R2, PT\nIADD3 R0, R0, R1, RZ\nISETP.GE.AND P0, PT, R0, R1, PT\n"
        )
        body += "IMAD R0, R0, R1, R2\nUIADD3 UR0, UR0, UR1, URZ\n@P0 BRA `(.L_x_0)\nEXIT"
        (loop,) = find_loops(code_of(body))
        assert loop.cycles(MULTIPROCESSORS["sm_90"])["integer"] == 6

    def test_cycles(self) -> None:
        body = ".L_x_0:\n" + "FFMA R0, R0, R1, R2\n" * 7 + "@P0 BRA `(.L_x_0)\nEXIT"
        (loop,) = find_loops(code_of(body))
        assert loop.cycles(MULTIPROCESSORS["sm_80"]) == {
            "issue": 8,
            "float32": 14,
            "integer": 0,
            "tensor": 0,
        }
        body = ".L_x_0:\n" + "HMMA.16816.F32 R0, R4, R8, R0\n" * 3 + "@P0 BRA `(.L_x_0)\nEXIT"
        (loop,) = find_loops(code_of(body))
        assert loop.cycles(MULTIPROCESSORS["sm_80"])["tensor"] == 24
        assert loop.cycles(MULTIPROCESSORS["sm_90"])["tensor"] == 12


class TestKernel:
    def kernel(self, body: str = SPILLING):
        resources = parse_resources(USAGE, ELF)
        assert resources.keys() == {KERNEL}
        return make_kernel("sm_90", KERNEL, "kernel<8>", resources[KERNEL], code_of(body))

    def test_resources(self) -> None:
        kernel = self.kernel()
        assert (kernel.registers, kernel.threads, kernel.barriers) == (40, 256, 2)
        assert kernel.stack == 272
        assert kernel.static_shared == 128  # without the 1,024 bytes that the system keeps
        assert kernel.blocks == 6

    def test_a_kernel_of_another_architecture_is_empty(self) -> None:
        nothing = "    LDC R1, c[0x0][0x28]\n    EXIT\n.L_x_0:\n    BRA `(.L_x_0)\n    NOP\n"
        assert self.kernel(nothing).empty
        assert not self.kernel(nothing.replace("EXIT", "STG.E [R2.64], R4\n    EXIT")).empty
        assert not self.kernel().empty

    def test_spills_are_told_from_arrays(self) -> None:
        kernel = self.kernel()
        assert (kernel.spill_stores, kernel.spill_loads) == (12, 20)
        assert (kernel.local_stores, kernel.local_loads) == (3, 2)
        assert kernel.hot_loop.kinds["local"] == 2
        assert kernel.problem() == (
            "a stack frame of 272 bytes, spills (12 bytes stored, 20 bytes loaded), "
            "local memory (3 STL, 2 LDL; 2 of them in the hot loop)"
        )

    @pytest.mark.parametrize(
        ("demangled", "name"),
        [
            ("tokenflow::cuda::(anonymous namespace)::walk(tokenflow::Args, long)", "walk"),
            ("void a::(anonymous namespace)::rank<8>(a::Args, int)", "rank<8>"),
            ("void a::sum<a::Args<float>, (a::Kind)1>(float*)", "sum<Args<float>, (Kind)1>"),
            ("plain", "plain"),
        ],
    )
    def test_short_name(self, demangled: str, name: str) -> None:
        assert short_name(demangled) == name

    @pytest.mark.parametrize(
        ("architecture", "threads", "registers", "shared", "blocks"),
        # What cuda_occupancy.h of CUDA 13.0 says.
        [
            ("sm_80", 256, 128, 0, 2),
            ("sm_80", 256, 125, 17408, 2),
            ("sm_80", 32, 23, 0, 32),
            ("sm_80", 32, 23, 5000, 27),
            ("sm_80", 96, 100, 0, 5),
            ("sm_80", 1024, 72, 0, 0),
            ("sm_90", 128, 80, 100000, 2),
            ("sm_90", 256, 40, 40000, 5),
        ],
    )
    def test_blocks(
        self, architecture: str, threads: int, registers: int, shared: int, blocks: int
    ) -> None:
        sm = MULTIPROCESSORS[architecture]
        assert blocks_resident(sm, threads, registers, shared) == blocks

    def test_shared_budget_keeps_the_blocks(self) -> None:
        for sm in MULTIPROCESSORS.values():
            for blocks in range(1, 33):
                budget = shared_budget(sm, blocks)
                assert blocks_resident(sm, 32, 16, budget) >= blocks
                if budget < sm.shared_bytes_block:
                    assert blocks_resident(sm, 32, 16, budget + 128) < blocks


ARRIVAL = """
    STG.E [R2.64], R4
    MEMBAR.SC.GPU
    ATOMG.E.ADD.STRONG.GPU PT, R12, [R12.64], R11
    MEMBAR.SC.GPU
    LDG.E R4, [R2.64]
    EXIT
"""
FENCE = "    MEMBAR.SC.GPU\n"
COPIES = """
    LDGSTS.E.BYPASS.128 [R4], [R8.64]
    LDGDEPBAR
    LDGSTS.E.BYPASS.128 [R4], [R8.64]
    LDGDEPBAR
    DEPBAR.LE SB0, 0x1
    LDGDEPBAR
    EXIT
"""
WARPGROUPS = """
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32 R24, R96, gdesc[UR24], RZ, !UPT
    HGMMA.64x128x16.F32 R24, R92, gdesc[UR24], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FMNMX R36, R36, R37, !PT
    SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9+0x18040], RZ
    EXIT
"""


class TestProtocols:
    """What is wrong with a kernel whose threads tell each other something."""

    def test_in_order(self) -> None:
        assert protocols.problems("sum_segments_kernel", code_of(ARRIVAL)) == []
        assert protocols.problems("coarse_score_kernel<3, 4>", code_of(COPIES)) == []
        assert protocols.problems("any_kernel", code_of("    EXIT\n")) == []

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (FENCE + "    ATOMG", "    ATOMG", "writes and its arrival"),
            (FENCE + "    ATOMG", FENCE + "    STG.E [R2.64], R5\n    ATOMG", "and its arrival"),
            (FENCE + "    LDG", "    LDG", "what the last block reads"),
            (FENCE + "    LDG", "    LDG.E R9, [R2.64]\n" + FENCE + "    LDG", "last block reads"),
            ("ATOMG.E.ADD.STRONG.GPU PT, R12,", "RED.E.ADD.STRONG.GPU", "no atomic"),
            ("LDG.E R4", "LDG.E.CONSTANT R4", "1 loads by the cache for constants"),
        ],
    )
    def test_last_block(self, old: str, new: str, said: str) -> None:
        assert old in ARRIVAL
        found = protocols.problems("sum_segments_kernel", code_of(ARRIVAL.replace(old, new)))
        assert len(found) == 1
        assert said in found[0]

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("    WARPGROUP.ARRIVE\n", "", "without a fence"),
            ("gsb0, 0x0\n", "gsb0, 0x1\n", "FMNMX before the wait"),
            (
                "    WARPGROUP.DEPBAR.LE gsb0, 0x0\n    FMNMX R36, R36, R37, !PT\n",
                "",
                "SYNCS before",
            ),
            (WARPGROUPS[WARPGROUPS.index("    WARPGROUP.DEP") :], "    EXIT\n", "nobody waits for"),
        ],
    )
    def test_products_of_warpgroups(self, old: str, new: str, said: str) -> None:
        kernel = "warpgroup_score_kernel<3>"
        assert protocols.problems(kernel, code_of(WARPGROUPS)) == []
        assert old in WARPGROUPS
        found = protocols.problems(kernel, code_of(WARPGROUPS.replace(old, new)))
        assert len(found) == 1
        assert said in found[0]

    def test_loads_of_what_a_pass_writes(self) -> None:
        code = code_of("    LDG.E.CONSTANT R4, [R2.64]\n    EXIT\n")
        assert "cache for constants" in protocols.problems("scalar_quantize_kernel", code)[0]
        assert protocols.problems("measure_kernel", code) == []

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("SB0, 0x1", "SB0, 0x2", "leaves 2 of 2"),
            ("SB0, 0x1", "SB0, 0x0", "leaves 0 of 2"),
            ("DEPBAR.LE SB0, 0x1", "NOP", "nobody waits"),
        ],
    )
    def test_copies(self, old: str, new: str, said: str) -> None:
        text = COPIES.replace(old, new)
        assert said in protocols.problems("any_kernel", code_of(text))[0]


class TestDocument:
    def test_replaces_what_is_between(self) -> None:
        text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
        expected = f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
        assert replace_block(text, "sass", "new") == expected
        assert replace_block(expected, "sass", "new") == expected
        assert block_of(text, "sass") == "old"
        assert block_of(expected, "sass") == "new"

    @pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
    def test_markers_missing(self, text: str) -> None:
        with pytest.raises(SassError, match="once each"):
            replace_block(text, "sass", "new")
        with pytest.raises(SassError, match="once each"):
            block_of(text, "sass")


class TestTools:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_package(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(objects.shutil, "which", lambda name, path=None: None)
        monkeypatch.setattr(objects.importlib.metadata, "files", no_package)
        with pytest.raises(SassError, match="pip install nvidia-cuda-nvdisasm"):
            find_tool("nvdisasm")

    def test_missing_object(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--check", str(tmp_path / "none.o")]) == 2
        assert "make cuda-compile" in capsys.readouterr().err


SOURCE = r"""
namespace demo {

// 64 values that live through a loop, compiled for 32 registers.
__global__ void spilling(const float* in, float* out, int n) {
  float value[64];
  for (int i = 0; i < 64; ++i) value[i] = in[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
    for (int i = 0; i < 64; ++i) value[i] = value[i] * value[(i + 7) % 64] + in[k];
  }
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = value[i];
}

// An array indexed at run time.
__global__ void indexed(const int* in, int* out) {
  int value[16] = {};
  for (int i = 0; i < 64; ++i) value[in[i] & 15] += i;
  out[threadIdx.x] = value[in[threadIdx.x] & 15];
}

template <int kUnroll>
__global__ void __launch_bounds__(128) clean(const float* in, float* out, int n) {
  __shared__ float line[32];
  line[threadIdx.x % 32] = in[threadIdx.x];
  __syncthreads();
  float sum = 0;
#pragma unroll kUnroll
  for (int i = 0; i < n; ++i) sum = fmaf(line[i % 32], in[i], sum);
  out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(128) tensor(const unsigned* in, float* out, int n) {
  float c[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const unsigned* a = in + i * 192 + threadIdx.x;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[32]), "r"(a[64]), "r"(a[96]), "r"(a[128]), "r"(a[160]));
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}

template __global__ void clean<4>(const float*, float*, int);

}  // namespace demo
"""


def nvcc() -> str:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=str(toolkit))
    if path is None:
        pytest.skip("no nvcc here")
    try:
        for tool in PACKAGES:
            find_tool(tool)
    except SassError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object of SOURCE for 32 registers, and what ptxas said of it."""
    compiler = nvcc()
    folder = tmp_path_factory.mktemp("sass")
    source = folder / "demo.cu"
    source.write_text(SOURCE)
    command = [compiler, "-O3", "-lineinfo", "-maxrregcount", "32", "--resource-usage"]
    command += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    command += ["-c", str(source), "-o", str(folder / "demo.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "demo.o", result.stderr + result.stdout


class TestCompiled:
    """The whole way, from source to the check."""

    def test_check_fails_by_name(
        self, compiled: tuple[Path, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--check", str(compiled[0])]) == 1
        lines = capsys.readouterr().err.splitlines()
        named = {tuple(line.split(":")[1].split()) for line in lines}
        assert len(lines) == 4
        assert named == {
            (architecture, name)
            for architecture in ("sm_80", "sm_90")
            for name in ("spilling", "indexed")
        }
        assert all("a stack frame of" in line for line in lines)
        assert all(("spills (" in line) == ("spilling" in line) for line in lines)

    def test_agrees_with_ptxas(self, compiled: tuple[Path, str]) -> None:
        path, said = compiled
        pattern = (
            r"Compiling entry function '(\S+)' for '(\w+)'\n.*\n\s*"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*"
            r"Used (\d+) registers"
        )
        expected = {
            (architecture, symbol): tuple(map(int, numbers))
            for symbol, architecture, *numbers in re.findall(pattern, said)
        }
        kernels, compiler = read_objects([path])
        assert len(expected) == 8
        assert {
            (k.architecture, k.symbol): (k.stack, k.spill_stores, k.spill_loads, k.registers)
            for k in kernels
        } == expected
        assert re.fullmatch(r"ptxas \d+\.\d+\.\d+, read by nvdisasm \d+\.\d+\.\d+", compiler)

    def test_kernels(self, compiled: tuple[Path, str], tmp_path: Path) -> None:
        assert main(["--json", str(tmp_path / "sass.json"), str(compiled[0])]) == 0
        kernels = json.loads((tmp_path / "sass.json").read_text())["kernels"]
        assert len(kernels) == 8
        for kernel in kernels:
            if kernel["name"] == "clean<4>":
                assert (kernel["threads"], kernel["static_shared"]) == (128, 128)
                assert kernel["hot_loop"]["kinds"]["float32"] == 4
                assert kernel["hot_loop"]["multiply_adds"] == 4 * 32
                assert kernel["hot_loop"]["source"].startswith("demo.cu:")
            elif kernel["name"] == "tensor":
                assert kernel["hot_loop"]["kinds"]["tensor"] == 1
                assert kernel["hot_loop"]["multiply_adds"] == 2048
                assert kernel["hot_loop"]["kinds"]["global load"] == 6

    def test_cubin(
        self,
        compiled: tuple[Path, str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        subprocess.run(
            [find_tool("cuobjdump"), "-xelf", "sm_90", str(compiled[0])],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        (cubin,) = tmp_path.iterdir()
        assert main(["--markdown", str(cubin)]) == 0
        printed = capsys.readouterr().out
        assert "sm_90, resources" in printed
        assert "sm_80" not in printed
        assert re.search(r"^\| `clean<4>` \| 128 \|", printed, re.MULTILINE)
