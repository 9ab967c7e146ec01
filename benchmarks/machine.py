"""What a run ran on: device, versions, commit, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

import tokenflow_ext

ROOT = Path(__file__).resolve().parent.parent
# Environment variables that change how fast things are.
SETTINGS = (
    "CUDA_VISIBLE",
    "GLIBC_",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "TOKENFLOW_",
)
BASELINE_PACKAGES = ("faiss-cpu", "vector-quantize-pytorch", "flash-kmeans", "flashinfer-python")


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit in the working tree, and whether files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    if head.returncode:
        return "not a commit"
    return head.stdout.strip() + (", with changes" if changed.stdout.strip() else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(arguments: list[str]) -> dict[str, Any]:
    """Everything about a run but its results; `arguments` are pytest's."""
    info = tokenflow_ext.build_info()
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)]
    return {
        "device": {
            "cpu": cpu_model(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instruction set": info["cpu_instruction_set"],
        "CUDA": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenflow_ext": info["version"],
        "compiler": info["compiler"],
        "commit": commit(),
        "baselines": {package: _version(package) for package in BASELINE_PACKAGES},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([*settings, "pytest", *arguments]),
        "load before": list(os.getloadavg()),
    }


def describe(run: dict[str, Any], device: str) -> list[str]:
    """The facts of a run on a device, a line each."""
    found = run.get("baselines") or run["rivals"]  # as in results of before
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    where = f"{run['device']['cpu']}, {run['threads']} threads of {run['cores']} cores"
    if device == "cuda":
        where = f"{run['device']['cuda']}, CUDA {run['CUDA']}; host: {where}"
    loads = " and ".join(f"{run[f'load {when}'][0]:.2f}" for when in ("before", "after"))
    return [
        f"{where}; {run['system']}",
        f"Python {run['python']}, torch {run['torch']}, {packages}",
        f"tokenflow_ext {run['tokenflow_ext']} at commit {run['commit']}; {run['compiler']}; "
        f"CPU kernels: {run['instruction set']}",
        f"{run['date']}; load average of the last minute before and after the run: {loads}",
        f"`{run['command']}`",
    ]
