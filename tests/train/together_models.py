"""What the processes of a group do in the tests of text to image, VAR, understanding and both ways,
in one launch.

    torchrun together_models.py PLAN.json

PLAN.json: {"task": one of TASKS, "steps": {OUTPUT: [key=value, ...]},
            "runs": [[key=value, ...], ...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tokenflow_ext.train import text_to_image, understanding, unified, var
from tokenflow_ext.train.config import (
    load_text_config,
    load_understanding_config,
    load_unified_config,
    load_var_config,
)
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import whole
from tokenflow_ext.train.tasks.text_to_image import TextToImageTask
from tokenflow_ext.train.tasks.understanding import UnderstandingTask
from tokenflow_ext.train.tasks.unified import UnifiedTask
from tokenflow_ext.train.tasks.var import VarTask

TASKS = {
    "text_to_image": (load_text_config, TextToImageTask, text_to_image.train),
    "var": (load_var_config, VarTask, var.train),
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
    pictures = trainer.pictures()[1]
    sizes = group.gather(sum(_local_size(p) for p in trainer.model.parameters()))
    if group.first:
        result = {
            "losses": losses,
            "gradients": gradients,
            "weights": weights,
            "evaluated": evaluated,
            "pictures": pictures,
            "sizes": sizes,
        }
        torch.save(result, output)


def _local_size(parameter: torch.Tensor) -> int:
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.numel()


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
