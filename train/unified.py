"""Train both ways: ``torchrun train/unified.py [--config FILE] [--resume] [key=value]``.

One transformer learns to draw pictures from captions and to answer questions about pictures. With
``--config train/configs/easy_vqa_unified.yaml`` it does so on coloured shapes; the commands before
it are in that file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train.config import UnifiedConfig, load_unified_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes


def train(config: UnifiedConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    from tokenflow_ext.train.tasks.unified import UnifiedTask  # needs transformers

    return loop.train(config, group, UnifiedTask, resume)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    read = partial(command.read_arguments, load_unified_config, "unified.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
