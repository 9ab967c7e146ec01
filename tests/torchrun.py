"""Programs that tests start in processes of their own, alone or under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """The environment of such a program: one thread, no group, crashes traced, this folder's
    modules."""
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    paths = [str(Path(__file__).parent), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def launch(script: str | Path, arguments: list[str], processes: int = 0) -> subprocess.Popen:
    """Start the script, under torchrun where ``processes`` is not 0."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    """The output of a process that must succeed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def group_threads() -> list[str]:
    """The threads of this process that serve a process group on the CPU (gloo names them)."""
    names = (file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]
