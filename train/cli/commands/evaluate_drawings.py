"""``tokenflow evaluate-drawings``: how often a model draws what it is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_ext.sampler import PRESETS
from tokenflow_ext.train.cli import options
from tokenflow_ext.train.data import DataError, outputs
from tokenflow_ext.train.engine.distributed import find_device
from tokenflow_ext.train.evaluation import drawings
from tokenflow_ext.train.tasks.image_generator import load_generator

HELP = "how often a model draws what it is asked for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    options.add_checkpoint(
        parser,
        "a run of train/unified.py, train/text_to_image.py or train/var.py, or a saved model",
    )
    parser.add_argument(
        "--real",
        required=True,
        metavar="FOLDER",
        help="pictures with captions, of which the judge learns; all captions are drawn",
    )
    parser.add_argument(
        "--test", metavar="FOLDER", help="further ones, which show how well it judges"
    )
    parser.add_argument(
        "--caption",
        default=drawings.CAPTION,
        metavar="PATTERN",
        help="of captions: what its named groups match is judged [%(default)s]",
    )
    parser.add_argument(
        "--unseen",
        default="",
        metavar="PATTERN",
        help="of the captions that were held out of training",
    )
    parser.add_argument(
        "--ask",
        nargs="*",
        metavar="NAME=QUESTION",
        help="asked of the model about its drawings [easy-VQA's questions where it answers]",
    )
    options.add_out(parser, "drawings")
    options.add_overwrite(parser)
    parser.add_argument("--each", type=int, help="pictures a caption [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture [%(default)s]")
    parser.add_argument("--steps", choices=tuple(PRESETS), help="not for classes [three]")
    parser.add_argument("--guidance", type=float, help="[7.5; 1.5 for classes]")
    options.add_batch_size(parser, 32)
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, each=1, batch_size=1, guidance=0, seed=0)
    questions = None if arguments.ask is None else dict(map(_question, arguments.ask))
    find_device(arguments.device)
    source = options.checkpoint(arguments)
    target = outputs.Outputs(Path(arguments.out), arguments.overwrite)
    target.claim(drawings.FILES)
    generator = load_generator(
        source,
        arguments.device,
        steps=arguments.steps,
        guidance=arguments.guidance,
        batch=arguments.batch_size,
        dtype=arguments.dtype,
    )
    drawings.run(
        source,
        generator,
        target,
        real=arguments.real,
        test=arguments.test,
        caption=arguments.caption,
        unseen=arguments.unseen,
        each=arguments.each or drawings.EACH,
        seed=arguments.seed,
        questions=questions,
    )


def _question(given: str) -> tuple[str, str]:
    name, equals, question = given.partition("=")
    if not name or not equals or not question.strip():
        raise DataError(f"--ask takes NAME=QUESTION, got {given!r}")
    return name, question
