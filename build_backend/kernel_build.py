"""Decides what to compile and with which flags, and compiles it.

The first half are pure functions over plain values (tests call them without a compiler); the
second half runs the compiler. torch is imported inside functions only: reading metadata needs none.

Nothing here looks for a visible GPU: container builds have none. The CUDA toolkit and
``torch.version.cuda`` decide.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_CUDA_TOOLKIT = (12, 0)
MINIMUM_ARCHITECTURE = (8, 0)
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
# Memory one compiler process is allowed when the number of parallel jobs is chosen.
MEMORY_PER_JOB = 2 << 30

# torch/headeronly/version.h packs (major, minor) into the two top bytes.
TORCH_TARGET_VERSION = f"0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000ULL"

# Source files named *_avx2.cpp hold code picked at run time; elsewhere they compile to nothing.
_AVX512 = [
    "-mavx512f",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bw",
    "-mavx2",
    "-mfma",
    # g++ before 13 takes the undefined operand inside its own intrinsics for a mistake of ours.
    "-Wno-unknown-warning-option",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": _AVX512,
    "_avx512vnni": [*_AVX512, "-mavx512vnni"],
}

_ARCHITECTURE_NAMES = {
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}


class BuildError(RuntimeError):
    """Nothing can be built; the message says why and what to do about it."""


# --------------------------------------------------------------------------------------------------
# Decisions
# --------------------------------------------------------------------------------------------------


def parse_version(text: str) -> tuple[int, int]:
    """("2.13.0+cpu") -> (2, 13)."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return int(match[1]), int(match[2])


def check_torch(version: str) -> None:
    """Raises BuildError where torch is older than the stable ABI the operators are written on."""
    if parse_version(version) < MINIMUM_TORCH:
        wanted = "{}.{}".format(*MINIMUM_TORCH)
        raise BuildError(
            f"torch {version} is too old: the operators need the stable ABI of torch {wanted} or "
            f"later. Fix: pip install --upgrade 'torch>={wanted}'"
        )


@dataclass(frozen=True)
class Architecture:
    """A CUDA architecture: compute capability, suffix ("a", "f" or ""), whether PTX is kept."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def number(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")

    def flags(self) -> list[str]:
        """nvcc's arguments for this architecture."""
        out = [f"-gencode=arch=compute_{self.number},code=sm_{self.number}"]
        if self.ptx:
            out.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return out


