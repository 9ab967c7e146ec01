"""``tokenflow fid``: the Frechet distance of two sets of pictures."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.evaluation import fid, picture_sets

HELP = "FID of two sets of pictures: folders, npz files, statistics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "sets",
        nargs=2,
        metavar="PICTURES",
        help="a folder, an npz file with arr_0, or one with Inception's mu and sigma",
    )
    parser.add_argument("--weights", metavar="FILE", help=f"{fid.WEIGHTS}")
    parser.add_argument(
        "--more",
        action="store_true",
        help="the Inception score of the first, precision and recall too",
    )
    options.add_batch_size(parser, 64)
    options.add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, batch_size=1)
    one, other = arguments.sets
    found, definition = picture_sets.compare(
        one,
        other,
        arguments.weights,
        arguments.device,
        arguments.batch_size,
        more=arguments.more,
    )
    for name, value in found.items():
        print(f"{_NAMES.get(name, name)} {value:.4f}")
    print(f"({definition})")


_NAMES = {
    "fid": "FID",
    "fd_efflite0": "FD-EffLite0 (not FID)",
    "inception_score": "Inception score",
    "inception_score_deviation": "Inception score, deviation",
}
