"""What the processes of a group do in test_understanding.py, in one launch of torchrun.

    torchrun together_understanding.py PLAN.json

PLAN.json: {"steps": {OUTPUT: [key=value, ...]}, "runs": [[key=value, ...], ...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tokenflow_ext.train import understanding
from tokenflow_ext.train.config import load_understanding_config
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import whole
from tokenflow_ext.train.tasks.understanding import UnderstandingTask


def two_steps(output: str, overrides: list[str], group: Processes) -> None:
    """Two training steps; what they leave, in one piece."""
    trainer = Trainer(load_understanding_config(None, overrides), group, UnderstandingTask)
    trainer.prepare()
    losses = []
    for _ in range(2):
        values = trainer.train_step()
        losses.append({k: group.mean_(v.float().clone()).item() for k, v in values.items()})
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    gradients = {name: whole(p.grad) for name, p in trained.items()}
    weights = {name: whole(p.detach()) for name, p in trained.items()}
    evaluated = trainer.evaluate()
    cards = trainer.pictures()[1]
    if group.first:
        result = {
            "losses": losses,
            "gradients": gradients,
            "weights": weights,
            "evaluated": evaluated,
            "cards": cards,
        }
        torch.save(result, output)


def main(plan: dict, group: Processes) -> None:
    """Do what the plan says."""
    for output, overrides in plan["steps"].items():
        two_steps(output, overrides, group)
    for overrides in plan["runs"]:
        understanding.train(load_understanding_config(None, overrides), group, resume=True)


if __name__ == "__main__":
    with processes("cpu") as everyone:
        main(json.loads(Path(sys.argv[1]).read_text()), everyone)
