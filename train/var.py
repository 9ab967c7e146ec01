"""Train VAR: ``torchrun train/var.py [--config FILE] [--resume] [key=value ...]``.

A class-conditional transformer over the tokens of an image tokenizer: folders of pictures, a folder
for each class, WebDataset shards with classes, or a folder of ``tokenflow tokenize``. The guide is
docs/guides/var.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train.config import VarTrainConfig, load_var_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.var import VarTask


def train(config: VarTrainConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    return loop.train(config, group, VarTask, resume)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    read = partial(command.read_arguments, load_var_config, "var.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
