"""What the processes of a group do in test_distributed.py, in one launch of torchrun.

    torchrun together.py PLAN.json

PLAN.json: {"program": "tokenizer" or "decoder", "steps": {OUTPUT: [key=value, ...]},
"halved": [[key=value, ...], [key=value, ...]],
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
from torchrun import group_threads

from tokenflow_ext.train import decoder, tokenizer
from tokenflow_ext.train.config import load_config, load_decoder_config
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import whole
from tokenflow_ext.train.tasks.decoder import DecoderTask
from tokenflow_ext.train.tasks.tokenizer import TokenizerTask

PROGRAMS = {
    "tokenizer": (load_config, TokenizerTask, tokenizer.train),
    "decoder": (load_decoder_config, DecoderTask, decoder.train),
}


def one_step(trainer: Trainer, output: str, group: Processes) -> None:
    """One training step; gradients, buffers, losses and every process's checksum of the weights."""
    trainer.prepare()
    values = trainer.train_step()
    values = {key: group.mean_(value.float().clone()).item() for key, value in values.items()}
    weights = {name: whole(v) for name, v in trainer.model.state_dict().items()}
    checksums = group.gather([v.double().sum().item() for v in weights.values()])
    sizes = group.gather(sum(_local_size(p) for p in trainer.model.parameters()))
    held_out = trainer.evaluate()
    models = {name: optimized.module for name, optimized in trainer.task.optimized.items()}
    gradients = {
        f"{kind}.{name}": whole(p.grad)
        for kind, model in models.items()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    averages = {name: whole(value) for name, value in trainer.task.ema.weights.items()}
    if group.first:
        result = {
            "gradients": gradients,
            "averages": averages,
            "usage": trainer.model.quantizer.usage_ema,
            "sizes": sizes,
            "values": values,
            "held_out": held_out,
            "checksums": checksums,
        }
        torch.save(result, output)


def _local_size(parameter: torch.Tensor) -> int:
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.numel()


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
        one_step(Trainer(load(None, overrides), group, make), output, group)
    if plan["halved"]:
        whole_and_resumed(*(load(None, run) for run in plan["halved"]), train, group)
    for overrides in plan["runs"]:
        train(load(None, overrides), group, resume=True)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text()
    with processes("cpu") as everyone:
        main(json.loads(text), everyone)
    # With FSDP, caches inside torch refer to the group.
    assert "parallel=fsdp" in text or not group_threads(), group_threads()
