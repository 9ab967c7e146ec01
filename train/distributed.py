"""One process or many: the process group that ``torchrun`` describes, and sums over it."""

from __future__ import annotations

import gc
import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenflow_ext import build_info
from tokenflow_ext.models import ConfigError


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

    def agree(self, check: Callable[[], None]) -> None:
        """Make a check on the first process, whose errors are raised on all (every process must
        call this)."""
        error = None
        if self.first:
            try:
                check()
            except RuntimeError as found:
                error = found
        if (error := self.gather(error)[0]) is not None:
            raise error

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


def find_device(asked: str) -> torch.device:
    """The device that an option or a configuration asks for, once it is known to be there.

    Args:
        asked: "cpu", "cuda", "cuda:N", or "auto": CUDA where there is a device. Of "cuda" a process
            of torchrun's takes the device of its own number on its machine.

    Raises:
        ConfigError: another word, or a device that is not there.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d{1,3}))?", asked)
    if match is None:
        raise ConfigError(f"device {asked!r} is none of auto, cpu, cuda and cuda:N")
    if torch.version.cuda is None:
        raise ConfigError(f"device {asked!r}: this torch ({torch.__version__}) is without CUDA")
    count = torch.cuda.device_count()
    number = match[1] if match[1] is not None else os.environ.get("LOCAL_RANK", "0")
    if int(number) >= count:
        raise ConfigError(f"device {asked!r}: number {number} of {count} CUDA devices, from 0 on")
    if build_info()["cuda"] is None:
        raise ConfigError(
            f"device {asked!r}: tokenflow_ext was built without CUDA, {build_info()['cuda_reason']}"
        )
    return torch.device("cuda", int(number))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the group that torchrun's environment variables describe (none: a single process).

    Args:
        device: see :func:`find_device`; gloo joins CPUs, nccl CUDA devices.

    Raises:
        ConfigError: no such device.
    """
    place = find_device(device)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if place.type == "cuda":
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
