"""Names of before: each still works for one version, with a warning that says the new one."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

REMOVED_IN = "0.2.0"
"""The version of tokenflow_ext in which the names of before are gone."""


def warn_renamed(old: str, new: str) -> None:
    """A DeprecationWarning at the caller of the function that calls this."""
    warnings.warn(
        f"{old} is now {new}; the old name goes in tokenflow_ext {REMOVED_IN}",
        DeprecationWarning,
        stacklevel=3,
    )


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module some of whose public names have changed.

        __getattr__ = renamed(__name__, {"Average": "EMA", "load": "tokenflow_ext.models:load"})

    Args:
        module: the module's `__name__`.
        names: the new name of each old one: a name of the same module, or "package.module:name"
            where it has moved. That module is imported when the old name is asked for.

    Returns:
        A function of an attribute's name. For an old name it gives the object under the new one,
        with a DeprecationWarning at the caller. For any other it raises AttributeError.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(":")
        home = home or module
        warn_renamed(f"{module}.{name}", f"{home}.{new}")
        return getattr(importlib.import_module(home), new)

    return __getattr__


class RenamedAttribute:
    """A method or an attribute of a class under its name of before.

        class Model:
            load_released = RenamedAttribute("load_original", aside="unused")

    Args:
        new: the name that it has now.
        keywords: of a method, the new name of each keyword argument that has one.
    """

    def __init__(self, new: str, **keywords: str) -> None:
        self.new, self.keywords = new, keywords

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"
        self.now = f"{owner.__name__}.{self.new}"

    def __get__(self, instance: object | None, owner: type) -> Any:
        warn_renamed(self.old, self.now)
        value = getattr(owner if instance is None else instance, self.new)
        if not self.keywords:
            return value

        @functools.wraps(value)
        def call(*arguments: Any, **named: Any) -> Any:
            return value(*arguments, **{self.keywords.get(k, k): v for k, v in named.items()})

        return call

    def __set__(self, instance: object, value: Any) -> None:
        warn_renamed(self.old, self.now)
        setattr(instance, self.new, value)
