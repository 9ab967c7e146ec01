"""Wheel, source distribution, and what a failing build says. Object files are reused."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from kernel_build import find_compiler, instruction_sets, read_flags

ROOT = Path(__file__).resolve().parents[2]


def installed_files(pattern: str) -> set[str]:
    """Files of that name in the checkout, by where they are in an installation."""
    places = {"tokenflow_ext": "", "models": "tokenflow_ext/", "train": "tokenflow_ext/"}
    files = {
        f"{place}{path.relative_to(ROOT)}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob(pattern)
        # Python before 3.13 and after it differ in whether rglob follows links.
        if not path.is_relative_to(ROOT / "tokenflow_ext/models")
        and not path.is_relative_to(ROOT / "tokenflow_ext/train")
    }
    assert files
    return files


def call_backend(hook: str, folder: Path) -> Path:
    """Runs one hook of the back end as pip does, in a process of its own; returns the file made."""
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import backend; "
        f"open(sys.argv[1] + '/name', 'w').write(backend.{hook}(sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / (folder / "name").read_text()


def made_already() -> Path | None:
    """The wheel that `make` built for the other sets of versions, where no source is newer."""
    built = ROOT / "build/wheel/.built"
    folders = ("build_backend", "csrc", "models", "tokenflow_ext", "train")
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    sources += [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    ]
    if not built.is_file() or built.stat().st_mtime < max(x.stat().st_mtime for x in sources):
        return None
    return next(built.parent.glob("*.whl"), None)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_already() or call_backend("build_wheel", tmp_path_factory.mktemp("wheel"))


class TestWheel:
    def test_contents(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        assert "tokenflow_ext/libtokenflow_ops.so" in names
        assert any(name.startswith("tokenflow_ext/_build_info.") for name in names)
        assert installed_files("*.py") <= names

    def test_no_other_top_level_name(self, wheel: Path) -> None:
        tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"tokenflow_ext"}

    def test_metadata(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
        assert required == ["torch>=2.10"]
        assert metadata["License-Expression"] == "Apache-2.0"
        assert {"models", "train", "dev"} <= set(metadata.get_all("Provides-Extra"))
        [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "tokenflow = tokenflow_ext.train.cli.entry:main" in archive.read(name).decode()

    def test_holds_the_configurations(self, wheel: Path) -> None:
        assert installed_files("*.yaml") <= set(zipfile.ZipFile(wheel).namelist())

    def test_runs_from_where_it_is_unpacked(self, wheel: Path, tmp_path: Path) -> None:
        zipfile.ZipFile(wheel).extractall(tmp_path)
        code = "import tokenflow_ext; print(tokenflow_ext.build_info()['library'])"
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        expected = tmp_path / "tokenflow_ext" / "libtokenflow_ops.so"
        assert result.stdout.strip() == str(expected), result.stderr


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(call_backend("build_sdist", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")  # as pip does
    [root] = (folder / "unpacked").iterdir()
    return root


class TestSourceDistribution:
    def test_holds_every_source_once(self, unpacked: Path) -> None:
        names = [
            str((Path(folder) / file).relative_to(unpacked))
            for folder, _, files in os.walk(unpacked)  # follows no link
            for file in files
        ]
        for folder in ("csrc", "build_backend", "tokenflow_ext", "models", "train"):
            sources = {
                str((Path(found) / file).relative_to(ROOT))
                for found, _, files in os.walk(ROOT / folder)
                for file in files
                if file.endswith((".py", ".h", ".cpp", ".cu", ".cuh", ".yaml", "flags.txt"))
            }
            assert sources
            assert sources <= set(names)
        assert {"CMakeLists.txt", "Makefile", "LICENSE", "constraints.txt"} <= set(names)
        assert not [name for name in names if name.startswith("tokenflow_ext/train/")]
        assert not [name for name in names if name.startswith("tokenflow_ext/models/")]

    def test_builds_the_packages_of_the_checkout(self, unpacked: Path, tmp_path: Path) -> None:
        command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path)]
        result = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        for pattern in ("*.py", "*.yaml"):
            built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob(pattern)}
            assert built == installed_files(pattern)


# Stands for a compiler: notes what it is asked, and makes empty files of the names asked for.
RECORDER = r"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --dryrun) echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
esac
echo "$*" >> "$RECORD"
for word; do
  case $before in -o) : > "$word" ;; -MF) echo "x:" > "$word" ;; esac
  before=$word
done
"""

