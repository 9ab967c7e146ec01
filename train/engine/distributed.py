"""One process or many: the process group that ``torchrun`` describes, and sums over it."""

from __future__ import annotations

import gc
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenflow_ext import build_info
from tokenflow_ext.errors import BuildFactsMissingError
from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.train.data.text_files import DataError


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
            found = re.search(r"VmHWM:\s*(\d+) kB", status)
            most = 1024 * int(found[1]) if found else 0
        return max(self.gather(most)) / 2**30

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What a process cannot do in the block ends all of them, with one message (every process
        calls this; no collective may be in a part of the block that can fail).

        Raises:
            Exception: what the block raises, in the first process where it does.
            SystemExit: in the others.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(1) from error

    def check_same(self, what: str, value: Any) -> None:
        """That every process has the same value (every process calls this).

        Raises:
            DataError: naming ``what``, and the values of two processes, in one of them.
            SystemExit: in the others.
        """
        values = self.gather(value)
        other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        with self.together():
            if self.first and other is not None:
                raise DataError(
                    f"processes have different {what}: process 0 {values[0]}, process {other} "
                    f"{values[other]}"
                )


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
    with suppress(BuildFactsMissingError):  # then the first kernel says whether it is there
        facts = build_info()
        if facts["cuda"] is None:
            raise ConfigError(
                f"device {asked!r}: tokenflow_ext was built without CUDA, {facts['cuda_reason']}"
            )
    return torch.device("cuda", int(number))


def _number(variable: str, default: int) -> int:
    """A number in torchrun's environment."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ConfigError(f"the environment's {variable} must be a number, got {shown(text)}")
    return int(text)


class Launcher:
    """torchrun, where this process is one of its own: without it nobody would end a process whose
    peers have ended, nor hear of its end."""

    def __init__(self) -> None:
        self.process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def check(self) -> None:
        """That it is still there.

        Raises:
            SystemExit: it has ended.
        """
        if self.process is not None and os.getppid() != self.process:
            raise SystemExit(f"error: torchrun (process {self.process}) has ended, so does its run")


@contextmanager
def processes(device: str = "auto", timeout: timedelta | None = None) -> Iterator[Processes]:
    """Join the group that torchrun's environment variables describe (none: a single process).

    Args:
        device: see :func:`find_device`; gloo joins CPUs, nccl CUDA devices.
        timeout: how long a process waits for the others; None is torch's own.

    Raises:
        ConfigError: no such device.
    """
    place = find_device(device)
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world == 1:
        yield Processes(rank, world, place)
        return
    # Its functions have the group as a default argument: the one that is there when it is loaded.
    # Loaded later (by torch._dynamo, which DDP loads), it would keep the group for ever.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timeout)
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
