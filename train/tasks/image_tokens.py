"""What trainings that predict an image tokenizer's tokens have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext.models import CheckpointError, TokenFlowTokenizer
from tokenflow_ext.train.engine.distributed import Processes


@torch.no_grad()
def tokens(tokenizer: TokenFlowTokenizer, pictures: Tensor, device: torch.device) -> Tensor:
    """Images to tokens, tokens as they are; [B, L]."""
    pictures = pictures.to(device, non_blocking=True)
    return tokenizer.encode(pictures) if pictures.is_floating_point() else pictures


def score(
    known: Tensor, run: Callable[[list[int], Tensor], Any], group: Processes, local: int
) -> tuple[float, float]:
    """Cross-entropy and share of right tokens, each predicted from the true ones before (every
    process calls this).

    Args:
        known: tokens [N, L] of images.
        run: (which images, their tokens) -> what the model gives: ``loss`` and ``logits``.
        local: images that a process computes at once.
    """
    sums, count = torch.zeros(3, dtype=torch.float64, device=group.device), len(known)
    for start in range(0, count, local * group.world):
        # A process without a share still takes part: its weights may be needed elsewhere.
        own = range(start + group.rank * local, start + (group.rank + 1) * local)
        counted = [i for i in own if i < count]
        rows = counted or [0]
        target = known[rows].to(group.device)
        out = run(rows, target)
        if counted:
            right = (out.logits.argmax(-1) == target).double().mean()
            share = torch.stack([out.loss.double(), right, right.new_ones(())])
            sums += share * len(counted)
    group.sum_(sums)
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


def decoded(tokenizer: TokenFlowTokenizer, *given: Tensor) -> Any:
    """The images of each of several tokens [N, L]; the tokenizer has a pixel branch."""
    images = [tokenizer.decode(tokens)[0] for tokens in given]
    return tuple(image for image in images if image is not None)


def check_same(path: Path, tokenizer: TokenFlowTokenizer, name: str) -> None:
    """That a checkpoint of a model was trained on the tokens of this tokenizer.

    Args:
        name: what messages call it.

    Raises:
        CheckpointError: it was not.
    """
    saved = TokenFlowTokenizer.from_pretrained(path / "tokenizer").state_dict()
    own = tokenizer.state_dict()
    same = own.keys() == saved.keys()
    if not (same and all(torch.equal(v.cpu(), saved[k]) for k, v in own.items())):
        raise CheckpointError(
            f"{path} was trained on the tokens of another image tokenizer than {name}"
        )
