"""One process or many: the process group that ``torchrun`` describes, and sums over it."""

from __future__ import annotations

import gc
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by its mean over all processes (every process must call this)."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by its sum over all processes (every process must call this)."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def peak_memory(self) -> float:
        """The most memory that any process has held so far, in GiB: allocated on its CUDA device,
        resident in main memory on a CPU (every process must call this)."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
        else:
            status = Path("/proc/self/status").read_text()
            most = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
        return max(self.gather(most)) / 2**30

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the group that torchrun's environment variables describe (none: a single process).

    Args:
        device: "cpu" (gloo), "cuda" (nccl), or "auto": CUDA where there is a device.
    """
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = torch.device(kind)
    if place.type == "cuda":
        if place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if world == 1:
        yield Processes(rank, world, place)
        return
    # Its functions have the group as a default argument: the one that is there when it is loaded.
    # Loaded later (by torch._dynamo, which DDP loads), it would keep the group for ever.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    group = Processes(rank, world, place)
    try:
        yield group
        # gloo's threads let go of the tensors of a collective after it is done, for which they need
        # Python's lock; while Python shuts down, asking for it aborts the process. So they finish
        # here, and then end with the last that refers to the group.
        group.wait()
    finally:
        dist.destroy_process_group()
        gc.collect()
