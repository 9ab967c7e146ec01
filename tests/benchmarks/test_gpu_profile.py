"""The profile mode: what it reads out of ncu's CSV, where it leaves it, and what it makes of it."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu, gpu_profile
from benchmarks.gpu_calls import Settings, Wrong
from benchmarks.gpu_profile import KERNELS, Launch, read_raw_page, summary

ROOT = Path(__file__).resolve().parents[2]
FIXED = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
FIXED += ["Block Size", "Grid Size", "Device", "CC"]
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
PIPE = "sm__inst_executed_pipe_{}.avg.pct_of_peak_sustained_active"
UNITS = {
    gpu_profile.TIME: "ns",
    gpu_profile.COMPUTE: "%",
    gpu_profile.MEMORY: "%",
    gpu_profile.DRAM: "%",
    gpu_profile.L2_HITS: "%",
    gpu_profile.OCCUPANCY: "%",
    PIPE.format("alu"): "%",
    PIPE.format("tensor_op_hmma"): "%",
    STALL.format("barrier"): "inst",
    STALL.format("long_scoreboard"): "inst",
    "launch__func_cache_config": "",
}
COARSE = "void tokenflow::cuda::<unnamed>::coarse_score_kernel<(int)3, (int)4>(SearchArgs, long)"
REFINE = "tokenflow::cuda::(anonymous namespace)::refine_kernel(tokenflow::cuda::SearchArgs, long)"


def page(*launches: tuple[str, list[object]], units: dict[str, str] = UNITS) -> str:
    """What `ncu --import --page raw --csv` prints."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow([*FIXED, *units])
    writer.writerow([""] * len(FIXED) + list(units.values()))
    for number, (kernel, values) in enumerate(launches):
        fixed = [number, 42, "python", "host", kernel, 1, 7, "(128, 1, 1)", "(92, 6, 1)", 0, "9.0"]
        writer.writerow([*fixed, *values])
    return "==PROF== Connected to process 42\n" + text.getvalue()


LAUNCHES = [
    (COARSE, ["60,000", 71, 30, 1.5, 99, 24, 52, 73, 0.5, 1.2, "PreferNone"]),
    (COARSE, ["140,250", 74, 31, 1.6, 99, 25, 53.4, 74.6, 0.4, 1.3, "PreferNone"]),
    (REFINE, ["45,500", 44, 58.6, 2.0, 97, 30, 31, 0, 0.1, 9.25, "PreferNone"]),
]


class TestReading:
    def test_hand_made(self) -> None:
        first, second, third = read_raw_page(page(*LAUNCHES))
        assert [launch.function for launch in (first, third)] == [
            "coarse_score_kernel",
            "refine_kernel",
        ]
        assert (first.microseconds, second.microseconds, third.microseconds) == (60, 140.25, 45.5)
        assert second.metrics[gpu_profile.OCCUPANCY] == 25
        assert "launch__func_cache_config" not in second.metrics

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(KERNELS)),
                st.floats(0.001, 1e6, allow_nan=False),
                st.floats(0, 100),
            ),
            max_size=6,
        ),
        st.sampled_from([("ns", 1e-3), ("usecond", 1), ("ms", 1e3), ("s", 1e6)]),
    )
    def test_what_was_written(
        self, written: list[tuple[str, float, float]], unit: tuple[str, float]
    ) -> None:
        units = {gpu_profile.TIME: unit[0], gpu_profile.DRAM: "%"}
        launches = [(f"void a::{name}<1, (b)2>(c)", [t, dram]) for name, t, dram in written]
        found = read_raw_page(page(*launches, units=units))
        assert [(launch.function, launch.metrics[gpu_profile.DRAM]) for launch in found] == [
            (name, dram) for name, _, dram in written
        ]
        assert [launch.microseconds for launch in found] == [t * unit[1] for _, t, _ in written]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("==WARNING== No kernels were profiled.\n", "no table of launches"),
            (page(*LAUNCHES).replace(gpu_profile.TIME, "another"), "no table of launches"),
            (page(*LAUNCHES).replace('"ns"', '"fortnight"'), "times in 'fortnight'"),
            (page(*LAUNCHES).replace("45,500", "n/a"), "no time of a launch"),
        ],
    )
    def test_bad_text(self, text: str, said: str) -> None:
        with pytest.raises(Wrong, match=said):
            read_raw_page(text)


