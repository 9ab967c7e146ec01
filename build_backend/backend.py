"""PEP 517 / PEP 660 back end: setuptools, plus the torch of the environment being installed into.

An isolated build would otherwise download a torch of its own, and build against a torch that never
loads the result. Here torch is asked for only where the target environment has none (or one that is
too old), and the target's ``purelib`` is appended to ``sys.path`` while the wheel is built, so that
the isolated environment's own packages keep precedence.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernel_build import MINIMUM_TORCH, parse_version
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that need no change)
    build_sdist,
    get_requires_for_build_sdist,
)


def environment_paths() -> list[str]:
    """Folders of the environment being installed into that hold packages, without repetition."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    with contextlib.suppress(AttributeError):  # absent under some old virtualenvs
        paths += site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's folder
        paths.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(paths) if os.path.isdir(path)]


def find_torch(paths: Sequence[str]) -> str | None:
    """Version of the torch found in `paths`, or None. Reads metadata only; imports nothing."""
    for distribution in importlib.metadata.distributions(name="torch", path=list(paths)):
        return distribution.version
    return None


def torch_requirement(paths: Sequence[str]) -> list[str]:
    """What the build must download: nothing where `paths` hold a torch that serves."""
    version = find_torch(paths)
    if version is not None and parse_version(version) >= MINIMUM_TORCH:
        return []
    return ["torch>={}.{}".format(*MINIMUM_TORCH)]


@contextlib.contextmanager
def _environment_on_path() -> Iterator[None]:
    added = [path for path in environment_paths() if path not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement(
        environment_paths()
    )


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement(
        environment_paths()
    )


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    # setuptools copies into build/lib and forgets nothing: a module deleted since the last build
    # would still be in the wheel.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    with _environment_on_path():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    with _environment_on_path():
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
