"""Train understanding: ``torchrun train/understanding.py [--config FILE] [--resume] [key=value]``.

With no argument: a small language model learns to answer the questions of easy-vqa, over the image
tokenizer in ``runs/easy-vqa-tokenizer``. The commands before it are in
docs/guides/understanding.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train.config import UnderstandingConfig, load_understanding_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes


def train(config: UnderstandingConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    from tokenflow_ext.train.tasks.understanding import UnderstandingTask  # needs transformers

    return loop.train(config, group, UnderstandingTask, resume)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    load = load_understanding_config
    read = partial(command.read_arguments, load, "understanding.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
