"""tools/sass: the arithmetic of estimates, what is counted, and the documents that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sass import documents, examples, programs, variants
from sass.__main__ import main
from sass.devices import (
    A100,
    BARRIER_CYCLES,
    DEPENDENT_CYCLES,
    DEVICES,
    H100,
    L2_BYTES_CYCLE,
    L2_CYCLES,
    Device,
)
from sass.disassembly import Code, Instruction
from sass.errors import SassError
from sass.estimates import TERMS, Counts, Launch, Line, Times
from sass.kernels import Kernel
from sass.occupancy import MULTIPROCESSORS
from sass.pipes import PIPES, cycles
from sass.programs import Program
from sass.source import Part, Place, Sources

ROOT = Path(__file__).resolve().parents[2]

SHARES = st.floats(0, 1e6, allow_nan=False)


class TestPipes:
    @pytest.mark.parametrize(
        ("text", "pipe", "on_80", "on_90"),
        [
            ("FFMA R0, R1, R2, R3", "float32", 2, 1),
            ("DFMA R0, R2, R4, R6", "float64", 4, 2),
            ("ISETP.GE.AND P0, PT, R0, R1, PT", "integer", 2, 2),
            ("FMNMX R0, R1, R2, PT", "integer", 2, 2),
            ("MUFU.RCP R0, R1", "special", 8, 8),
            ("LDS.128 R0, [R4]", "shared", 16, 16),
            ("HMMA.16816.F32 R0, R4, R8, R0", "tensor", 8, 4),
            ("IMMA.16832.S8.S8 R0, R4, R8, R0", "tensor", 8, 4),
        ],
    )
    def test_lanes(self, text: str, pipe: str, on_80: float, on_90: float) -> None:
        opcode, _, operands = text.partition(" ")
        instruction = Instruction(0, opcode, operands)
        for architecture, expected in (("sm_80", on_80), ("sm_90", on_90)):
            taken = cycles([instruction], MULTIPROCESSORS[architecture], [3.0])
            assert taken == dict.fromkeys(PIPES, 0) | {"issue": 3, pipe: 3 * expected}

    def test_a_tensor_rate_that_is_not_known(self) -> None:
        listed = [Instruction(0, "HMMA.16816.F32"), Instruction(16, "DMMA.884")]
        assert cycles(listed, MULTIPROCESSORS["sm_80"])["tensor"] == 0

    def test_weights_are_as_many(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            cycles([Instruction(0, "FADD")], MULTIPROCESSORS["sm_80"], [1.0, 1.0])


class TestDevices:
    def test_peaks_are_those_of_the_data_sheets(self) -> None:
        assert A100.tensor_flops == pytest.approx(312e12, rel=2e-3)
        assert H100.tensor_flops == pytest.approx(989.4e12, rel=2e-3)

    def test_no_share_above_the_peak(self) -> None:
        for device in DEVICES:
            assert device.copy_bandwidth <= device.memory_bandwidth
            assert 0 < device.mma_share <= 1


def times(**terms: float) -> Times:
    return Times(dict.fromkeys(TERMS, 0.0) | terms)


class TestTimes:
    @given(st.dictionaries(st.sampled_from(TERMS), SHARES, min_size=1))
    def test_ends(self, terms: dict[str, float]) -> None:
        found = times(**terms)
        assert found.least == max(2.0, *terms.values(), 0.0)
        apart = found.terms["tensor"] + found.terms["integer"] + found.terms["float32"]
        assert found.most == (max(found.least, apart) if found.terms["tensor"] else found.least)
        if found.binds != "launch":
            assert terms[found.binds] == found.least

    def test_products_apart(self) -> None:
        found = times(tensor=100.0, integer=70.0, float32=5.0, issue=90.0)
        assert (found.least, found.most, found.binds) == (100.0, 175.0, "tensor")
        without = times(integer=70.0, issue=90.0)
        assert (without.least, without.most, without.binds) == (90.0, 90.0, "issue")

    def test_shortest(self) -> None:
        assert (times(issue=0.5).least, times(issue=0.5).binds) == (2.0, "launch")


SOURCE = "void demo() {\n  for (;;) f();\n}\n"
PROGRAM = Program("demo_kernel", (Part((Place("demo.cu", "for"),), 50),), loads=3, barriers=2)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "demo.cu").write_text(SOURCE)
    return Sources((tmp_path,))


def kernel(device: Device, *opcodes: str, registers: int = 32, threads: int = 128) -> Kernel:
    code = Code([Instruction(16 * n, o, frames=(("demo.cu", 2),)) for n, o in enumerate(opcodes)])
    sizes = {"static_shared": 0, "stack": 0, "barriers": 0, "instructions": len(opcodes)}
    none = dict.fromkeys(("spill_stores", "spill_loads", "local_stores", "local_loads", "loops"), 0)
    return Kernel(
        device.architecture, "demo_kernel", "", registers, threads, **sizes, **none, code=code
    )


def counts(device: Device, sources: Sources, *opcodes: str, registers: int = 32) -> Counts:
    return Counts([kernel(device, *opcodes, registers=registers)], sources, device)


class TestLaunches:
    @pytest.mark.parametrize("device", DEVICES)
    def test_instructions_of_the_busiest(self, device: Device, sources: Sources) -> None:
        found = counts(device, sources, "FADD", "MUFU", "HMMA.16816.F32")
        sm, blocks = device.sm, 2 * device.multiprocessors + 1
        launch = Launch(PROGRAM, 4 * blocks, 4)
        # Three blocks on one multiprocessor, a warp of each on a scheduler.
        each = 3 / device.cycles_microsecond
        terms = found.times(launch).terms
        assert terms["issue"] == pytest.approx(each * 150)
        assert terms["float32"] == pytest.approx(each * 50 * 32 / sm.float32_lanes)
        assert terms["special"] == pytest.approx(each * 50 * 8)
        tensor = 50 * 2048 / sm.tensor_multiply_adds / device.mma_share
        assert terms["tensor"] == pytest.approx(each * tensor)
        even = found.times(replace(launch, balanced=True)).terms
        share = blocks / device.multiprocessors / 3
        assert even["tensor"] == pytest.approx(terms["tensor"] * share)
        assert even["latency"] == 0

    def test_products_of_warpgroups_reach_the_peak(self, sources: Sources) -> None:
        found = counts(H100, sources, "HGMMA.64x128x16.F32")
        cycles = 50 * 64 * 128 * 16 / 4 / H100.sm.tensor_multiply_adds
        assert found.cycles(PROGRAM)["tensor"] == cycles

    @pytest.mark.parametrize("device", DEVICES)
    def test_chain(self, device: Device, sources: Sources) -> None:
        chain = 3 * L2_CYCLES + 2 * BARRIER_CYCLES + 50 * DEPENDENT_CYCLES
        # Blocks of 128 threads with 128 registers: four at once.
        found = counts(device, sources, "FADD", registers=128)
        for blocks, rounds in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
            launch = Launch(PROGRAM, 4 * blocks * device.multiprocessors, 4)
            latency = found.times(launch).terms["latency"]
            assert latency == pytest.approx(rounds * chain / device.cycles_microsecond)

    @given(st.integers(1, 10**6), SHARES, SHARES)
    def test_bytes(self, warps: int, l2: float, memory: float) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "demo.cu").write_text(SOURCE)
            found = counts(H100, Sources((Path(folder),)), "FADD")
            terms = found.times(Launch(PROGRAM, warps, 4, l2, memory)).terms
        assert terms["L2"] == pytest.approx(l2 / (L2_BYTES_CYCLE * H100.gigahertz * 1e3))
        assert terms["memory"] == pytest.approx(memory / H100.copy_bandwidth * 1e6)

    def test_line(self, sources: Sources) -> None:
        short, long = Launch(PROGRAM, 4, 4), Launch(PROGRAM, 4, 4, memory_bytes=H100.copy_bandwidth)
        line = Line("an example", "demo", lambda _: [short, long, short], {})
        least, most, binds = line.estimate(counts(H100, sources, "FADD"), H100)
        assert least == most == pytest.approx(1e6 + 4)
        assert binds == "memory"

    def test_change(self, sources: Sources) -> None:
        found = counts(H100, sources, "FADD")
        launch = Launch(PROGRAM, 4 * 132, 4)
        changed = found.times(launch, lambda taken: taken | {"tensor": 2 * taken["issue"]})
        assert changed.terms["tensor"] == 2 * found.times(launch).terms["issue"]
        assert found.times(launch).terms["tensor"] == 0

    def test_a_kernel_that_is_not_there(self, sources: Sources) -> None:
        with pytest.raises(SassError, match="no other_kernel for sm_90"):
            counts(H100, sources).cycles(replace(PROGRAM, kernel="other_kernel"))


def every_program() -> Iterator[Program]:
    for line in examples.lines():
        for device in DEVICES:
            yield from (launch.program for launch in line.launches(device))
    yield programs.along_y(1)
    yield programs.refine(64, 2.0, 0.5)


class TestExamples:
    def test_places_are_in_the_sources(self) -> None:
        for program in set(every_program()):
            for path in (program.once, *(part.path for part in program.parts)):
                documents.SOURCES.lines(path)

    def test_rows_of_launches(self) -> None:
        assert examples._chunks(examples.SEARCHED) == [16384, 6944]
        assert examples._chunks(16384) == [16384]
        blocks = {1: 128, 128: 128, 129: 256, 1024: 1024, 1025: 1280, 23328: 16384 + 28 * 256}
        for rows, padded in blocks.items():
            warps = sum(launch.warps for launch in examples.coarse_score((rows,), A100))
            assert warps * 64 * programs.TILE == padded * examples.CODES
            assert sum(launch.warps for launch in examples.refine((rows,), A100)) == rows

    @given(st.integers(1, 64), st.integers(1, 64))
    def test_bins(self, side: int, count: int) -> None:
        """Pooling a line of ones: the bins' sizes as torch's adaptive pooling has them."""
        begins = [math.floor(i * side / count) for i in range(count)]
        ends = [math.ceil((i + 1) * side / count) for i in range(count)]
        expected = sum(e - b for b, e in zip(begins, ends, strict=True)) / count
        assert programs._bins(side, count) == pytest.approx(expected)

    def test_plane_channels_as_the_launcher_chooses(self) -> None:
        assert examples._plane_channels(40) == 4  # 320 blocks; with 8 there are 160
        assert examples._plane_channels(16) == 2

    def test_steps_of_the_pyramid(self) -> None:
        launches = examples.residual_pass(examples.B, A100)
        assert len(launches) == len(examples.B) + 1
        assert {launch.warps for launch in launches} == {320 * 8}

    def test_logits_are_read_once(self) -> None:
        launches = examples.sample(examples.DRAWN, H100)
        assert sum(launch.memory_bytes for launch in launches) == 2 * 4 * 4096 * 32768


class TestVariants:
    @pytest.mark.parametrize("device", DEVICES)
    def test_products(self, device: Device) -> None:
        """Cycles of 1,024 scores: 24 products of 16 x 8 x 16 at 48 columns."""
        rate = device.mma_share * device.sm.tensor_multiply_adds
        before = dict.fromkeys(PIPES, 1.0)
        units = 64 * programs.TILE / 1024
        for columns, products in ((48, 24), (40, 20)):
            taken = variants._products(columns)(device)(before)
            assert taken == before | {"tensor": units * (products * 16 * 8 * 16 / rate)}
        twice = variants._products(48, rate=2)(device)(before)
        assert twice["tensor"] == units * (12 * 16 * 8 * 16 / rate)
        assert variants._own_starts(device)(before)["issue"] == 1 + units * 32

    def test_records_with_two_codes(self) -> None:
        """Codes spread evenly over a row's 64 records, by their Poisson law."""
        mean = variants.INT8_CODES / 64
        found = 64 * (1 - math.exp(-mean) * (1 + mean))
        assert found == pytest.approx(variants.INT8_RECORDS, abs=0.005)


