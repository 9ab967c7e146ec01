"""``tokenflow evaluate-understanding``: how often a model answers right."""

from __future__ import annotations

import argparse

from tokenflow_ext.train.cli import options
from tokenflow_ext.train.engine.distributed import processes

HELP = "how often an understanding model answers right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    options.add_checkpoint(
        parser,
        "a run of train/understanding.py or train/unified.py, a checkpoint, or a saved model",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="questions and answers in LLaVA's form"
    )
    parser.add_argument("--images", metavar="FOLDER", help="of the pictures [the file's own]")
    parser.add_argument(
        "--train", metavar="FILE", help="what was trained on, for the share without looking"
    )
    options.add_out(parser, "answers")
    options.add_overwrite(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="so many, evenly spread [all]")
    options.add_batch_size(parser, 64)
    options.add_max_tokens(parser)
    parser.add_argument(
        "--pictures", type=int, default=16, metavar="N", help="on the page [%(default)s]"
    )
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command; under torchrun, one process of it."""
    options.check_counts(arguments, limit=1, batch_size=1, max_tokens=1, pictures=0)
    source = options.checkpoint(arguments)
    with processes(arguments.device) as group:
        from tokenflow_ext.train.evaluation import understanding  # needs transformers

        understanding.run(
            source,
            arguments.data,
            arguments.out,
            group,
            images=arguments.images,
            train=arguments.train,
            limit=arguments.limit,
            batch=arguments.batch_size,
            new=arguments.max_tokens,
            pictures=arguments.pictures,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
        )
