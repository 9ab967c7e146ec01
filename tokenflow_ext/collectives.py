"""What a codebook needs from the other processes of a run; nothing where there is one process.

Every process has to enter each of these: none may stand behind a condition on data.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over every process, in place; the tensor itself where there is one."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sample_rows(rows: Tensor, count: int) -> Tensor:
    """`count` random rows of [N, D] drawn over every process, the same on each: [count, D].

    Rows of a process serve twice only where it has fewer than its share.
    """
    world = world_size()
    share = -(-count // world)
    order = torch.randperm(len(rows), device=rows.device)[:share]
    if share > len(rows):
        extra = torch.randint(len(rows), (share - len(rows),), device=rows.device)
        order = torch.cat([order, extra])
    mine = rows[order]
    if world == 1:
        return mine
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone, dim=1).flatten(0, 1)[:count]
