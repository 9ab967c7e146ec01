"""Peak memory of one call.

CUDA: torch's allocator counts it. CPU: the kernels' scratch never passes through torch, so what
counts is the resident memory of the process (VmHWM in /proc/self/status), measured in a process
forked for that one call from a parent that has only imported things. `python -m benchmarks.memory`
is that parent; it reads one JSON request a line and answers with one JSON line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import IMPLEMENTATIONS, MODES, Case, build
from benchmarks.machine import ROOT


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def resident_peak(call: Callable[[], object]) -> int:
    """Bytes of resident memory that a call needs beyond what was resident before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes of device memory that a call allocates at its peak, beyond those before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call needs at its peak; on the CPU in a process forked for it.

    It is the second call that is measured: the first one loads code.
    """
    if device == "cuda":
        call()
        return cuda_peak(call)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not in this process
        call()
        os.write(writer, json.dumps(resident_peak(call)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the measuring process ended")
    return int(text)


def _measure_here(case: Case, name: str) -> int:
    compiled = IMPLEMENTATIONS[name].compiled
    if not compiled:  # its first call would compile for the tiny shape alone
        for mode in MODES:  # threads, autograd and lazy imports come first
            build(replace(case, pyramid="tiny", codebook_size=64, mode=mode), name)()
    call = build(case, name)
    if compiled:
        call()
    return resident_peak(call)


class MemoryProbe:
    """Measures cases, on the CPU through a helper process of its own."""

    def __init__(self) -> None:
        self._helper: subprocess.Popen | None = None

    def peak(self, case: Case, name: str) -> int:
        """Peak memory of one call in bytes, beyond the state before it.

        Raises:
            RuntimeError: the measurement failed; the helper's error is in the message.
        """
        if case.device != "cpu":
            call = build(case, name)
            call()
            return cuda_peak(call)
        if self._helper is None:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._helper.stdin.write(json.dumps({"case": asdict(case), "name": name}) + "\n")
        self._helper.stdin.flush()
        answer = json.loads(self._helper.stdout.readline() or '{"error": "helper ended"}')
        if "error" in answer:
            raise RuntimeError(f"memory of {name}, {case}: {answer['error']}")
        return answer["bytes"]

    def close(self) -> None:
        """Ends the helper process."""
        if self._helper is not None:
            self._helper.stdin.close()
            self._helper.wait()
            self._helper = None


def _answer(request: dict) -> dict:
    """Measures in a forked child, so that every measurement starts from the same state."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = {"bytes": _measure_here(Case(**request["case"]), request["name"])}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the measuring process was killed"}


def main() -> None:
    """Answers requests until standard input ends."""
    # No tensor work happens here: threads of a parallel region would not survive the fork.
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
