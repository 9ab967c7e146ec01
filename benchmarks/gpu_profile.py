"""What Nsight Compute says of the kernels that matter: `python -m benchmarks.gpu profile --out D`.

One process runs the calls of `once` under `ncu`, which repeats every launch of KERNELS until it has
counted all that SECTIONS name, with the clocks as they are and with what the launch before left in
the caches. D then holds profile.ncu-rep for ncu's own viewer, the same as profile.csv, and
profile.txt: of each kernel's longest launch what it used, what its warps waited for, and whether it
is bound by what docs/kernels.md says.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import DIMS
from benchmarks.gpu_calls import DIM, Lines, Settings, Wrong, features, quantizer_for, step
from benchmarks.tables import Table
from tokenflow_ext import nearest_code, sample_top_k_top_p
from tokenflow_ext.codes import Signs
from tokenflow_ext.scalar_quantizer import ScalarQuantizer

#: What is claimed to bind each kernel (the tables of docs/kernels.md), a key of BOUNDS.
KERNELS = {
    "measure_kernel": "memory",
    "judge_kernel": "latency",
    "pack_kernel": "latency",
    "coarse_score_kernel": "tensor cores",
    "warpgroup_score_kernel": "tensor cores",
    "refine_kernel": "latency of the L2",
    "step_kernel": "latency",
    "row_gradient_kernel": "memory",
    "sample_kernel": "memory",
    "scalar_quantize_kernel": "latency",
}
#: Memory, compute, occupancy and stall reasons, by ncu's names.
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "WarpStateStats",
)
MOST_SECONDS = 540

TIME = "gpu__time_duration.sum"
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
L2_HITS = "lts__t_sector_hit_rate.pct"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
_PIPE = re.compile(
    r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active"
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_MICROSECONDS = {
    **dict.fromkeys(("ns", "nsecond"), 1e-3),
    **dict.fromkeys(("us", "usecond"), 1.0),
    **dict.fromkeys(("ms", "msecond"), 1e3),
    **dict.fromkeys(("s", "second"), 1e6),
}


def once(settings: Settings) -> Lines:
    """The search, a training step, the sampler and signs along a pyramid, once each."""
    nearest_code(settings.randn(23328, DIM), settings.randn(settings.codes, DIM), DIMS)
    case = replace(settings, pyramid="B", batch=32)
    h, grad = (tensor.to(settings.device) for tensor in features(case))
    step(quantizer_for(case, settings.device), h, grad)
    for dtype in (torch.float32, torch.bfloat16):
        logits, uncond = (settings.randn(4096, settings.codes, dtype=dtype) for _ in range(2))
        sample_top_k_top_p(logits, uncond=uncond, top_k=1200, top_p=0.8, guidance=3.75, check=False)
    signs = ScalarQuantizer(Signs(16), scales=(1, 2, 4, 8, 16)).to(settings.device).eval()
    with torch.no_grad():
        signs(settings.randn(32, 16, 16, 16))
    if settings.device == "cuda":
        torch.cuda.synchronize()
    yield "every call ran"


@dataclass(frozen=True)
class Launch:
    """A row of ncu's raw page: numbers in the units of their columns."""

    kernel: str  # with its template arguments
    microseconds: float
    metrics: dict[str, float]

    @property
    def function(self) -> str:
        """The kernel's name alone."""
        found = re.search(r"\b\w+_kernel\b", self.kernel)
        return found[0] if found else self.kernel

    def largest(self, pattern: re.Pattern[str], count: int = 1) -> list[tuple[str, float]]:
        """The columns that match, by what the pattern's group holds, the largest first."""
        found: dict[str, float] = {}
        for name, value in self.metrics.items():
            if match := pattern.fullmatch(name):
                found[match[1]] = max(value, found.get(match[1], 0.0))
        return sorted(found.items(), key=lambda item: -item[1])[:count]


def read_raw_page(text: str) -> list[Launch]:
    """Launches of `ncu --page raw --csv`: a line of names, one of units, and a line a launch.

    Raises:
        Wrong: the text has no such lines, or a time in a unit that is not known.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    rows = [row for row in csv.reader(lines[begin:]) if row] if begin is not None else []
    if len(rows) < 2 or "Kernel Name" not in rows[0] or TIME not in rows[0]:
        raise Wrong("ncu printed no table of launches")
    names, units = rows[0], rows[1]
    unit = units[names.index(TIME)]
    if unit not in _MICROSECONDS:
        raise Wrong(f"ncu gives times in {unit!r}")
    launches = []
    for row in rows[2:]:
        cells = dict(zip(names, row, strict=True))
        metrics = {}
        for name in names[names.index("CC") + 1 :]:
            try:
                metrics[name] = float(cells[name].replace(",", ""))
            except ValueError:  # a word, or what the device does not count
                continue
        if TIME not in metrics:
            raise Wrong(f"ncu gives no time of a launch of {cells['Kernel Name']}")
        launches.append(Launch(cells["Kernel Name"], metrics[TIME] * _MICROSECONDS[unit], metrics))
    return launches


def _throughput(launch: Launch) -> tuple[float, float] | None:
    compute, memory = launch.metrics.get(COMPUTE), launch.metrics.get(MEMORY)
    return None if compute is None or memory is None else (compute, memory)


def _waits(launch: Launch) -> bool | None:
    """ncu's own rule: neither compute nor memory is used to 60%."""
    used = _throughput(launch)
    return None if used is None else max(used) < 60