def parse_architectures(text: str | None) -> tuple[list[Architecture], list[Architecture]]:
    """Reads a TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "8.6 9.0a", "Hopper").

    Returns:
        (kept, dropped): the architectures to build, in order and without repetition, and those
        older than the kernels support. Containers set lists that reach back a decade, so that an
        old entry beside a usable one is dropped (and reported), not refused.

    Raises:
        BuildError: an entry that cannot be read, or no entry is recent enough.
    """
    text = text if text and text.strip() else DEFAULT_ARCHITECTURES
    expanded = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        expanded += _ARCHITECTURE_NAMES.get(entry.lower(), entry).split(";")
    kept: dict[Architecture, None] = {}
    dropped: dict[Architecture, None] = {}
    for entry in filter(None, expanded):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry, flags=re.IGNORECASE)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}. Give compute capabilities such as "
                f"'8.0;9.0+PTX', or one of the names {', '.join(sorted(_ARCHITECTURE_NAMES))}."
            )
        architecture = Architecture(
            int(match[1]), int(match[2]), match[3].lower(), match[4] is not None
        )
        usable = (architecture.major, architecture.minor) >= MINIMUM_ARCHITECTURE
        (kept if usable else dropped)[architecture] = None
    if not kept:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={text!r} has no architecture of "
            "{}.{} or later, which the kernels need. ".format(*MINIMUM_ARCHITECTURE)
            + f"Fix: TORCH_CUDA_ARCH_LIST='{DEFAULT_ARCHITECTURES}', or TOKENFLOW_CUDA=0."
        )
    return list(kept), list(dropped)


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc, its version (major, minor) and the root of its toolkit."""

    nvcc: str
    version: tuple[int, int]
    home: Path

    @property
    def version_text(self) -> str:
        return "{}.{}".format(*self.version)

    def include_dirs(self) -> list[Path]:
        found = [*sorted(self.home.glob("targets/*/include")), self.home / "include"]
        return [path for path in found if (path / "cuda_runtime_api.h").is_file()][:1]

    def static_runtime(self) -> Path | None:
        for pattern in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/*/lib"):
            for folder in sorted(self.home.glob(pattern)):
                if (folder / "libcudart_static.a").is_file():
                    return folder / "libcudart_static.a"
        return None


@dataclass(frozen=True)
class CudaDecision:
    """Whether CUDA kernels are built, and why (or why not, and what would change that)."""

    build: bool
    reason: str


def decide_cuda(
    setting: str | None,
    torch_version: str,
    torch_cuda: str | None,
    toolkit: CudaToolkit | None,
) -> CudaDecision:
    """Decides whether CUDA kernels are built.

    Args:
        setting: the value of TOKENFLOW_CUDA: "0", "1", or None (or "") to decide by what is there.
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda; None for a torch without CUDA.
        toolkit: the nvcc that was found, or None.

    Raises:
        BuildError: TOKENFLOW_CUDA is neither 0 nor 1, or is 1 where CUDA cannot be built.
    """
    if setting == "":
        setting = None
    if setting not in (None, "0", "1"):
        raise BuildError(f"TOKENFLOW_CUDA must be 0 or 1, got {setting!r}")
    if setting == "0":
        return CudaDecision(False, "TOKENFLOW_CUDA=0")
    minimum = "{}.{}".format(*MINIMUM_CUDA_TOOLKIT)
    obstacle = None
    if torch_cuda is None:
        obstacle = (
            f"torch {torch_version} is a build without CUDA; install a CUDA torch and then "
            "this package again"
        )
    elif toolkit is None:
        obstacle = (
            f"torch {torch_version} has CUDA {torch_cuda} but no nvcc was found; install the CUDA "
            "toolkit, or set CUDA_HOME to it, and then install this package again"
        )
    elif toolkit.version < MINIMUM_CUDA_TOOLKIT:
        obstacle = (
            f"nvcc {toolkit.version_text} ({toolkit.nvcc}) is older than {minimum}; set CUDA_HOME "
            "to a newer toolkit and then install this package again"
        )
    if obstacle is None:
        assert toolkit is not None
        return CudaDecision(
            True,
            f"torch {torch_version} has CUDA {torch_cuda} and nvcc {toolkit.version_text} "
            f"is at {toolkit.nvcc}",
        )
    if setting == "1":
        raise BuildError(f"TOKENFLOW_CUDA=1, but CUDA kernels cannot be built: {obstacle}.")
    return CudaDecision(False, obstacle)


def job_limit(
    cores: int, available_memory: int | None, setting: str | None = None, sources: int = 1 << 30
) -> int:
    """Compiler processes to run at once: by cores, free memory, and MAX_JOBS where it is set.

    Args:
        cores: processors this process may use.
        available_memory: bytes free for new processes, None where that is unknown.
        setting: the value of MAX_JOBS, or None.
        sources: files there are to compile.
    """
    if setting:
        if not setting.isdigit() or int(setting) == 0:
            raise BuildError(f"MAX_JOBS must be a positive number, got {setting!r}")
        return min(int(setting), sources)
    by_memory = cores if available_memory is None else available_memory // MEMORY_PER_JOB
    return max(1, min(cores, by_memory, sources))


def instruction_set_flags(name: str, machine: str) -> list[str]:
    """Flags a source file's name asks for, on a machine (`platform.machine()`) that has them."""
    if machine.lower() not in ("x86_64", "amd64"):
        return []
    stem = Path(name).stem
    for suffix, flags in INSTRUCTION_SETS.items():
        if stem.endswith(suffix):
            return list(flags)
    return []


# --------------------------------------------------------------------------------------------------
# What is on this machine
# --------------------------------------------------------------------------------------------------


