"""Builds the wheel that is published, and tests it where nothing else is installed.

One wheel serves every Python from 3.10 on. The operators' library knows no Python. The module of
build facts is pybind11's part and depends on Python's version, so that it is there once for each
Python that is found here. auditwheel gives the wheel the manylinux tag of the symbols that it
really needs, and leaves torch's own libraries out. With a CUDA torch and nvcc it has the CUDA
kernels, and its version says so (0.1.0+cu130).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from kernel_build import BuildError, decide_cuda, find_toolkit, python_facts  # noqa: E402

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Torch brings them, of its own version.
NOT_OURS = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
# The tests that a bare environment runs.
TESTS = [f"tests/quantizer/test_{name}.py" for name in ("codebook", "module", "pyramid")]

# In a Python without torch: the library loads beside torch's, and the module tells the facts.
_WITHOUT_TORCH = """
import ctypes, importlib.util, sys
module, *libraries = sys.argv[1:]
for library in libraries:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("_build_info", module)
facts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(facts)
print(facts.facts()["version"], facts.facts()["cpu_instruction_set"])
"""


def find_pythons() -> dict[str, str]:
    """Version -> interpreter, for those with headers: this one, on PATH, pyenv's, manylinux's."""
    found = {}
    for version in VERSIONS:
        plain = "cp" + version.replace(".", "")
        places = [
            *([sys.executable] if version == "{}.{}".format(*sys.version_info) else []),
            shutil.which(f"python{version}"),
            f"/opt/python/{plain}-{plain}/bin/python",
            *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
        ]
        for place in filter(None, places):
            try:
                python_facts(place)
            except (BuildError, OSError):
                continue
            found[version] = place
            break
    return found


def local_version() -> str:
    """What follows the plus in a CUDA wheel's version; "" where CUDA is not built."""
    _, nvcc = find_toolkit(os.environ)
    cuda, reason = decide_cuda(os.environ.get("TOKENFLOW_CUDA"), torch.version.cuda, nvcc)
    print(f"CUDA kernels: {'yes' if cuda else 'no'}: {reason}")
    return f"cu{nvcc.replace('.', '')}" if cuda and nvcc else ""


def build(folder: Path, pythons: dict[str, str]) -> Path:
    """Builds the wheel in ``folder``; the one that it returns has its manylinux tag."""
    others = [python for python in pythons.values() if python != sys.executable]
    environment = {
        **os.environ,
        "TOKENFLOW_PYTHONS": os.pathsep.join(others) or sys.executable,
        "TOKENFLOW_LOCAL_VERSION": local_version(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "plain"), str(ROOT)], environment)
    [plain] = (folder / "plain").glob("*.whl")
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder / "tagged")]
    excluded = [word for name in NOT_OURS for word in ("--exclude", name)]
    run([*command, *excluded, str(plain)], environment)
    [tagged] = (folder / "tagged").glob("*.whl")
    return tagged


def put(wheel: Path, out: Path) -> Path:
    """Copies a wheel into a folder, over an earlier one of its name; returns the copy.

    Raises:
        SystemExit: something else has its name.
    """
    target = out / wheel.name
    out.mkdir(parents=True, exist_ok=True)
    if target.exists() and not ours(target):
        raise SystemExit(f"{target} is there and is no wheel of this package: move it away")
    shutil.copyfile(wheel, target)
    return target


def ours(wheel: Path) -> bool:
    """Whether a file is an earlier wheel of this package."""
    try:
        return "tokenflow_ext/__init__.py" in zipfile.ZipFile(wheel).namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def run(command: Sequence[str], environment: dict[str, str] | None = None, cwd: str = ".") -> str:
    """The output of a program that must succeed."""
    result = subprocess.run(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} has failed:\n{result.stdout}")
    return result.stdout


def check(wheel: Path, folder: Path, pythons: dict[str, str]) -> None:
    """What must hold of a wheel, wherever it is installed.

    Raises:
        SystemExit: it does not.
    """
    if not re.search(r"-py3-none-manylinux_\d+_\d+_\w+\.whl$", wheel.name):
        raise SystemExit(f"{wheel.name} has not the tags of a wheel for every Python")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    package = folder / "unpacked" / "tokenflow_ext"
    operators = str(package / "libtokenflow_ops.so")
    symbols = run(["nm", "-D", "--undefined-only", operators])
    if named := re.findall(r"\b_?Py[A-Z]\w*", symbols):
        raise SystemExit(f"the operators' library needs {named[0]} of Python")
    # libtorch_cpu.so, and libtorch_cuda.so with CUDA.
    needed = re.findall(r"\[(libtorch\w*\.so)\]", run(["readelf", "-d", operators]))
    libraries = [str(Path(torch.__file__).parent / "lib" / name) for name in needed]
    for version, python in pythons.items():
        plain = version.replace(".", "")
        [module] = package.glob(f"_build_info.cpython-{plain}-*.so")
        words = [str(module), *libraries, operators]
        said = run([python, "-c", _WITHOUT_TORCH, *words]).strip()
        print(f"Python {version}: {said}")
        if said.split()[0] != wheel.name.split("-")[1]:
            raise SystemExit(f"{module.name} has not the version of {wheel.name}: {said}")


def check_installed(wheel: Path, folder: Path) -> None:
    """Installs a wheel in an environment with torch alone, and runs its doctor and some tests.

    Raises:
        SystemExit: a test fails, or what is tested is not what was installed.
    """
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = folder / "bare"
    run([sys.executable, "-m", "venv", str(environment)])
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pins = ["-c", str(ROOT / "constraints.txt")] if torch.version.cuda is None else []
    wanted = f"torch=={torch.__version__.split('+')[0]}"
    run([*pip, *pins, wanted, str(wheel)], clean)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    where = [python, "-c", "import tokenflow_ext; print(tokenflow_ext.__file__)"]
    found = run(where, clean, str(elsewhere)).split()[-1]
    if not Path(found).is_relative_to(environment):
        raise SystemExit(f"{found} was imported, which the wheel did not install")
    print(run([python, "-m", "tokenflow_ext.doctor"], clean, str(elsewhere)).strip())
    run([*pip, *pins, "numpy", "pytest", "hypothesis"], clean)
    tests = [str(ROOT / test) for test in TESTS]
    said = run([str(environment / "bin" / "pytest"), "-q", *tests], clean, str(elsewhere))
    print(said.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_wheel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="[dist]")
    parser.add_argument(
        "--no-install", action="store_true", help="do not test it in an environment of its own"
    )
    known = parser.parse_args(argv)
    pythons = find_pythons()
    missing = [version for version in VERSIONS if version not in pythons]
    print(
        f"Python {', '.join(pythons)}" + (f"; not found: {', '.join(missing)}" if missing else "")
    )
    with tempfile.TemporaryDirectory() as name:
        made = build(Path(name), pythons)
        check(made, Path(name), pythons)
        if not known.no_install:
            check_installed(made, Path(name))
        wheel = put(made, known.out)
    print(f"{wheel} ({wheel.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
