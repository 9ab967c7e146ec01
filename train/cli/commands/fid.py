"""``tokenflow fid``: FID of two folders of pictures."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.evaluation import fid

HELP = "FID of two folders of pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folders", nargs=2, metavar="DIR")
    parser.add_argument("--weights", metavar="FILE", help=f"{fid.WEIGHTS}")
    options.add_batch_size(parser, 64)
    options.add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, batch_size=1)
    one, other = arguments.folders
    value = fid.fid(one, other, arguments.weights, arguments.device, arguments.batch_size)
    print(f"FID {value:.4f}")
