"""Loading of the compiled operators, and what is known about their build."""

from __future__ import annotations

import importlib
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .errors import BuildFactsMissingError as BuildFactsMissingError
from .errors import InstructionSetError as InstructionSetError
from .errors import KernelsMissingError as KernelsMissingError

MINIMUM_TORCH = (2, 10)
LIBRARY = Path(__file__).with_name("libtokenflow_ops.so")

_HOW_TO_BUILD = (
    "Build them with `pip install .` (or `pip install -e .`) in a clone of the repository, with a "
    "C++ compiler on PATH; `pip install -v .` shows what is decided and why."
)


def _check_torch(version: str) -> None:
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < MINIMUM_TORCH:
        wanted = "{}.{}".format(*MINIMUM_TORCH)
        raise KernelsMissingError(
            f"torch {version} is too old for tokenflow_ext: it needs {wanted} or later. "
            f"Fix: pip install --upgrade 'torch>={wanted}'"
        )


def load_library() -> None:
    """Loads the operator library into torch; a second call does nothing.

    Raises:
        KernelsMissingError: torch is too old, the file is missing, or it does not load.
    """
    _check_torch(torch.__version__)
    if not LIBRARY.is_file():
        raise KernelsMissingError(f"compiled operators not found at {LIBRARY}. {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = error.__cause__ or error  # torch's own message leaves the loader's out
        hint = ""
        if torch.version.cuda is None and "libtorch_cuda" in str(reason):
            hint = (
                f"They were built with CUDA, and torch {torch.__version__} has none: "
                "build them again beside this torch. "
            )
        raise KernelsMissingError(
            f"compiled operators at {LIBRARY} cannot be loaded: {reason}. {hint}{_HOW_TO_BUILD}"
        ) from error


def _pythons_with_facts() -> str:
    """The versions of Python that the module of build facts is there for: "3.11, 3.12"."""
    names = [path.name for path in LIBRARY.parent.glob("_build_info.cpython-*.so")]
    found = [match for name in names if (match := re.search(r"cpython-(\d)(\d+t?)-", name))]
    found.sort(key=lambda match: (match[1], len(match[2]), match[2]))
    return ", ".join(f"{match[1]}.{match[2]}" for match in found) or "none"


def build_info() -> dict[str, Any]:
    """Facts about the build and about where it runs.

    Returns:
        A dictionary with `version`, `torch` (built with) and `torch_running`, `cuda` (the toolkit's
        version, None for a build without CUDA), `cuda_architectures` (a list such as
        ["8.0+PTX", "9.0a"]), `cuda_reason` (why CUDA was or was not built), `compiler`,
        `cpu_instruction_set` (the one in use on this machine) and `library` (a path).

    Raises:
        KernelsMissingError: the package was not built.
        BuildFactsMissingError: it was built, but without the facts' module for this Python.
        InstructionSetError: TOKENFLOW_CPU asks for what this machine does not run.
    """
    try:
        module = importlib.import_module("tokenflow_ext._build_info")
    except ImportError as error:
        if not LIBRARY.is_file():
            raise KernelsMissingError(f"no build facts: {error}. {_HOW_TO_BUILD}") from error
        raise BuildFactsMissingError(
            f"the operators were built without build facts for Python {platform.python_version()} "
            f"(there are facts for {_pythons_with_facts()}): build_info() does not work, all else "
            f"does. A wheel that was built beside this Python has them"
        ) from error
    try:
        facts = module.facts()
    except RuntimeError as error:
        raise InstructionSetError(str(error)) from None
    return {**facts, "torch_running": torch.__version__, "library": str(LIBRARY)}
