"""What torch's build tool leaves open: are CUDA kernels built, for what, and with how many jobs.

Nothing here imports torch or looks for a visible GPU: container builds have none. The CUDA toolkit
and ``torch.version.cuda`` decide.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_NVCC = (12, 0)
# 9.0a is compute capability 9.0 with its own tensor core instructions; the intermediate code of 8.0
# serves whatever comes after.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
# Before 8.0, which the kernels need: torch's names, and how the numbers begin.
OLD_ARCHITECTURES = ("kepler", "maxwell", "pascal", "volta", "turing", *(f"{n}." for n in range(8)))
# Memory that one compiler process is allowed when the number of jobs is chosen.
MEMORY_PER_JOB = 2 << 30


class BuildError(RuntimeError):
    """Nothing can be built; the message says why and what to do about it."""


def parse_version(text: str) -> tuple[int, ...]:
    """("2.13.0+cpu") -> (2, 13)."""
    return tuple(int(part) for part in text.split(".")[:2])


def check_torch(version: str) -> None:
    """Raises BuildError where torch is older than the stable ABI the operators are written on."""
    if parse_version(version) < MINIMUM_TORCH:
        fix = "Fix: pip install --upgrade 'torch>=2.10'"
        raise BuildError(f"torch {version} is too old: it needs the stable ABI of 2.10. {fix}")


def decide_cuda(setting: str | None, torch_cuda: str | None, nvcc: str | None) -> tuple[bool, str]:
    """Decides whether CUDA kernels are built, and says why, or what stands in the way.

    Args:
        setting: the value of TOKENFLOW_CUDA: "0", "1", or None (or "") to decide by what is there.
        torch_cuda: torch.version.cuda, such as "13.0"; None for a torch without CUDA.
        nvcc: the version of nvcc, such as "12.8"; None where there is none.

    Raises:
        BuildError: TOKENFLOW_CUDA is neither 0 nor 1, or is 1 where CUDA cannot be built.
    """
    if setting not in (None, "", "0", "1"):
        raise BuildError(f"TOKENFLOW_CUDA must be 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "TOKENFLOW_CUDA=0"
    if torch_cuda is None:
        obstacle = "torch is a build without CUDA; install a CUDA torch, then this package again"
    elif nvcc is None:
        obstacle = "no nvcc was found; install the CUDA toolkit, or set CUDA_HOME to it"
    elif parse_version(nvcc) < MINIMUM_NVCC:
        obstacle = f"nvcc {nvcc} is older than 12.0; set CUDA_HOME to a newer toolkit"
    else:
        ahead = parse_version(nvcc)[0] > parse_version(torch_cuda)[0]
        note = (
            "; WARNING: nvcc is a major version ahead, the driver has to serve both"
            if ahead
            else ""
        )
        return True, f"torch has CUDA {torch_cuda} and nvcc is {nvcc}{note}"
    if setting == "1":
        raise BuildError(f"TOKENFLOW_CUDA=1, but CUDA kernels cannot be built: {obstacle}")
    return False, obstacle


def parse_architectures(text: str | None) -> tuple[list[str], list[str]]:
    """Reads a TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "8.6 9.0a", "Hopper"); torch checks the entries.

    Returns:
        (kept, dropped): the architectures to build, and those older than the kernels support.
        Containers set lists that reach back a decade, so that an old entry beside a usable one is
        dropped (and reported), not refused.

    Raises:
        BuildError: no entry is recent enough.
    """
    entries = re.findall(r"[^;,\s]+", text or "") or DEFAULT_ARCHITECTURES.split(";")
    kept = [entry for entry in entries if not entry.lower().startswith(OLD_ARCHITECTURES)]
    if not kept:
        fix = f"Fix: TORCH_CUDA_ARCH_LIST='{DEFAULT_ARCHITECTURES}', or TOKENFLOW_CUDA=0"
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r}: the kernels need 8.0 or later. {fix}")
    return kept, [entry for entry in entries if entry not in kept]


def job_limit(cores: int, memory: int, setting: str | None = None) -> int:
    """Compiler processes to run at once: MAX_JOBS where it is set, else by cores and free bytes."""
    if setting and not re.fullmatch("0*[1-9][0-9]*", setting):
        raise BuildError(f"MAX_JOBS must be a positive number, got {setting!r}")
    return int(setting) if setting else max(1, min(cores, memory // MEMORY_PER_JOB))


def available_memory() -> int:
    """Bytes free for new processes: the machine's, or the container's where that is less."""
    if not Path("/proc/meminfo").exists():  # macOS: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    with suppress(OSError, ValueError):  # no control group, or "max" where it has no limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{x}").read_text() for x in ("max", "current"))
        free = min(free, int(limit) - int(used))
    return free


def find_compiler(environment: Mapping[str, str]) -> str:
    """The C++ compiler: CXX where it is set, else c++, g++ or clang++.

    Raises:
        BuildError: none that compiles C++20.
    """
    asked = environment.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if program := shutil.which(name, path=environment.get("PATH")):
            probe = [program, "-std=c++20", "-fsyntax-only", "-x", "c++", "/dev/null"]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return name
    fix = "Fix: apt-get install g++, dnf install gcc-c++ or conda install cxx-compiler, or set CXX"
    raise BuildError(f"no C++20 compiler{f' in CXX={asked!r}' if asked else ''} was found. {fix}")


def find_toolkit(environment: Mapping[str, str]) -> tuple[str, str] | tuple[None, None]:
    """Root and version of the CUDA toolkit: CUDA_HOME's, CUDA_PATH's, nvcc's, /usr/local/cuda."""
    places = [f"{environment[x]}/bin" for x in ("CUDA_HOME", "CUDA_PATH") if environment.get(x)]
    path = os.pathsep.join([*places, environment.get("PATH", ""), "/usr/local/cuda/bin"])
    if nvcc := shutil.which("nvcc", path=path):
        # nvcc may be a wrapper script or a link; in a dry run it names its root ("#$ TOP=...").
        arguments = (["--version"], ["--dryrun", "-x", "cu", "-c", "/dev/null"])
        said = [subprocess.run([nvcc, *x], capture_output=True, text=True) for x in arguments]
        version = re.search(r"release (\d+\.\d+)", said[0].stdout)
        home = re.search(r"#\$ TOP=(.+)", said[1].stderr)
        if version and home:
            return str(Path(home[1].strip()).resolve()), version[1]
    return None, None


