"""Train a tokenizer: ``torchrun train/tokenizer.py [--config FILE] [--resume] [key=value ...]``.

With no argument: the preset "tiny" on the photographs that ship inside scikit-image and
scikit-learn, distilled from EfficientNet-Lite0, in under ten minutes on two CPU cores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train import data
from tokenflow_ext.train.config import DataConfig, TrainConfig, load_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask


def notice(config: DataConfig) -> str:
    """The licences of the built-in photographs, where it is them that are trained on."""
    return "" if config.path is not None else f"photographs:\n{data.photograph_licences()}"


def train(config: TrainConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    return loop.train(config, group, TokenizerTask, resume, notice(config.data))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    read = partial(command.read_arguments, load_config, "tokenizer.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
