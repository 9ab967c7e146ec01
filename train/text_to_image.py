"""Train text to image: ``torchrun train/text_to_image.py [--config FILE] [--resume] [key=value]``.

With no argument: a small transformer on the emojis of ``tokenflow fetch-emoji runs/emoji``, over
the image tokenizer in ``runs/emoji-tokenizer``. The three commands are in
docs/guides/text_to_image.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train.config import TextConfig, load_text_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.text_to_image import TextToImageTask


def train(config: TextConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    return loop.train(config, group, TextToImageTask, resume)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    read = partial(command.read_arguments, load_text_config, "text_to_image.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
