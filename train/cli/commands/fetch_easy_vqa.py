"""``tokenflow fetch-easy-vqa``: the questions of the understanding demonstration."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_ext.train.data import easy_vqa

HELP = "fetch the pictures and questions of the understanding demonstration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--wheel", metavar="FILE", help="the package's file, where pip fetches none"
    )


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    if arguments.wheel:
        easy_vqa.from_wheel(Path(arguments.wheel), Path(arguments.folder))
    else:
        easy_vqa.fetch(arguments.folder)
