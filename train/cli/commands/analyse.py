"""``tokenflow analyse``: which images share a code, and how many codes do."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.engine.distributed import processes
from tokenflow_ext.train.evaluation import analyse, clusters

HELP = "which images share a code, and how many codes do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    options.add_tokenizer(parser, several=True, more="; several: compared")
    parser.add_argument(
        "--data", metavar="FOLDER", help="searched in depth [squares of the built-in photographs]"
    )
    options.add_out(parser, "analysis")
    options.add_overwrite(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        choices=clusters.CODEBOOKS,
        metavar="CODEBOOK",
        help=f"{', '.join(clusters.CODEBOOKS)} [all that differ]",
    )
    options.add_reading(parser)
    parser.add_argument(
        "--clusters", type=int, default=8, metavar="N", help="in a picture [%(default)s]"
    )
    parser.add_argument(
        "--members", type=int, default=10, metavar="N", help="shown of a cluster [%(default)s]"
    )


def run(arguments: argparse.Namespace) -> None:
    """The command; under torchrun, one process of it."""
    options.check_counts(arguments, clusters=1, members=1)
    many = options.reading(arguments)
    sources = options.checkpoint(arguments)
    with processes(arguments.device) as group:
        analyse.run(
            sources,
            arguments.data,
            arguments.out,
            group,
            resolution=arguments.resolution,
            asked=arguments.by,
            shown=arguments.clusters,
            columns=arguments.members,
            overwrite=arguments.overwrite,
            **many,
        )
