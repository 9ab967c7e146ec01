"""``tokenflow sample``: pictures of classes."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_ext.train.cli import image_generator, options, samples
from tokenflow_ext.train.data import DataError, outputs
from tokenflow_ext.train.engine.distributed import processes
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator

HELP = "pictures of classes, by VAR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "classes", nargs="*", metavar="CLASS", help="names, or numbers where they have none [all]"
    )
    options.add_checkpoint(
        parser, "a run of train/var.py, a checkpoint, a saved model, or a released file"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="of a released file")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--npz",
        type=Path,
        metavar="FILE",
        help="all pictures as arr_0, what OpenAI's evaluation reads; a broken-off run is continued",
    )
    target.add_argument("--sheet", type=Path, metavar="FILE.png", help="the first of each class")
    options.add_overwrite(parser)
    parser.add_argument("--each", type=int, help="pictures a class [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture [%(default)s]")
    parser.add_argument("--guidance", type=float, help="[1.5]")
    parser.add_argument("--top-k", type=int, metavar="K", help="0: all [900]")
    parser.add_argument("--top-p", type=float, metavar="P", help="[0.96]")
    parser.add_argument(
        "--more-smooth", action="store_true", help="means over codes: for pictures, not for FID"
    )
    options.add_batch_size(parser, 32)
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command; under torchrun, one process of it."""
    options.check_counts(arguments, each=1, batch_size=1, guidance=0, seed=0, top_k=0, top_p=0)
    if samples.PART % arguments.batch_size and arguments.npz is not None:
        raise DataError(f"--batch-size must divide {samples.PART}, got {arguments.batch_size}")
    source = options.checkpoint(arguments)
    with processes(arguments.device) as group:
        with group.together():
            if group.first:
                _check_target(arguments)
        chosen = {name: getattr(arguments, name) for name in ("guidance", "top_k", "top_p")}
        generator = ClassImageGenerator.load(
            source,
            str(group.device),
            arguments.tokenizer,
            more_smooth=arguments.more_smooth,
            batch=arguments.batch_size,
            dtype=arguments.dtype,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        config = generator.model.config
        names = arguments.classes or config.class_names or map(str, range(config.classes))
        classes, each = list(names), arguments.each or 1
        if arguments.npz is not None:
            samples.write(generator, classes, arguments.npz, group, each=each, seed=arguments.seed)
            if group.first:
                print(f"{each * len(classes)} pictures in {arguments.npz}")
        elif group.first:
            _write_sheet(generator, classes, each, arguments)


def _check_target(arguments: argparse.Namespace) -> None:
    if arguments.npz is not None:
        samples.check_target(arguments.npz, arguments.overwrite)
    else:
        target = outputs.Outputs(arguments.sheet.parent, arguments.overwrite)
        target.claim([arguments.sheet.name])


def _write_sheet(
    generator: ClassImageGenerator, classes: list[str], each: int, arguments: argparse.Namespace
) -> None:
    names = [name for name in classes for _ in range(each)]
    seeds = range(arguments.seed, arguments.seed + len(names))
    images = [image.permute(1, 2, 0).numpy() for image in generator.draw(names, seeds)]
    target = outputs.Outputs(arguments.sheet.parent, arguments.overwrite)
    facts = generator.facts | {"seed": str(arguments.seed), "each": str(each)}
    sheet = image_generator.labelled(images, names, columns=each if each > 1 else None)
    written = target.write(arguments.sheet.name, outputs.png(sheet, facts))
    print(f"{len(images)} pictures in {written}")
