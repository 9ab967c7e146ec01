"""What the comparisons that train have in common: command line, facts, and files after each row."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from tokenflow_ext.train.engine import checkpoint

RESULT = "result.json"


def row_parser(
    program: str, description: str | None, rows: Iterable[str]
) -> argparse.ArgumentParser:
    """A command line that picks rows with ``--rows``; the caller adds its own options."""
    names = tuple(rows)
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="key=value sets a key of the training configuration in every row.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows",
        nargs="*",
        choices=names,
        default=names,
        metavar="ROW",
        help=f"{', '.join(names)} [all]",
    )
    return parser


def once_at_the_end(steps: int) -> list[str]:
    """Settings of a run that evaluates, shows and saves at its last step alone."""
    return [f"output.{what}_every={steps}" for what in ("eval", "picture", "checkpoint")]


def training_facts() -> dict[str, Any]:
    """The machine's facts, without those of baselines and of the command that pytest is."""
    left_out = ("baselines", "compiler", "command")
    return {key: value for key, value in machine.facts([]).items() if key not in left_out}


def ending(facts: dict[str, Any]) -> list[str]:
    """The last lines below a table: versions, and the command."""
    return [
        f"- Python {facts['python']}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}",
        f"- `{facts['command']}`",
    ]


def where(shared: dict[str, Any], device: str) -> dict[str, Any]:
    """The processor or GPU that a comparison ran on, and torch's threads."""
    name = torch.cuda.get_device_name() if device == "cuda" else shared["device"]["cpu"]
    return {"machine": name, "threads": torch.get_num_threads()}


def place(facts: dict[str, Any]) -> str:
    """What `where` found and the load, in words."""
    return (
        f"{facts['machine']}, {facts['threads']} thread(s); load average before "
        f"{facts['load before'][0]:.1f}, after {facts['load after'][0]:.1f}"
    )


def memory(row: dict[str, Any], digits: int) -> str:
    """Peak memory of both sides in MiB, and ours over theirs; empty where it was not measured."""
    if "memory" not in row:
        return ""
    ours, theirs = (row["memory"][name] / 2**20 for name in ("ours", "theirs"))
    return f"{ours:.{digits}f} / {theirs:.{digits}f} MiB ({ours / max(theirs, 1e-9):.2f})"


def now(shared: dict[str, Any], overrides: Sequence[str], **more: Any) -> dict[str, Any]:
    """The facts as they are after a row: those of the start, and the load now."""
    return {**shared, **more, "overrides": list(overrides), "load after": list(os.getloadavg())}


def write(
    out: Path, markdown: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]], **more: Any
) -> None:
    """Write table.md and results.json, in the place of those of the row before."""
    checkpoint.write_text(out / "table.md", markdown)
    text = json.dumps({"facts": facts, **more, "rows": rows}, indent=2)
    checkpoint.write_text(out / "results.json", text + "\n")