# torch is told that it was built with CUDA, since this one may have been built without.
WITH_CUDA = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = sys.argv[1:3]
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[3]]
runpy.run_path("setup.py", run_name="__main__")
"""


class TestArguments:
    """What the compilers are asked, without compiling anything."""

    def recorded(
        self, folder: Path, command: list[str], cwd: Path, **environment: str
    ) -> tuple[dict[str, list[str]], str]:
        """Runs a build; returns the arguments by the source or library made, and what was said."""
        (folder / "bin").mkdir()
        for name in ("c++", "nvcc"):
            (folder / "bin" / name).write_text(RECORDER)
            (folder / "bin" / name).chmod(0o755)
        own = {
            "CUDA_HOME": str(folder),
            "CXX": str(folder / "bin" / "c++"),
            "RECORD": str(folder / "record"),
            "TOKENFLOW_CUDA": "",
            "TORCH_CUDA_ARCH_LIST": "",
            "TORCH_NO_COMPILER_WRAPPER": "1",
        }
        result = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        found = {}
        for line in (folder / "record").read_text().splitlines():
            words = line.split()
            if "-o" in words:
                made = words[words.index("-c") + 1 :] if "-c" in words else words
                source = [word for word in made if word.startswith("/") and "csrc" in word]
                name = source[0] if "-c" in words else words[words.index("-o") + 1]
                found[Path(name).name.partition(".cpython")[0]] = words
        return found, result.stdout

    def test_without_cuda(self, unpacked: Path, tmp_path: Path) -> None:
        command = ["setup.py", "build_ext", "--build-lib", str(tmp_path)]
        found, said = self.recorded(tmp_path, command, unpacked, TOKENFLOW_CUDA="0")
        assert "CUDA kernels: no: TOKENFLOW_CUDA=0" in said
        flags = read_flags(unpacked / "csrc" / "flags.txt")
        sources = {
            path.name
            for folder in ("cpu", "torch")
            for path in (unpacked / "csrc" / folder).glob("*.cpp")
        }
        assert {name for name in found if name.endswith(".cpp")} == sources
        here = instruction_sets(find_compiler(os.environ), flags, platform.machine())
        for name in sources:
            assert {*flags["cxx"]} <= {*found[name]}
            suffix = name[:-4].rpartition("_")[2]
            instruction_set = flags[suffix] if suffix in here else []
            machine = {flag for flag in instruction_set if flag.startswith("-m")}
            assert {flag for flag in found[name] if flag.startswith("-m")} == machine, name
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in found["schema.cpp"]
        libraries = [word for word in found["libtokenflow_ops.so"] if word.startswith("-l")]
        assert libraries == ["-ltorch_cpu", "-lpthread"]
        assert [word for word in found["_build_info"] if word.startswith("-l")] == []

    def test_with_cuda_of_another_major_version(self, unpacked: Path, tmp_path: Path) -> None:
        command = ["-c", WITH_CUDA, "12.8", str(tmp_path), str(tmp_path / "lib")]
        found, said = self.recorded(
            tmp_path,
            command,
            unpacked,
            TORCH_CUDA_ARCH_LIST="7.0 8.0 9.0+PTX",
            TOKENFLOW_LOCAL_VERSION="cu128",
        )
        assert "WARNING: nvcc is a major version ahead" in said
        assert "CUDA architectures: 8.0;9.0+PTX; older than 8.0, left out: ['7.0']" in said
        sources = {path.name for path in (unpacked / "csrc" / "cuda").glob("*.cu")}
        assert {name for name in found if name.endswith(".cu")} == sources
        flags = read_flags(unpacked / "csrc" / "flags.txt")
        for name in sources:
            assert {*flags["nvcc"], f"-ccbin={tmp_path}/bin/c++"} <= {*found[name]}
            assert {word for word in found[name] if "arch=" in word} == {
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90,code=sm_90",
                "-gencode=arch=compute_90,code=compute_90",
            }
        assert {"-DUSE_CUDA", "-DTOKENFLOW_WITH_CUDA"} <= {*found["operators_cuda.cpp"]}
        [version] = [word for word in found["build_info.cpp"] if "TOKENFLOW_VERSION" in word]
        assert re.search(r"=\W*\d+\.\d+\.\d+\+cu128\W*$", version)
        library = found["libtokenflow_ops.so"]
        assert {"-ltorch_cpu", "-ltorch_cuda", "-lcudart_static"} <= {*library}
        assert {"-lcudart", "-lc10", "-lc10_cuda", "-ltorch_python"}.isdisjoint(library)
        assert {f"{Path(name).stem}.o" for name in sources} <= {Path(word).name for word in library}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++20 compiler in CXX='no-such-compiler' was found"),
        ({"CXX": "false"}, "no C++20 compiler in CXX='false' was found"),
        ({"MAX_JOBS": "all"}, "MAX_JOBS must be a positive number, got 'all'"),
        ({"TOKENFLOW_CUDA": "maybe"}, "TOKENFLOW_CUDA must be 0 or 1"),
    ],
)
def test_a_build_that_cannot_be_says_why(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    message = result.stderr
    assert f"tokenflow_ext cannot be built: {reason}" in message
    assert "Traceback" not in message


def test_a_build_without_torch_says_so(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"tokenflow_ext cannot be built: {sys.executable} has no torch. Fix:" in result.stderr
    assert "Traceback" not in result.stderr
