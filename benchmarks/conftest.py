"""Options of the benchmarks and the tables they print at the end."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.cases import DEVICES
from benchmarks.memory import MemoryProbe
from benchmarks.roofline import Ceiling
from benchmarks.roofline import ceilings as measured_ceilings
from benchmarks.tables import Record, tables
from benchmarks.timing import clock


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokenflow benchmarks")
    group.addoption(
        "--batch-size", "--batch", type=int, default=2, help="images in a batch (default: 2)"
    )
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
    group.addoption(
        "--large",
        action="store_true",
        help="measure K = 131,072 at XL, and a 1B model's generation",
    )


_RECORDS = pytest.StashKey[list[Record]]()
_RUN = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []
    arguments = [str(argument) for argument in config.invocation_params.args]
    config.stash[_RUN] = {
        **machine.facts([a for a in arguments if not a.startswith("--benchmark-json")]),
        "ceilings": {},
        "missing ceilings": {},
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def _finished(config: pytest.Config) -> dict[str, Any]:
    run = config.stash[_RUN]
    run.setdefault("load after", list(os.getloadavg()))
    return run


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What `python -m benchmarks.report --json` reads beside the benchmarks' extra_info."""
    output_json["run"] = _finished(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    run, records = _finished(config), config.stash[_RECORDS]
    for device in DEVICES:
        here = [record for record in records if record["device"] == device]
        if not here:
            continue
        terminalreporter.section(f"ours against the baselines, {device}")
        for line in machine.describe(run, device):
            terminalreporter.write_line(line)
        missing, meanings = (run[name].get(device, {}) for name in ("missing ceilings", "ceilings"))
        for table in tables(here, missing, meanings):
            for line in ["", table.title, "", *table.lines(), "", table.note]:
                terminalreporter.write_line(line)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is."""
    return request.param


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Record], None]:
    """Keeps what a benchmark found, for the tables and for pytest-benchmark's JSON."""

    def keep(found: Record) -> None:
        request.config.stash[_RECORDS].append(found)
        benchmark.extra_info.update(found)

    return keep


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Iterator[Callable[[str], list[Ceiling]]]:
    """The limits of a device, made ready when first asked for."""
    run = pytestconfig.stash[_RUN]
    with ExitStack() as stack:

        @functools.cache
        def of(device: str) -> list[Ceiling]:
            found, missing = stack.enter_context(measured_ceilings(device))
            run["ceilings"][device] = {ceiling.name: ceiling.meaning for ceiling in found}
            run["missing ceilings"][device] = missing
            return found

        yield of


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    """Images in a batch."""
    return request.config.getoption("--batch-size")


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