class TestSummary:
    def test_longest_launches(self) -> None:
        text = "\n".join(summary(read_raw_page(page(*LAUNCHES))))
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        rows = {row[0]: row[1:] for row in cells if row}
        used = [line for line in cells if line[:2] == ["coarse_score_kernel", "2"]]
        assert used[0][2:] == [
            *("200.2", "140.2", "74%", "31%", "2%", "99%", "25%"),
            "tensor_op_hmma 75%, alu 53%",
            "long_scoreboard 1.3, barrier 0.4",
        ]
        # The second table's rows come last.
        assert rows["coarse_score_kernel"][-1] == "holds"
        assert rows["refine_kernel"][-1] == "holds"
        assert rows["pack_kernel"][-1] == "no launch"

    @pytest.mark.parametrize(
        ("bound", "metrics", "holds"),
        [
            ("memory", {gpu_profile.COMPUTE: 20, gpu_profile.MEMORY: 61}, True),
            ("memory", {gpu_profile.COMPUTE: 20, gpu_profile.MEMORY: 59}, False),
            ("memory", {gpu_profile.COMPUTE: 80, gpu_profile.MEMORY: 70}, False),
            ("memory", {gpu_profile.MEMORY: 70}, None),
            ("latency", {gpu_profile.COMPUTE: 59, gpu_profile.MEMORY: 50}, True),
            ("latency", {gpu_profile.COMPUTE: 50, gpu_profile.MEMORY: 60}, False),
            ("tensor cores", {PIPE.format("tensor"): 60, PIPE.format("alu"): 55}, True),
            ("tensor cores", {PIPE.format("tensor"): 60, PIPE.format("alu"): 65}, False),
            ("tensor cores", {PIPE.format("tensor"): 40, PIPE.format("alu"): 35}, False),
            ("tensor cores", {}, None),
            ("latency of the L2", {STALL.format("barrier"): 5}, False),
            ("latency of the L2", {}, True),
            ("latency of the L2", {gpu_profile.L2_HITS: 80}, False),
        ],
    )
    def test_claims(self, bound: str, metrics: dict[str, float], holds: bool | None) -> None:
        if bound == "latency of the L2":
            usual = {gpu_profile.COMPUTE: 40, gpu_profile.MEMORY: 40, gpu_profile.L2_HITS: 95}
            metrics = usual | {STALL.format("long_scoreboard"): 4} | metrics
        launch = Launch("a_kernel", 1.0, {name: float(value) for name, value in metrics.items()})
        assert gpu_profile.BOUNDS[bound][1](launch) is holds

    def test_kernels_are_those_of_the_source(self) -> None:
        source = "".join(file.read_text() for file in (ROOT / "csrc/cuda").glob("*.cu"))
        defined = set(re.findall(r"\b(\w+_kernel)\(const __grid_constant__", source))
        assert KERNELS.keys() <= defined
        assert set(KERNELS.values()) <= gpu_profile.BOUNDS.keys()


def settings(out: Path | None = None) -> Settings:
    return Settings("cpu", 600, "tiny", 2, 0.1, out)


#: Stands for ncu: prints a page where it imports, else runs nothing and writes the report.
NCU = """#!{python}
import sys
arguments = sys.argv[1:]
if "--import" in arguments:
    print(open({page!r}).read())
else:
    report = arguments[arguments.index("--export") + 1] + ".ncu-rep"
    open(report, "w").write(" ".join(arguments))
    {then}
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "pass") -> None:
    (folder / "page.csv").write_text(page(*LAUNCHES))
    program = folder / "ncu"
    program.write_text(NCU.format(python=sys.executable, page=str(folder / "page.csv"), then=then))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_documents_say_what_each_mode_settles() -> None:
    text = (ROOT / "docs/measurements.md").read_text()
    table = text.partition("| step | settles |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == gpu.MODES.keys() - {"once"}


def test_claims_are_those_of_the_documents() -> None:
    """The column of what binds each kernel, in the tables that end in it."""
    text = (ROOT / "docs/kernels.md").read_text().partition("\n## CUDA")[2]
    bounds = {}
    for table in re.findall(r"^\|.*\| bound by \|\n(?:\|.*\n)+", text, re.MULTILINE):
        bounds |= re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE)
    known = {kernel: claim for kernel, claim in KERNELS.items() if kernel[:-7] in bounds}
    assert len(known) >= 8
    for kernel, claim in known.items():
        assert claim in bounds[kernel.removesuffix("_kernel")]


class TestMode:
    def test_without_ncu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        lines = list(gpu_profile.profile(settings(tmp_path)))
        assert lines == ["ncu is not on the PATH: nothing was profiled"]
        assert list(tmp_path.iterdir()) == []

    def test_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        tools, out = tmp_path / "tools", tmp_path / "out"
        tools.mkdir()
        install(tools, monkeypatch)
        small = ["--device", "cpu", "--codes", "600", "--out", str(out)]
        assert gpu.main(["profile", *small]) == 0
        assert {file.name for file in out.iterdir()} == {
            "profile.txt",
            "profile.csv",
            "profile.ncu-rep",
        }
        assert read_raw_page((out / "profile.csv").read_text()) == read_raw_page(page(*LAUNCHES))
        assert "| tensor_op_hmma 75%" in (out / "profile.txt").read_text()
        given_to_ncu = (out / "profile.ncu-rep").read_text()
        assert "--clock-control none" in given_to_ncu
        assert "--section WarpStateStats" in given_to_ncu
        assert given_to_ncu.endswith("benchmarks.gpu once --device cpu --codes 600")
        with pytest.raises(SystemExit):
            gpu.main(["profile", *small])

    def test_failure_is_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        error = "==ERROR== ERR_NVGPUCTRPERM - no permission"
        install(tmp_path, monkeypatch, f"print({error!r}); print('gone'); sys.exit(3)")
        with pytest.raises(Wrong, match=f"ended with 3: {error}$"):
            list(gpu_profile.profile(settings()))

    def test_ends_with_the_time(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        child = "import subprocess; subprocess.run([sys.executable, '-c', 'import time; "
        install(tmp_path, monkeypatch, child + "time.sleep(60)'])")
        monkeypatch.setattr(gpu_profile, "MOST_SECONDS", 0.5)
        begin = time.monotonic()
        with pytest.raises(Wrong, match="more than"):
            list(gpu_profile.profile(settings()))
        assert time.monotonic() - begin < 30

    def test_less_than_ten_minutes(self) -> None:
        assert gpu_profile.MOST_SECONDS + 60 <= 600

    def test_calls_run_on_the_cpu(self) -> None:
        assert list(gpu_profile.once(settings())) == ["every call ran"]
