"""``tokenflow ask``: questions about pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.train.cli import options
from tokenflow_ext.train.data import DataError, open_image
from tokenflow_ext.train.data.image_files import suffixes
from tokenflow_ext.train.engine.distributed import find_device

HELP = "ask about pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="PHOTO ... [QUESTION]",
        help="one picture or several, and a question; without it, a conversation",
    )
    options.add_checkpoint(
        parser,
        "a run of train/understanding.py or train/unified.py, a checkpoint, or a saved model",
    )
    options.add_max_tokens(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the likeliest answer; above, answers are drawn [%(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn answers [%(default)s]")
    options.add_device(parser)
    options.add_dtype(parser)


def split(words: list[str]) -> tuple[list[str], str | None]:
    """Pictures and question: the last word is a question unless it is a file, or is called as one.

    Raises:
        DataError: no picture.
    """
    last = words[-1]
    called = Path(last).suffix.lower() in suffixes() and not any(c.isspace() for c in last)
    if os.path.exists(last) or called:
        return words, None
    if len(words) == 1:
        raise DataError(f"no picture: {last!r} is not a file")
    return words[:-1], last


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    options.check_counts(arguments, max_tokens=1, temperature=0)
    if not -(2**63) <= arguments.seed < 2**64:
        raise DataError(f"--seed must be a whole number of 64 bits, got {arguments.seed}")
    names, question = split(arguments.words)
    pictures = [open_image(name) for name in names]
    device = find_device(arguments.device)
    source = options.checkpoint(arguments)
    from tokenflow_ext.train.evaluation.answering import Answerer, Message  # needs transformers

    model = Answerer(source, device, arguments.dtype)
    torch.manual_seed(arguments.seed)
    places = f"{IMAGE}\n" * len(pictures)
    messages: list[Message] = []
    for said in [question] if question is not None else _questions():
        content = said if messages else places + said
        messages.append({"role": "user", "content": content})
        [answer] = model.answer(
            [messages], [pictures], arguments.max_tokens, arguments.temperature, stream=True
        )
        messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    """What is asked until there is nothing more."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt).strip()
        except EOFError:
            return
        if not said:
            return
        yield said
