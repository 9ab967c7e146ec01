"""Fine-tune a pixel decoder: ``torchrun train/decoder.py init=TOKENIZER [--config FILE] [--resume]
[key=value ...]``.

``init`` is a run of train/tokenizer.py, one of its checkpoints, a save_pretrained folder or a
original checkpoint. Its tokens stay what they are; what is saved is a whole tokenizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenflow_ext.train.config import DecoderConfig, load_decoder_config
from tokenflow_ext.train.engine import command, loop
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.tasks.decoder import DecoderTask
from tokenflow_ext.train.tokenizer import notice


def train(config: DecoderConfig, group: Processes, resume: bool = False) -> dict[str, Any]:
    """Run the training that ``config`` describes; returns its summary (see ``loop.train``)."""
    return loop.train(config, group, DecoderTask, resume, notice(config.data))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    read = partial(command.read_arguments, load_decoder_config, "decoder.py", __doc__, argv)
    command.run_command(read, train)


if __name__ == "__main__":
    main()
