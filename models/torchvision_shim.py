"""Import torchvision where its compiled operators do not load.

A torchvision wheel whose operators were built for another torch still has usable Python code
(models, transforms), but importing it stops at ``operator torchvision::nms does not exist``, and
with it lpips, timm, open_clip and parts of transformers. Declaring the two schemas it asks for lets
the import through; calling those operators stays an error. Where the operators load, nothing is
declared: a second declaration would end the process.

``tokenflow_ext.models`` calls :func:`register`, so that every import after it goes through. Run as
a program, this file does the same for a whole environment; see :func:`install`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_PRIVATE_NAME = "_torchvision_shim"
# The library objects own the declarations: they vanish when these are collected.
_libraries: list[Any] = []


class _Loader(importlib.abc.Loader):
    """torchvision's own loader, and once more with the operators declared where it stops."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.inner
        # Its versions keep the operators in different files, so the import itself has to tell.
        try:
            self.inner.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            _declare()
            self.inner.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _declare() -> None:
    import torch  # not before: this module may be loaded at the start of every Python

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _libraries.append(library)


def register() -> None:
    """From now on ``import torchvision`` works in this process, with its operators or without.

    Imports nothing, and changes nothing where torchvision is imported already; a second call does
    nothing.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def ensure_torchvision() -> bool:
    """Import torchvision, where it is installed, declaring its operators if that is what it takes.

    Returns:
        Whether schemas had to be declared.
    """
    register()
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision")
    return bool(_libraries)


def operators_load() -> bool:
    """Whether the imported torchvision can compute: its operators are there, not only declared."""
    import torch
    from torchvision.ops import nms

    try:
        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def install(folder: Path) -> list[Path]:
    """Makes every Python of an environment call :func:`register` as it starts, so that timm, lpips
    and others can be imported in it without importing this package first.

    Args:
        folder: the environment's site-packages.

    Returns:
        The two files written: a copy of this one, and the ``.pth`` file that loads it.
    """
    module, start = folder / f"{_PRIVATE_NAME}.py", folder / f"{_PRIVATE_NAME}.pth"
    module.write_bytes(Path(__file__).read_bytes())
    start.write_text(f"import {_PRIVATE_NAME}; {_PRIVATE_NAME}.register()\n")
    return [module, start]


if __name__ == "__main__":
    ensure_torchvision()
    if "torchvision" in sys.modules and not operators_load():
        made = install(Path(sysconfig.get_path("purelib")))
        print(
            "torchvision's operators do not load beside this torch: its other parts can be "
            f"imported by way of {' and '.join(map(str, made))}"
        )
