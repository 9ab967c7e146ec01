"""What the check of an installation says, of whole ones and of broken ones."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenflow_ext
from tokenflow_ext import doctor
from tokenflow_ext.doctor import BROKEN, GOOD, LIMITED

ROOT = Path(__file__).resolve().parents[2]
BUILD = {
    "version": "0.1.0",
    "torch": "2.13.0+cpu",
    "cuda": None,
    "cuda_reason": "no nvcc was found",
}


def test_this_environment_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"      ok  torch {torch.__version__}, ")
    version = importlib.metadata.version("tokenflow_ext")
    assert f"tokenflow_ext {version}, operators built with torch" in lines[1]
    assert any("extra models" in line for line in lines)


def test_a_part_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    state, text = doctor.check_torch(None, "ModuleNotFoundError: No module named 'torch'")
    assert state == BROKEN
    assert "No module named 'torch'" in text
    state, text = doctor.check_library(None, "KernelsMissingError: compiled operators not found")
    assert state == BROKEN
    assert "compiled operators not found" in text
    monkeypatch.setattr(doctor, "_ask", lambda code: (None, "ImportError: libc10.so"))
    assert doctor.main() == 1


def test_a_python_without_build_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are tried all the same: a wheel serves every Python."""
    torch_is = {"version": "2.13.0", "cuda": "13.0", "devices": True}
    hidden = "import sys; sys.modules['tokenflow_ext._build_info'] = None\n"
    ask = doctor._ask
    monkeypatch.setattr(
        doctor, "_ask", lambda code: ask(hidden + code) if "t.nearest" in code else (torch_is, "")
    )
    [_, (state, text), *_] = doctor.examine()
    assert state == LIMITED
    assert f"without build facts for Python {platform.python_version()} (there are facts" in text


def test_errors_of_another_python_are_one_line() -> None:
    value, error = doctor._ask("raise ImportError('first\\nsecond')")
    assert (value, error) == (None, "second")
    assert doctor._ask("import os; os._exit(7)") == (None, "exit code 7")
    assert doctor._ask("print(json.dumps([1, None]))") == ([1, None], "")


@pytest.mark.parametrize(
    ("torch_cuda", "devices", "build", "expected"),
    [
        (None, False, BUILD, []),
        ("13.0", True, {"missing": "no build facts"}, []),
        ("13.0", True, BUILD, ["CUDA tensors are not supported: no nvcc was found"]),
        ("13.0", True, {**BUILD, "cuda": "13.0"}, []),
        (
            "13.0",
            True,
            {**BUILD, "cuda": "12.4"},
            ["nvcc 12.4 and torch has CUDA 13.0"],
        ),
        ("12.8", False, {**BUILD, "cuda": "12.0"}, ["torch sees no CUDA device"]),
    ],
)
def test_cuda(torch_cuda, devices, build, expected) -> None:
    found = doctor.check_cuda({"cuda": torch_cuda, "devices": devices}, build)
    assert len(found) == len(expected)
    for (state, text), part in zip(found, expected, strict=True):
        assert state == LIMITED
        assert part in text


@pytest.mark.parametrize(
    ("torch_version", "requires", "operators", "state", "part"),
    [
        ("2.13.0", ["numpy", "torch==2.13.0"], True, GOOD, "torchvision 0.28.0"),
        ("2.13.0+cpu", ["torch==2.13.0"], False, LIMITED, "another build of torch than 2.13.0+cpu"),
        ("2.13.0+cpu", ["torch==2.13.0"], None, LIMITED, "cannot be imported (RuntimeError: nms)"),
        (
            "2.14.1",
            ["torch (==2.13.0)"],
            False,
            LIMITED,
            "for torch 2.13.0, and this is 2.14.1",
        ),
        ("2.14.1", ["torch>=2.13"], None, LIMITED, "another build of torch than 2.14.1"),
    ],
)
def test_torchvision(torch_version, requires, operators, state, part) -> None:
    found = doctor.check_torchvision(
        torch_version, "0.28.0", requires, operators, "RuntimeError: nms"
    )
    assert found.state == state
    assert part in found.text


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor,
        "_installed",
        {"timm": "1.0.9", "lpips": "0.1.4", "numpy": "2.0", "scipy": "1.11.4"}.get,
    )
    lines = [
        "torch>=2.10",
        'timm>=1.0.12; extra == "models"',
        'lpips>=0.1.4; extra == "models"',
        'tokenflow_ext[models]; extra == "train"',
        "numpy>=2; extra == 'train'",
        'gguf>=0.10; extra == "gguf"',
        'scipy>=1.11.4; extra == "dev"',
    ]
    found = {text.split(":")[0]: (state, text) for state, text in doctor.check_extras(lines)}
    assert found["extra models"][0] == LIMITED
    assert "timm 1.0.9, older than 1.0.12" in found["extra models"][1]
    assert "lpips" not in found["extra models"][1]
    assert found["extra train"][0] == found["extra dev"][0] == GOOD
    assert "no gguf: pip install 'tokenflow_ext[gguf]'" in found["extra gguf"][1]


def test_extras_are_read_from_the_metadata() -> None:
    found = list(doctor.check_extras(importlib.metadata.requires("tokenflow_ext")))
    assert {text.split(":")[0] for _, text in found} >= {"extra models", "extra train", "extra dev"}


def test_it_runs_where_the_package_does_not_load(tmp_path: Path) -> None:
    """As a file, beside a package without its operators: words, no traceback, exit code 1."""
    package = tmp_path / "tokenflow_ext"
    package.mkdir()
    source = Path(tokenflow_ext.__file__).parent
    for path in [*source.glob("*.py"), source / "compat"]:
        (package / path.name).symlink_to(path)
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); import os; "
        "os.environ['PYTHONPATH'] = sys.argv[1]; "
        "runpy.run_path(sys.argv[1] + '/tokenflow_ext/doctor.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "  broken  the compiled operators do not work" in result.stdout
    assert "compiled operators not found at" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
