"""``tokenflow evaluate``: a tokenizer's metrics of reconstruction on a folder."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.engine.distributed import processes
from tokenflow_ext.train.evaluation import evaluate, fid, networks, zero_shot

HELP = "a tokenizer's metrics of reconstruction on a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    options.add_tokenizer(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="searched in depth")
    options.add_out(parser, "evaluation")
    options.add_overwrite(parser)
    options.add_reading(parser)
    parser.add_argument(
        "--pictures", type=int, default=16, metavar="N", help="on the page [%(default)s]"
    )
    parser.add_argument("--weights", metavar="FILE", help=f"for FID: {fid.WEIGHTS}")
    parser.add_argument("--vgg16", metavar="FILE", help=f"for LPIPS: {networks.VGG16}")
    parser.add_argument("--teacher", metavar="FILE", help="the teacher's weights, for the cosine")
    parser.add_argument("--clip", metavar="DIR", help=f"for zero-shot: {zero_shot.WANTED}")


def run(arguments: argparse.Namespace) -> None:
    """The command; under torchrun, one process of it."""
    options.check_counts(arguments, pictures=0)
    many = options.reading(arguments)
    source = options.checkpoint(arguments)
    with processes(arguments.device) as group:
        evaluate.run(
            source,
            arguments.data,
            arguments.out,
            group,
            resolution=arguments.resolution,
            pictures=arguments.pictures,
            inception=arguments.weights,
            vgg16=arguments.vgg16,
            teacher=arguments.teacher,
            clip=arguments.clip,
            overwrite=arguments.overwrite,
            **many,
        )
