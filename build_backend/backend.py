"""PEP 517 / PEP 660 back end: setuptools, plus the torch of the environment being installed into.

An isolated build would otherwise download a torch of its own, and build against a torch that never
loads the result. Here torch is asked for only where the target environment has none (or one that is
too old), and the target's packages are appended to ``sys.path`` while the wheel is built, so that
the isolated environment's own packages keep precedence. Every hook runs in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import site
import sys
from pathlib import Path
from typing import Any

from kernel_build import MINIMUM_TORCH, parse_version
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def environment_paths() -> list[str]:
    """Folders of the environment being installed into that hold packages."""
    # A virtual environment does not see the user's folder.
    user = [site.getusersitepackages()] if sys.prefix == sys.base_prefix else []
    return [path for path in site.getsitepackages() + user if os.path.isdir(path)]


def requirements(paths: list[str]) -> list[str]:
    """What the build must download: torch and ninja, each where none is there that serves."""
    # Metadata alone is read; torch is not imported.
    found = [x.version for x in importlib.metadata.distributions(name="torch", path=paths)]
    torch = [] if found and parse_version(found[0]) >= MINIMUM_TORCH else ["torch>=2.10"]
    return torch + ([] if shutil.which("ninja") else ["ninja"])


def get_requires_for_build_wheel(settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(settings) + requirements(environment_paths())


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(directory: str, *arguments: Any, **options: Any) -> str:
    # setuptools copies into build/lib and forgets nothing: a module deleted since the last build
    # would still be in the wheel.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    sys.path += environment_paths()
    return build_meta.build_wheel(directory, *arguments, **options)


def build_editable(directory: str, *arguments: Any, **options: Any) -> str:
    sys.path += environment_paths()
    return build_meta.build_editable(directory, *arguments, **options)