def available_memory() -> int | None:
    """Bytes free for new processes: the machine's, or the container's where that is less."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where the container has no limit
        group = Path("/sys/fs/cgroup")
        limits.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    return min(limits) if limits else None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_compiler(environment: Mapping[str, str]) -> list[str]:
    """The C++ compiler's command: CXX where it is set, else c++, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    asked = shlex.split(environment.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0], path=environment.get("PATH")):
            return command
    what = f"CXX={environment['CXX']!r} is not a program" if asked else "no C++ compiler was found"
    raise BuildError(
        f"{what}: the kernels are C++20. Fix: install one (Debian and Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++; conda: conda install -c conda-forge cxx-compiler), "
        "or set CXX to it."
    )


def compiler_accepts(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether an empty program compiles with `flags`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_toolkit(environment: Mapping[str, str]) -> CudaToolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else /usr/local/cuda."""
    candidates = [
        str(Path(environment[name], "bin", "nvcc"))
        for name in ("CUDA_HOME", "CUDA_PATH")
        if environment.get(name)
    ]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        nvcc = shutil.which(candidate, path=environment.get("PATH"))
        if nvcc is None:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            text = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            match = re.search(r"release (\d+)\.(\d+)", text)
            if match:
                return CudaToolkit(nvcc, (int(match[1]), int(match[2])), _toolkit_home(nvcc))
    return None


def _toolkit_home(nvcc: str) -> Path:
    # nvcc may be a wrapper script or a link, so that its own folder says little; it names its root
    # itself in a dry run ("#$ TOP=...").
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("")
        output = subprocess.run(
            [nvcc, "--dryrun", "-c", str(source)], capture_output=True, text=True, timeout=60
        )
    match = re.search(r"^#\$ TOP=(.+)$", output.stderr, flags=re.MULTILINE)
    if match:
        return Path(match[1].strip()).resolve()
    return Path(nvcc).resolve().parent.parent


# --------------------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Everything the two libraries are compiled from and with."""

    root: Path
    version: str
    torch_version: str
    torch_includes: list[str]
    torch_libraries: list[str]
    compiler: list[str]
    cuda: CudaDecision
    toolkit: CudaToolkit | None = None
    architectures: list[Architecture] = field(default_factory=list)

    @property
    def objects(self) -> Path:
        """Folder of object files, kept so that a second build compiles only what changed."""
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{self.torch_version}"
        return self.root / "build" / "kernels" / tag

    def summary(self) -> str:
        """What was decided and why, for a person to read."""
        lines = [f"tokenflow_ext {self.version}: torch {self.torch_version}"]
        lines.append(f"  C++ compiler: {shlex.join(self.compiler)}")
        lines.append(f"  CUDA kernels: {'yes' if self.cuda.build else 'no'}: {self.cuda.reason}")
        if self.cuda.build:
            lines.append(f"  CUDA architectures: {';'.join(map(str, self.architectures))}")
        return "\n".join(lines)


def make_plan(root: Path, version: str, environment: Mapping[str, str] = os.environ) -> Plan:
    """Looks at torch, the compiler and the CUDA toolkit, and decides what to build.

    Raises:
        BuildError: nothing can be built (the message says why and what to do).
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(
            f"tokenflow_ext builds on Linux; this is {sys.platform}. Fix: use Linux, WSL or a "
            "container."
        )
    compiler = find_compiler(environment)
    if not compiler_accepts(compiler, ["-std=c++20"]):
        raise BuildError(
            f"{shlex.join(compiler)} cannot compile a C++20 program. Fix: install g++ 10 or later, "
            "or clang++ 13 or later, and set CXX to it."
        )
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        wanted = "{}.{}".format(*MINIMUM_TORCH)
        raise BuildError(
            f"torch cannot be imported ({error}). Fix: pip install 'torch>={wanted}', then install "
            "this package again."
        ) from error
    check_torch(torch.__version__)
    toolkit = find_toolkit(environment)
    cuda = decide_cuda(
        environment.get("TOKENFLOW_CUDA"), torch.__version__, torch.version.cuda, toolkit
    )
    architectures: list[Architecture] = []
    if cuda.build:
        assert toolkit is not None
        architectures, dropped = parse_architectures(environment.get("TORCH_CUDA_ARCH_LIST"))
        if dropped:
            print(
                f"TORCH_CUDA_ARCH_LIST: leaving out {', '.join(map(str, dropped))}: "
                "the kernels need {}.{} or later".format(*MINIMUM_ARCHITECTURE),
                flush=True,
            )
        if toolkit.static_runtime() is None or not toolkit.include_dirs():
            raise BuildError(
                f"the CUDA toolkit at {toolkit.home} lacks libcudart_static.a or "
                "cuda_runtime_api.h. Fix: install the toolkit's cudart development package, set "
                "CUDA_HOME to a complete toolkit, or set TOKENFLOW_CUDA=0."
            )
    return Plan(
        root=root,
        version=version,
        torch_version=torch.__version__,
        torch_includes=cpp_extension.include_paths("cpu"),
        torch_libraries=cpp_extension.library_paths("cpu"),
        compiler=compiler,
        cuda=cuda,
        toolkit=toolkit,
        architectures=architectures,
    )


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _common_flags(plan: Plan) -> list[str]:
    return ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{plan.root / 'csrc'}"]


def _torch_flags(plan: Plan) -> list[str]:
    # C++20 is what torch's own extensions are compiled with. Its headers are not ours to warn
    # about, hence -isystem.
    flags = [f"-isystem{path}" for path in plan.torch_includes]
    flags += ["-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    if plan.cuda.build:
        assert plan.toolkit is not None
        flags += ["-DTOKENFLOW_WITH_CUDA", "-DUSE_CUDA"]
        flags += [f"-isystem{path}" for path in plan.toolkit.include_dirs()]
    return flags


def _fact_flags(plan: Plan) -> list[str]:
    facts = {
        "TOKENFLOW_VERSION": plan.version,
        "TOKENFLOW_TORCH_VERSION": plan.torch_version,
        "TOKENFLOW_CUDA_VERSION": plan.toolkit.version_text
        if plan.cuda.build and plan.toolkit
        else "",
        "TOKENFLOW_CUDA_ARCHITECTURES": ";".join(map(str, plan.architectures)),
        "TOKENFLOW_CUDA_REASON": plan.cuda.reason,
    }
    flags = [f"-D{name}={_quote(value)}" for name, value in facts.items()]
    # pybind11 comes with torch's headers.
    flags += [f"-isystem{path}" for path in plan.torch_includes]
    return [*flags, f"-isystem{sysconfig.get_path('include')}", "-std=c++20"]


def compile_command(plan: Plan, source: Path) -> list[str]:
    """The command that compiles one source file, without its -o."""
    relative = source.relative_to(plan.root / "csrc")
    if source.suffix == ".cu":
        assert plan.toolkit is not None
        # nvcc takes a program as its host compiler: neither a launcher before it nor flags.
        host = [word for word in plan.compiler if not word.startswith("-")][-1]
        command = [plan.toolkit.nvcc, "-ccbin", host, "-std=c++17", "-O3", "-lineinfo"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", f"-I{plan.root / 'csrc'}"]
        for architecture in plan.architectures:
            command += architecture.flags()
    else:
        command = [*plan.compiler, *_common_flags(plan)]
        if source.name == "build_info.cpp":
            command += _fact_flags(plan)
        elif relative.parts[0] == "torch":
            command += _torch_flags(plan)
        else:
            command.append("-std=c++17")
        flags = instruction_set_flags(source.name, platform.machine())
        if flags and compiler_accepts(plan.compiler, flags):
            command += flags
    return [*command, "-c", str(source)]


def ops_sources(plan: Plan) -> list[Path]:
    """Sources of the operator library, those that take longest to compile first."""
    csrc = plan.root / "csrc"
    sources = sorted(csrc.glob("cuda/*.cu")) if plan.cuda.build else []
    sources += sorted(p for p in csrc.glob("torch/*.cpp") if p.name != "build_info.cpp")
    return sources + sorted(csrc.glob("cpu/*.cpp"))


def build_info_sources(plan: Plan) -> list[Path]:
    """Sources of the module of build facts, the only part that knows Python."""
    csrc = plan.root / "csrc"
    return [csrc / "torch" / "build_info.cpp", csrc / "cpu" / "instruction_set.cpp"]


_print_lock = threading.Lock()


def _say(text: str) -> None:
    with _print_lock:
        print(text, flush=True)


def _up_to_date(output: Path, command: str) -> bool:
    record, dependencies = output.with_suffix(".cmd"), output.with_suffix(".d")
    try:
        if record.read_text() != command:
            return False
        made = output.stat().st_mtime_ns
        # A make rule, "output: source header header \", with spaces in names escaped.
        names = dependencies.read_text().split(":", 1)[1].replace("\\\n", " ")
        names = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names) if name]
        return all(os.stat(name).st_mtime_ns < made for name in names)
    except (OSError, IndexError):
        return False


def _compile(plan: Plan, source: Path) -> Path:
    relative = source.relative_to(plan.root / "csrc")
    output = plan.objects / relative.parent / (relative.name + ".o")
    output.parent.mkdir(parents=True, exist_ok=True)
    dependencies = output.with_suffix(".d")
    command = [*compile_command(plan, source), "-MMD", "-MF", str(dependencies), "-o", str(output)]
    text = shlex.join(command)
    if _up_to_date(output, text):
        return output
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _say(f"  {time.monotonic() - start:5.1f} s  {relative}\n{result.stdout}".rstrip())
    if result.returncode != 0:
        output.unlink(missing_ok=True)
        raise BuildError(f"compiling csrc/{relative} failed (exit {result.returncode}):\n  {text}")
    output.with_suffix(".cmd").write_text(text)
    return output


def _link(command: Sequence[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Replaced in one step: a process that has the old file mapped keeps it whole.
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    text = [*command, "-o", str(temporary)]
    result = subprocess.run(text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.stdout.strip():
        _say(result.stdout.rstrip())
    if result.returncode != 0:
        temporary.unlink(missing_ok=True)
        raise BuildError(f"linking {output.name} failed:\n  {shlex.join(text)}")
    temporary.replace(output)


def compile_all(plan: Plan, sources: Iterable[Path]) -> dict[Path, Path]:
    """Compiles what changed, in parallel. Returns source -> object."""
    sources = list(dict.fromkeys(sources))
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise BuildError(
            f"source files are missing: {', '.join(map(str, missing))}. "
            "Fix: build from a complete clone."
        )
    jobs = job_limit(
        usable_cores(), available_memory(), os.environ.get("MAX_JOBS"), max(1, len(sources))
    )
    _say(f"  {len(sources)} source files, {jobs} at once")
    with ThreadPoolExecutor(jobs) as pool:
        futures = {source: pool.submit(_compile, plan, source) for source in sources}
        try:
            return {source: future.result() for source, future in futures.items()}
        except BuildError:
            for future in futures.values():
                future.cancel()
            raise


@contextlib.contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """One build at a time in a folder of objects."""
    plan.objects.mkdir(parents=True, exist_ok=True)
    with open(plan.objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link_ops(plan: Plan, objects: Mapping[Path, Path], output: Path) -> None:
    """Links libtokenflow_ops.so at `output`: no Python symbol, no C++ symbol of torch.

    Linked with the C shim of torch and with the static CUDA runtime: neither ties the file to a
    version of torch or of its CUDA.
    """
    command = [*plan.compiler, "-shared", "-Wl,--no-undefined", "-Wl,--as-needed"]
    command += [str(objects[source]) for source in ops_sources(plan)]
    command += [*(f"-L{path}" for path in plan.torch_libraries), "-ltorch_cpu"]
    if plan.cuda.build:
        assert plan.toolkit is not None
        command += ["-ltorch_cuda", str(plan.toolkit.static_runtime()), "-lrt", "-ldl"]
        command.append("-Wl,--exclude-libs,ALL")  # the static runtime's symbols stay inside
    _link([*command, "-lpthread"], output)


def link_build_info(plan: Plan, objects: Mapping[Path, Path], output: Path) -> None:
    """Links the Python extension module of build facts at `output`."""
    command = [*plan.compiler, "-shared"]
    _link([*command, *(str(objects[source]) for source in build_info_sources(plan))], output)
