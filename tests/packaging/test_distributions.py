"""Wheel, source distribution, and what a failing build says. Object files are reused."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return call_backend("build_wheel", tmp_path_factory.mktemp("wheel"))


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
                if file.endswith((".py", ".h", ".cpp", ".cu", ".cuh", ".yaml"))
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


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "CXX='no-such-compiler' is not a program"),
        ({"CXX": "false"}, "false cannot compile a C++20 program"),
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
