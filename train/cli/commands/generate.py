"""``tokenflow generate``: pictures from prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_ext.sampler import PRESETS
from tokenflow_ext.train.cli import image_generator, options
from tokenflow_ext.train.data import DataError, outputs, text_files
from tokenflow_ext.train.engine.distributed import find_device
from tokenflow_ext.train.tasks.image_generator import ImageGenerator, facts

HELP = "pictures from prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="*", default=[], metavar="PROMPT")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one a line; GenEval's evaluation_metadata.jsonl; DPG-Bench's folder of prompts",
    )
    options.add_checkpoint(
        parser,
        "a run of train/text_to_image.py or train/unified.py, a checkpoint, or a saved model",
    )
    options.add_out(parser, "outputs")
    options.add_overwrite(parser)
    parser.add_argument(
        "--layout",
        choices=image_generator.LAYOUTS,
        default="plain",
        help="the folders that GenEval or DPG-Bench reads [%(default)s]",
    )
    parser.add_argument("--each", type=int, help="pictures a prompt [1; 4 for a benchmark]")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture [%(default)s]")
    parser.add_argument("--grid", action="store_true", help="all of them in grid.png, too")
    parser.add_argument("--steps", choices=tuple(PRESETS), help=f"[{ImageGenerator.steps}]")
    parser.add_argument("--guidance", type=float, help=f"[{ImageGenerator.guidance}]")
    parser.add_argument(
        "--negative", default="", metavar="TEXT", help="what guidance leads away from [nothing]"
    )
    options.add_batch_size(parser, 16)
    options.add_device(parser)
    options.add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    each = arguments.each
    if each is None:
        each = 1 if arguments.layout == "plain" else 4
    options.check_counts(arguments, each=1, batch_size=1, guidance=0)
    if not -(2**63) <= arguments.seed < 2**64:
        raise DataError(f"--seed must be a whole number of 64 bits, got {arguments.seed}")
    text_files.check_text(arguments.negative, "--negative")
    find_device(arguments.device)
    source = options.checkpoint(arguments)
    if arguments.prompts is not None:
        prompts = image_generator.read_prompts(arguments.prompts, arguments.layout)
    elif arguments.layout == "plain":
        prompts = image_generator.plain_prompts(arguments.prompt)
    else:
        raise DataError(f"--layout {arguments.layout} needs the benchmark's file: --prompts FILE")
    # Before the model is read: everything but whether what is there is another model's.
    steps, guidance = arguments.steps or ImageGenerator.steps, arguments.guidance
    guidance = ImageGenerator.guidance if guidance is None else guidance
    drawn = facts(steps, guidance, arguments.negative, arguments.dtype)
    wanted = image_generator.pictures(prompts, arguments.layout, each, arguments.seed, drawn)
    target = outputs.Outputs(Path(arguments.out), arguments.overwrite)
    image_generator.claim(target, prompts, wanted, arguments.layout, grid=False)
    generator = ImageGenerator.load(
        source,
        arguments.device,
        steps=steps,
        guidance=guidance,
        negative=arguments.negative,
        batch=arguments.batch_size,
        dtype=arguments.dtype,
    )
    written = image_generator.write(
        generator,
        prompts,
        arguments.out,
        layout=arguments.layout,
        each=each,
        seed=arguments.seed,
        grid=arguments.grid,
        overwrite=arguments.overwrite,
    )
    print(f"{len(written)} pictures in {arguments.out}")
