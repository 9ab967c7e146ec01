"""The package's exceptions: one base, in one module, beside the builtin bases of before."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import tokenflow_ext
from tokenflow_ext import errors, models
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.towers.towers import MissingPackageError
from tokenflow_ext.train.data import image_files, text_files
from tokenflow_ext.train.engine import loop
from tokenflow_ext.train.engine.messages import ending_in_one_line

ROOT = Path(__file__).resolve().parents[1]
BUILTIN = {
    errors.KernelsMissingError: ImportError,
    errors.BuildFactsMissingError: ImportError,
    errors.InstructionSetError: RuntimeError,
    errors.ConfigError: ValueError,
    errors.CheckpointError: RuntimeError,
    errors.WeightsError: RuntimeError,
    errors.MissingPackageError: ImportError,
    errors.OutputError: RuntimeError,
    errors.NotFiniteError: FloatingPointError,
    errors.DataError: RuntimeError,
    errors.BrokenImageError: RuntimeError,
}


@pytest.mark.parametrize("error", BUILTIN, ids=lambda error: error.__name__)
def test_each_has_the_base_and_a_builtin_one(error: type[Exception]) -> None:
    assert issubclass(error, tokenflow_ext.TokenFlowError)
    assert issubclass(error, BUILTIN[error])
    # A worker process hands its error over.
    again = pickle.loads(pickle.dumps(error("what")))
    assert type(again) is error
    assert str(again) == "what"


def test_they_are_where_they_were() -> None:
    assert models.ConfigError is errors.ConfigError
    assert models.CheckpointError is errors.CheckpointError
    assert models.WeightsError is errors.WeightsError
    assert OutputError is errors.OutputError
    assert MissingPackageError is errors.MissingPackageError
    assert loop.NotFiniteError is errors.NotFiniteError
    assert text_files.DataError is errors.DataError
    assert image_files.BrokenImageError is errors.BrokenImageError


def defined_elsewhere() -> set[str]:
    """Exceptions that a module of the package defines, but `errors`."""
    found = set()
    for folder in ("tokenflow_ext", "models", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "tokenflow_ext" / "errors.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    if any(base.endswith(("Error", "Exception")) for base in bases):
                        found.add(f"{path.stem}.{node.name}")
    return found


def test_no_other_module_defines_one() -> None:
    # The signal's, which nobody is to catch.
    assert defined_elsewhere() == {"messages._Terminated"}


@pytest.mark.parametrize("error", BUILTIN, ids=lambda error: error.__name__)
def test_a_command_ends_with_one_line(error: type[Exception]) -> None:
    with pytest.raises(SystemExit) as end, ending_in_one_line():
        raise error("this file\nis it")
    assert str(end.value) == "error: this file is it"


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"), ending_in_one_line():
        raise ValueError("a bug")
