"""Runs the benchmarks and writes what they found: `python -m benchmarks.report`.

For each device a folder with report.md and plots, docs/benchmarks/<device> by default. With --json
the results of an earlier run are used (`pytest benchmarks --benchmark-json results.json`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, plots
from benchmarks.tables import Record, included, tables

DEFAULT_OUT = machine.ROOT / "docs" / "benchmarks"


def run(options: argparse.Namespace, results: Path) -> None:
    """Runs `pytest benchmarks`, which writes `results`.

    Raises:
        SystemExit: a benchmark failed, or what is compared does not agree.
    """
    selected = f"({' or '.join(options.devices)})"
    if options.quick:
        selected += " and 8192 and not XL"
    arguments = ["benchmarks", "-q", "-k", selected, "--batch-size", str(options.batch_size)]
    if options.quick:
        arguments += ["--budget", "1"]
    arguments += [f"--{name}" for name in ("compile", "large") if getattr(options, name)]
    command = [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={results}"]
    status = subprocess.run(command, cwd=machine.ROOT).returncode
    if status:
        raise SystemExit(f"the benchmarks ended with status {status}: no report")


def folder_name(device_name: str) -> str:
    """A device's name as a folder: "NVIDIA H200" becomes nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write(folder: Path, device: str, run_facts: dict[str, Any], records: Sequence[Record]) -> None:
    """Writes report.md and the plots of one device."""
    folder.mkdir(parents=True, exist_ok=True)
    quantizer = [record for record in records if record["kind"] == "quantizer"]
    search = [record for record in records if record["kind"] == "search"]
    name = run_facts["device"][device]
    figures = {}
    if quantizer:
        setting = f"batch {quantizer[0]['batch']}, {name}"
        panels = plots.quantizer_panels(quantizer, "seconds", 1e-3)
        figures["time"] = plots.compare(panels, f"Time of one call, {setting}", "ms")
        panels = plots.quantizer_panels(quantizer, "bytes", 2**20)
        figures["memory"] = plots.compare(panels, f"Peak memory of one call, {setting}", "MiB")
    if search:
        panels = plots.search_panels(search)
        figures["search"] = plots.compare(panels, f"Search alone, {name}", "ms")
    if quantizer or search:
        figures["roofline"] = plots.roofline(quantizer + search, f"Roofline, {name}")
    for figure_name, figure in figures.items():
        plots.save(figure, folder, figure_name)

    lines = [f"# Benchmarks on {name}", ""]
    lines += ["Written by `python -m benchmarks.report`; every number is of one run.", ""]
    lines += [f"- {fact}" for fact in machine.describe(run_facts, device)]
    for figure_name in figures:
        lines += ["", f"![{figure_name}]({figure_name}.svg)"]
    missing, meanings = (
        run_facts[name].get(device, {}) for name in ("missing ceilings", "ceilings")
    )
    for table in tables(records, missing, meanings):
        lines += ["", f"## {table.title}", "", *table.lines(), "", table.note]
    lines += [
        "",
        "## What is compared",
        "",
        "All run on the same inputs (Gaussian), and the run fails unless they choose the same "
        "codes but for near-ties and agree in losses, features, gradients and hits. They are timed "
        "in turns. `forward` runs without gradients in evaluation; `forward+backward` in training, "
        "with gradients of the features and of both codebooks.",
        "",
        *(f"- {line}" for line in included(records)),
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Measure the kernels against the baselines and write tables and plots.",
    )
    parser.add_argument("--json", type=Path, help="read these results instead of measuring")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="gets a folder for each device: %(default)s"
    )
    parser.add_argument(
        "--batch-size", "--batch", type=int, default=2, help="images in a batch: %(default)s"
    )
    parser.add_argument(
        "--devices", nargs="+", choices=("cpu", "cuda"), default=["cpu", "cuda"], help="%(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="pyramid B with K = 8,192 alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--large", action="store_true", help="K = 131,072 at XL, a 1B model too")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as temporary:
        results = options.json or Path(temporary) / "results.json"
        if options.json is None:
            run(options, results)
        found = json.loads(results.read_text())
    records = [benchmark["extra_info"] for benchmark in found["benchmarks"]]
    for device in options.devices:
        here = [record for record in records if record["device"] == device]
        if here:
            folder = options.out / folder_name(found["run"]["device"][device])
            write(folder, device, found["run"], here)
            print(f"wrote {folder}")


if __name__ == "__main__":
    main()
