"""The command line of a training script."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from . import runs
from .distributed import Processes, processes
from .messages import ending_in_one_line

Config = TypeVar("Config", bound=runs.Config)


def read_arguments(
    load: Callable[[Any, list[str]], Config], program: str, description: str, argv: list[str] | None
) -> tuple[Config, bool]:
    """The configuration that the command line asks for, and whether to resume.

    A resumed run takes the configuration saved in its folder, unless a file is given.

    Args:
        load: makes the configuration of a file (or None) and overrides.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the configuration (printed at the start of a run) can be set: "
        "optim.lr=1e-4 or --optim.lr 1e-4.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in its folder (run=FOLDER)"
    )
    known, overrides = parser.parse_known_args(argv)
    config = load(known.config, overrides)
    saved = Path(config.run) / runs.CONFIG_FILE
    if known.resume and known.config is None and saved.exists():
        config = load(saved, overrides)
    return config, known.resume


def run_command(
    read: Callable[[], tuple[Config, bool]], train: Callable[[Config, Processes, bool], Any]
) -> None:
    """The command; see :func:`messages.ending_in_one_line`."""
    with ending_in_one_line():
        config, resume = read()
        with processes(config.device) as group:
            train(config, group, resume)
