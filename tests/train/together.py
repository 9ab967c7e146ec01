"""What the processes of a group do in test_distributed.py, in one launch of torchrun.

    torchrun together.py PLAN.json

PLAN.json: {"program": "tokenizer" or "decoder", "steps": {OUTPUT: [key=value, ...]},
"runs": [[key=value, ...], ...]}.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenflow_ext.train import checkpoint, decoder, tokenizer
from tokenflow_ext.train.config import load_config, load_decoder_config
from tokenflow_ext.train.decoder_trainer import DecoderTrainer
from tokenflow_ext.train.distributed import Processes, processes
from tokenflow_ext.train.trainer import Trainer

PROGRAMS = {
    "tokenizer": (load_config, Trainer, tokenizer.train),
    "decoder": (load_decoder_config, DecoderTrainer, decoder.train),
}


def one_step(trainer: Trainer, output: str, group: Processes) -> None:
    """One training step; gradients, buffers, losses and every process's checksum of the weights."""
    trainer.prepare()
    values = trainer.train_step()
    values = {key: group.mean_(value.float().clone()).item() for key, value in values.items()}
    checksums = group.gather([v.double().sum().item() for v in trainer.model.state_dict().values()])
    held_out = trainer.evaluate()
    models = {"model": trainer.model}
    if trainer.discriminator is not None:
        models["discriminator"] = trainer.discriminator
    if group.first:
        result = {
            "gradients": {
                f"{kind}.{name}": p.grad
                for kind, model in models.items()
                for name, p in model.named_parameters()
                if p.grad is not None
            },
            "usage": trainer.model.quantizer.usage_ema,
            "codebooks": [c.data for c in trainer.model.quantizer.codebooks],
            "values": values,
            "held_out": held_out,
            "checksums": checksums,
        }
        torch.save(result, output)


def whole_and_resumed(whole: Any, halves: Any, train: Callable, group: Processes) -> None:
    """Two equal runs; the second loses its last checkpoint and is resumed."""
    for config in (whole, halves):
        train(config, group)
    if group.first:
        shutil.rmtree(checkpoint.available(Path(halves.run) / "checkpoints")[-1])
    group.wait()
    train(halves, group, resume=True)


def main(plan: dict, group: Processes) -> None:
    """Do what the plan says."""
    load, make, train = PROGRAMS[plan["program"]]
    for output, overrides in plan["steps"].items():
        one_step(make(load(None, overrides), group), output, group)
    if plan["runs"]:
        whole_and_resumed(*(load(None, run) for run in plan["runs"]), train, group)


if __name__ == "__main__":
    with processes("cpu") as everyone:
        main(json.loads(Path(sys.argv[1]).read_text()), everyone)
