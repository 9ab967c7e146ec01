"""What the processes of a group do in test_text_to_image.py, in one launch of torchrun.

    torchrun together_text.py PLAN.json

PLAN.json: {"steps": {OUTPUT: [key=value, ...]}, "runs": [[key=value, ...], ...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tokenflow_ext.train import text_to_image
from tokenflow_ext.train.config import load_text_config
from tokenflow_ext.train.engine.distributed import Processes, processes
from tokenflow_ext.train.engine.loop import Trainer
from tokenflow_ext.train.engine.parallel import whole
from tokenflow_ext.train.tasks.text_to_image import TextToImageTask


def two_steps(output: str, overrides: list[str], group: Processes) -> None:
    """Two training steps; what they leave, in one piece."""
    trainer = Trainer(load_text_config(None, overrides), group, TextToImageTask)
    trainer.prepare()
    losses = []
    for _ in range(2):
        values = trainer.train_step()
        losses.append({k: group.mean_(v.float().clone()).item() for k, v in values.items()})
    gradients = {name: whole(p.grad) for name, p in trainer.model.named_parameters()}
    weights = {name: whole(p.detach()) for name, p in trainer.model.named_parameters()}
    evaluated = trainer.evaluate()
    drawn = trainer.pictures()[1]
    sizes = group.gather(sum(_local_size(p) for p in trainer.model.parameters()))
    if group.first:
        result = {
            "losses": losses,
            "gradients": gradients,
            "weights": weights,
            "evaluated": evaluated,
            "drawn": drawn,
            "sizes": sizes,
        }
        torch.save(result, output)


def _local_size(parameter: torch.Tensor) -> int:
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.numel()


def main(plan: dict, group: Processes) -> None:
    """Do what the plan says."""
    for output, overrides in plan["steps"].items():
        two_steps(output, overrides, group)
    for overrides in plan["runs"]:
        text_to_image.train(load_text_config(None, overrides), group, resume=True)


if __name__ == "__main__":
    with processes("cpu") as everyone:
        main(json.loads(Path(sys.argv[1]).read_text()), everyone)
