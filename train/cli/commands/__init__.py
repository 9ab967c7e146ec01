"""The commands of ``tokenflow``, a file each.

A command's module has ``HELP`` (its line in ``tokenflow --help``), ``add_arguments(parser)`` and
``run(arguments)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tokenflow_ext.train import decoder, text_to_image, tokenizer, understanding, unified, var

from . import (
    analyse,
    ask,
    demo,
    evaluate,
    evaluate_drawings,
    evaluate_understanding,
    fetch_easy_vqa,
    fetch_emoji,
    fid,
    generate,
    reconstruct,
    sample,
    tokenize,
)

COMMANDS: dict[str, ModuleType] = {
    "reconstruct": reconstruct,
    "tokenize": tokenize,
    "fetch-emoji": fetch_emoji,
    "fetch-easy-vqa": fetch_easy_vqa,
    "generate": generate,
    "sample": sample,
    "ask": ask,
    "evaluate": evaluate,
    "evaluate-drawings": evaluate_drawings,
    "evaluate-understanding": evaluate_understanding,
    "analyse": analyse,
    "fid": fid,
    "demo": demo,
}

#: Training scripts, which read their own arguments: (module, line of help).
TRAINING: dict[str, tuple[ModuleType, str]] = {
    "train": (tokenizer, "train a tokenizer; the same as torchrun train/tokenizer.py"),
    "train-decoder": (decoder, "fine-tune a pixel decoder; the same as torchrun train/decoder.py"),
    "train-text": (
        text_to_image,
        "train text to image; the same as torchrun train/text_to_image.py",
    ),
    "train-understanding": (
        understanding,
        "train understanding; the same as torchrun train/understanding.py",
    ),
    "train-unified": (unified, "train both ways; the same as torchrun train/unified.py"),
    "train-var": (var, "train VAR; the same as torchrun train/var.py"),
}


def parse(words: list[str]) -> tuple[Callable[[Any], None], Any]:
    """The function that a command line asks for, and what to call it with.

    Raises:
        SystemExit: ``--help``, or a line that is none; argparse has said what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="tokenflow",
        description="Train a tokenizer or text to image, and use what was trained.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in TRAINING.items():
        commands.add_parser(name, add_help=False, help=text)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    if words and words[0] in TRAINING:
        return TRAINING[words[0]][0].main, words[1:]
    arguments = parser.parse_args(words)
    return COMMANDS[arguments.command].run, arguments
