"""Import torchvision where its compiled operators do not load.

A torchvision wheel whose operators were built for another torch still has usable Python code
(models, transforms), but importing it stops at ``operator torchvision::nms does not exist``, and
with it lpips, timm and open_clip. Declaring the two schemas it asks for lets the import through;
calling those operators stays an error. Where the operators load, nothing is declared.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# The library object owns the declarations: they vanish when it is collected.
_library: torch.library.Library | None = None


def operators_load() -> bool:
    """Whether the installed torchvision's compiled operators can be loaded by this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.is_file():
            try:
                torch.ops.load_library(str(path))
            except OSError:
                return False
            return hasattr(torch.ops.torchvision, "nms")
    return False


def ensure_torchvision() -> bool:
    """Make ``import torchvision`` work; call before importing it, lpips, timm or open_clip.

    Returns:
        Whether schemas had to be declared. False too where torchvision is not installed or is
        imported already.
    """
    global _library
    if _library is not None:
        return True
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    if operators_load():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _library = library
    return True
