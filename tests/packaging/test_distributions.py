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
        for folder, package in [
            ("tokenflow_ext", "tokenflow_ext"),
            ("models", "tokenflow_ext/models"),
            ("train", "tokenflow_ext/train"),
        ]:
            sources = {
                f"{package}/{path.relative_to(ROOT / folder)}"
                for path in (ROOT / folder).rglob("*.py")
            }
            assert sources
            assert sources <= names

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
        assert "tokenflow = tokenflow_ext.train.entry:main" in archive.read(name).decode()

    def test_holds_the_configurations(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        configs = [path.relative_to(ROOT) for path in (ROOT / "train/configs").rglob("*.yaml")]
        assert configs
        assert {f"tokenflow_ext/{path}" for path in configs} <= names

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


def test_source_distribution_holds_every_source(tmp_path: Path) -> None:
    with tarfile.open(call_backend("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "build_backend", "tokenflow_ext", "models", "train"):
        sources = {
            str(path.relative_to(ROOT))
            for suffix in ("py", "h", "cpp", "cu", "cuh", "yaml")
            for path in (ROOT / folder).rglob(f"*.{suffix}")
        }
        assert sources
        assert sources <= names
    assert {"CMakeLists.txt", "Makefile", "LICENSE", "constraints.txt"} <= names


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
