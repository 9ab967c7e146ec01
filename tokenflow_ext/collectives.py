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

    Rows that hold a NaN or an infinity are left out. Rows come twice only where a process has
    fewer than its share. Where no process has one, the result is NaN.
    """
    world = world_size()
    share = -(-count // world)
    if len(rows) == 0:
        rows = rows.new_full((1, rows.shape[1]), float("nan"))
    order = _first(rows.isfinite().all(dim=1), torch.randperm(len(rows), device=rows.device), share)
    mine = rows[order]
    if world > 1:
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        mine = torch.stack(everyone, dim=1).flatten(0, 1)
        mine = mine[_first(mine.isfinite().all(dim=1), torch.arange(len(mine)).to(order), count)]
    return torch.where(mine.isfinite().all(dim=1, keepdim=True), mine, float("nan"))


def _first(wanted: Tensor, order: Tensor, count: int) -> Tensor:
    """The first `count` wanted ones of the positions `order` [N], again and again if too few."""
    order = order[(~wanted.gather(0, order)).to(torch.uint8).argsort(stable=True)]
    return order[torch.arange(count, device=order.device) % wanted.sum().clamp(min=1)]