def _uses_memory(launch: Launch) -> bool | None:
    used = _throughput(launch)
    return None if used is None else used[1] >= 60 and used[1] >= used[0]


def _uses_tensor_cores(launch: Launch) -> bool | None:
    busiest = launch.largest(_PIPE)
    return busiest[0][0].startswith("tensor") and busiest[0][1] >= 60 if busiest else None


def _waits_for_the_l2(launch: Launch) -> bool | None:
    waits, stalls, hits = _waits(launch), launch.largest(_STALL), launch.metrics.get(L2_HITS)
    if waits is None or not stalls or hits is None:
        return None
    return waits and stalls[0][0] == "long_scoreboard" and hits >= 90


#: What has to be seen of a launch for a claim to hold, and how to tell: None where it was not
#: counted.
BOUNDS: dict[str, tuple[str, Callable[[Launch], bool | None]]] = {
    "memory": ("memory at 60% or more, and no less than compute", _uses_memory),
    "latency": ("compute and memory both below 60%", _waits),
    "tensor cores": ("the busiest pipe is the tensor cores', at 60% or more", _uses_tensor_cores),
    "latency of the L2": (
        "as latency, most waiting on loads (long_scoreboard), 90% of the L2's sectors hit",
        _waits_for_the_l2,
    ),
}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"


def summary(launches: Sequence[Launch]) -> Lines:
    """The longest launch of each kernel, and what becomes of the claims."""
    used, claims = [], []
    for kernel, bound in KERNELS.items():
        seen, holds = BOUNDS[bound]
        claim = {"kernel": kernel, "said to be bound by": bound, "seen as": seen}
        found = [launch for launch in launches if launch.function == kernel]
        if not found:
            claims.append(claim | {"verdict": "no launch"})
            continue
        longest = max(found, key=lambda launch: launch.microseconds)
        number = longest.metrics.get
        pipes, stalls = longest.largest(_PIPE, 2), longest.largest(_STALL, 2)
        used.append(
            {
                "kernel": kernel,
                "launches": str(len(found)),
                "us in all": f"{sum(launch.microseconds for launch in found):.1f}",
                "longest": f"{longest.microseconds:.1f}",
                "compute": _percent(number(COMPUTE)),
                "memory": _percent(number(MEMORY)),
                "DRAM": _percent(number(DRAM)),
                "L2 hits": _percent(number(L2_HITS)),
                "occupancy": _percent(number(OCCUPANCY)),
                "busiest pipes": ", ".join(f"{name} {share:.0f}%" for name, share in pipes) or "-",
                "stalls, cycles an instruction": ", ".join(
                    f"{name} {cycles:.1f}" for name, cycles in stalls
                )
                or "-",
            }
        )
        verdict = {True: "holds", False: "does not hold", None: "not counted"}[holds(longest)]
        claims.append(claim | {"verdict": verdict})
    if used:
        yield from [*Table("", used, "").lines(), ""]
    yield from Table("", claims, "").lines()


def command(ncu: str, settings: Settings, report: Path) -> list[str]:
    """ncu over the calls of `once`, into the file `report`.ncu-rep."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    return [
        *(ncu, "--clock-control", "none", "--cache-control", "none", "--target-processes", "all"),
        *("--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(KERNELS)})$"),
        *(*sections, "--export", str(report), sys.executable, "-m", "benchmarks.gpu", "once"),
        *("--device", settings.device, "--codes", str(settings.codes)),
    ]


def _run(arguments: Sequence[str], most_seconds: float) -> str:
    """What a program prints; it and what it started end with the time."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=most_seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Wrong(f"ncu took more than {most_seconds:.0f} s") from None
    if process.returncode:
        said = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("==ERROR==")] or said[-1:]
        raise Wrong(f"ncu ended with {process.returncode}: {' '.join(errors)}")
    return output


def profile(settings: Settings) -> Lines:
    ncu = shutil.which("ncu")
    if ncu is None:
        yield "ncu is not on the PATH: nothing was profiled"
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = (settings.out or Path(scratch)) / "profile"
        _run(command(ncu, settings, report), MOST_SECONDS)
        raw = ["--page", "raw", "--csv", "--print-units", "base"]
        text = _run([ncu, "--import", f"{report}.ncu-rep", *raw], 60)
    if settings.out:
        (settings.out / "profile.csv").write_text(text, encoding="utf-8")
    yield from summary(read_raw_page(text))
