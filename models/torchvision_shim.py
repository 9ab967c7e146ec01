"""Import torchvision where its compiled operators do not load.

A torchvision wheel whose operators were built for another torch still has usable Python code
(models, transforms), but importing it stops at ``operator torchvision::nms does not exist``, and
with it lpips, timm and open_clip. Declaring the two schemas it asks for lets the import through;
calling those operators stays an error. Where the operators load, nothing is declared: a second
declaration would end the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# The library object owns the declarations: they vanish when it is collected.
_library: torch.library.Library | None = None


def ensure_torchvision() -> bool:
    """Import torchvision, declaring its operators if that is what it takes; call before importing
    it, lpips, timm or open_clip.

    Returns:
        Whether schemas had to be declared. False too where torchvision is not installed or is
        imported already.
    """
    global _library
    if _library is not None:
        return True
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    # Its versions keep the operators in different files, so the import itself has to tell.
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _library = library
    importlib.import_module("torchvision")
    return True
