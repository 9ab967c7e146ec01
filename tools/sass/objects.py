"""Objects, libraries and cubins, read by cuobjdump and nvdisasm."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .disassembly import parse_sass
from .errors import SassError
from .kernels import Kernel, make_kernel, parse_resources, short_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: on PATH, in the toolkit, or in its package.

    Raises:
        SassError: it is in none of them; the message names the package.
    """
    if path := shutil.which(name):
        return path
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for toolkit in filter(None, toolkits):
        if path := shutil.which(name, path=str(Path(toolkit) / "bin")):
            return path
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(file.locate())
    raise SassError(
        f"{name} is neither on PATH nor in CUDA_HOME/bin: `pip install {package}` brings it"
    )


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise SassError(f"{' '.join(map(str, command))}: {said[-1] if said else 'failed'}")
    return result.stdout


def _version(tool: str) -> str:
    found = re.search(r"\bV([\d.]+)", _run(find_tool(tool), "--version"))
    return found[1] if found else "of an unknown version"


def demangle(symbols: Sequence[str]) -> list[str]:
    """The symbols' C++ names, or the symbols themselves where there is no c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not symbols:
        return list(symbols)
    return _run(tool, *symbols).splitlines()


def read_cubin(cubin: Path) -> tuple[list[Kernel], str]:
    """The kernels of a cubin that do something there, and the compiler that made it."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    elf = _run(cuobjdump, "-elf", cubin)
    sass = _run(nvdisasm, "-c", "-gi", cubin)
    architecture = re.search(r"\.target\s+(sm_\w+)", sass)
    if architecture is None:
        raise SassError(f"{cubin}: nvdisasm names no architecture")
    compiler = re.search(r"Tool Name:\s*(ptxas)\n\s*Tool Version:.*\bV([\d.]+)", elf)
    resources = parse_resources(_run(cuobjdump, "-res-usage", cubin), elf)
    codes = parse_sass(sass)
    if missing := resources.keys() ^ codes.keys():
        raise SassError(f"{cubin}: {', '.join(sorted(missing))} has no code or no resource usage")
    names = map(short_name, demangle(list(resources)))
    kernels = [
        make_kernel(architecture.group(1), symbol, name, resources[symbol], codes[symbol])
        for symbol, name in zip(resources, names, strict=True)
    ]
    return [kernel for kernel in kernels if not kernel.empty], " ".join(
        compiler.groups()
    ) if compiler else "an unknown compiler"


def read_objects(paths: Iterable[Path]) -> tuple[list[Kernel], str]:
    """Kernels of objects, libraries and cubins, by architecture, in the files' order.

    Returns:
        The kernels, and the names and versions of the compilers and of what read their code.

    Raises:
        SassError: a tool is missing, or a file holds no machine code.
    """
    kernels: list[Kernel] = []
    compilers: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        for number, path in enumerate(paths):
            if not path.is_file():
                raise SassError(f"{path} does not exist: `make cuda-compile` makes the objects")
            cubins = [path]
            if not _is_cubin(path):
                folder = Path(scratch) / str(number)
                folder.mkdir()
                _run(find_tool("cuobjdump"), "-xelf", "all", path.resolve(), cwd=folder)
                cubins = sorted(folder.iterdir())
            if not cubins:
                raise SassError(f"{path} holds no machine code")
            for cubin in cubins:
                found, compiler = read_cubin(cubin)
                kernels += found
                compilers.add(compiler)
    if not kernels:
        raise SassError("no kernel in these files")
    kernels.sort(key=lambda kernel: kernel.architecture)
    return kernels, f"{', '.join(sorted(compilers))}, read by nvdisasm {_version('nvdisasm')}"


def _is_cubin(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(20)
    return head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == 190  # EM_CUDA


def built_objects(folder: Path) -> list[Path]:
    """The objects of the CMake build, one for each source: what older sources left is not read."""
    return [folder / f"{source.name}.o" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
