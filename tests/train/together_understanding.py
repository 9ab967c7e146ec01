"""What the processes of a group do in test_understanding.py and test_unified.py, in one launch.

    torchrun together_understanding.py PLAN.json

PLAN.json: {"task": "understanding" or "unified", "steps": {OUTPUT: [key=value, ...]},
            "runs": [[key=value, ...], ...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tokenflow_ext.train import understanding, unified
from tokenflow_ext.train.config import load_understanding_config, load_unified_config
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import whole
from tokenflow_ext.train.tasks.understanding import UnderstandingTask
from tokenflow_ext.train.tasks.unified import UnifiedTask

TASKS = {
    "understanding": (load_understanding_config, UnderstandingTask, understanding.train),
    "unified": (load_unified_config, UnifiedTask, unified.train),
}


def two_steps(task: str, output: str, overrides: list[str], group: Processes) -> None:
    """Two training steps; what they leave, in one piece."""
    load, make, _ = TASKS[task]
    trainer = Trainer(load(None, overrides), group, make)
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
    load, _, train = TASKS[plan["task"]]
    for output, overrides in plan["steps"].items():
        two_steps(plan["task"], output, overrides, group)
    for overrides in plan["runs"]:
        train(load(None, overrides), group, resume=True)


if __name__ == "__main__":
    with processes("cpu") as everyone:
        main(json.loads(Path(sys.argv[1]).read_text()), everyone)