def python_facts(python: str) -> tuple[str, str]:
    """Of an interpreter: the folder of its headers, and the suffix of its extension modules.

    Raises:
        BuildError: it has no headers, or does not run.
    """
    code = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.split()
    if len(said) != 2 or not Path(said[0], "Python.h").is_file():
        raise BuildError(f"TOKENFLOW_PYTHONS names {python}, which does not run or has no Python.h")
    return said[0], said[1]


def instruction_sets(cxx: str, flags: Mapping[str, list[str]], machine: str) -> list[str]:
    """Those in `flags` that are `machine`'s and that the compiler knows."""
    here = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}.get(machine)
    of = {"portable": here, "dotprod": "arm", "cxx": None, "nvcc": None}
    known = []
    for name in sorted(name for name in flags if here and of.get(name, "x86") == here):
        probe = [cxx, *flags[name], "-fsyntax-only", "-x", "c++", "/dev/null"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            known.append(name)
        else:
            print(f"{cxx} does not know {name}: the kernels for it are left out")
    return known


def read_flags(path: Path) -> dict[str, list[str]]:
    """The compilers' flags by name, from lines such as ``avx2: -mavx2 -mfma``."""
    lines = [line.split(": ", 1) for line in path.read_text().splitlines() if line[:1].isalpha()]
    return {name: flags.split() for name, flags in lines}
