"""Options of the benchmarks and the tables they print at the end."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import tokenflow_ext
from benchmarks.memory import ROOT, MemoryProbe

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokenflow benchmarks")
    group.addoption("--batch", type=int, default=2, help="images in a batch (default: 2)")
    group.addoption(
        "--budget",
        type=float,
        default=5.0,
        help="seconds of timing for a line of the table (default: 5; at least 3 rounds are run)",
    )
    group.addoption(
        "--compile",
        action="store_true",
        help="measure torch.compile of the eager form too; compiling takes minutes",
    )


@dataclass
class Table:
    """A Markdown table that fills up as benchmarks run."""

    title: str
    note: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The table with its columns aligned."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        rule = ["-" * width for width in widths]
        body = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in (self.header, rule, *self.rows)
        ]
        return ["", self.title, "", *body, "", self.note]


class Report:
    """Tables by name, printed when everything has run."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}

    def add(self, name: str, title: str, note: str, row: dict[str, str]) -> None:
        """Appends a row, keyed by column, to a table."""
        table = self.tables.setdefault(name, Table(title, note, list(row)))
        table.rows.append([row[column] for column in table.header])


_REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from benchmarks.timing import clock

    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def machine() -> str:
    """Device, versions and commit, in a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    info = tokenflow_ext.build_info()
    parts = [
        f"{model}, {torch.get_num_threads()} threads, kernels: {info['cpu_instruction_set']}",
        f"Python {platform.python_version()}, torch {torch.__version__}",
        f"tokenflow_ext {info['version']} at {commit or 'no commit'}, {info['compiler']}",
    ]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return "; ".join(parts)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tables = config.stash[_REPORT].tables
    if not tables:
        return
    terminalreporter.section("ours against the baselines")
    terminalreporter.write_line(machine())
    for table in tables.values():
        for line in table.lines():
            terminalreporter.write_line(line)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is."""
    return request.param


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """The tables of this run."""
    return request.config.stash[_REPORT]


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    """Images in a batch."""
    return request.config.getoption("--batch")


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds of timing for a line."""
    return request.config.getoption("--budget")


@pytest.fixture(scope="session")
def memory() -> Iterator[MemoryProbe]:
    """Measures peak memory; its helper process ends with the run."""
    probe = MemoryProbe()
    yield probe
    probe.close()