def page(tmp_path: Path, **blocks: str) -> Path:
    path = tmp_path / "page.md"
    made = (
        f"<!-- {name}: begin -->\n\n{text}\n\n<!-- {name}: end -->" for name, text in blocks.items()
    )
    path.write_text("# Page\n\n" + "\n\n".join(made) + "\n")
    return path


class TestDocuments:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = page(
            tmp_path, one="Compiled by ptxas 1.\n\nold", two="Compiled by ptxas 1.\n\n2 kernels"
        )
        made = [
            (path, "one", lambda kernels, _: "new"),
            (path, "two", lambda kernels, _: f"{len(kernels)} kernels"),
        ]
        monkeypatch.setattr(documents, "BLOCKS", made)
        return path

    @pytest.fixture
    def kernels(self) -> list[Kernel]:
        return [kernel(device, "FADD") for device in DEVICES]

    def test_out_of_date(self, path: Path, kernels: list[Kernel]) -> None:
        assert documents.out_of_date(kernels, "ptxas 1") == (["page.md (one)"], [])
        documents.write(kernels, "ptxas 1")
        assert documents.out_of_date(kernels, "ptxas 1") == ([], [])
        assert "old" not in path.read_text()

    @pytest.mark.usefixtures("path")
    def test_others_are_not_compared(self, kernels: list[Kernel]) -> None:
        both = ["page.md (one)", "page.md (two)"]
        assert documents.out_of_date(kernels, "ptxas 2") == ([], both)
        assert documents.out_of_date(kernels[:1], "ptxas 1") == ([], both)

    def test_further_architectures_are_left_out(self, path: Path, kernels: list[Kernel]) -> None:
        further = [*kernels, replace(kernels[0], architecture="sm_86")]
        documents.write(further, "ptxas 1")
        assert "2 kernels" in path.read_text()

    @pytest.mark.usefixtures("path")
    def test_check_fails(
        self,
        kernels: list[Kernel],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("sass.__main__.read_objects", lambda paths: (kernels, "ptxas 1"))
        assert main(["--check"]) == 1
        assert "page.md (one) is out of date" in capsys.readouterr().err
        assert main(["--check", "named.o"]) == 0
        assert main(["--write"]) == 0
        assert main(["--check"]) == 0

    def test_the_repository_has_the_blocks(self) -> None:
        for path, name, _ in documents.BLOCKS:
            held = documents.block_of(path.read_text(), name)
            assert held.startswith("Compiled by ptxas ")
            assert "| " in held
