"""Makes this package's models known to transformers.

``AutoConfig``, ``AutoModel`` and ``AutoImageProcessor`` find them once both packages are imported,
in whichever order. Importing transformers takes seconds, so this package does not do it by itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_PACKAGE = "transformers"
_CLASSES = {  # what has to be there, by module
    f"{__package__}.understanding.vision": "TokenFlowVisionModel",
    f"{__package__}.understanding.pixels": "TokenFlowImageProcessor",
    f"{__package__}.unified.language_model": "TokenFlowForCausalLM",
}


def register() -> None:
    """Registers now what transformers' Auto classes have to know. Imports transformers.

    Where this is called while one of our modules is being imported, as happens when that import is
    the first of transformers, nothing is done: the module calls again at its end.
    """
    for name in _CLASSES:
        if name not in sys.modules:
            importlib.import_module(name)
    modules = [sys.modules[name] for name in _CLASSES]
    if not all(map(hasattr, modules, _CLASSES.values())):
        return
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

    vision, pixels, text = modules
    for config, model in (
        (vision.TokenFlowVisionConfig, vision.TokenFlowVisionModel),
        (text.TokenFlowTextConfig, text.TokenFlowTextModel),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(
        text.TokenFlowTextConfig, text.TokenFlowForCausalLM, exist_ok=True
    )
    AutoImageProcessor.register(
        vision.TokenFlowVisionConfig,
        slow_image_processor_class=pixels.TokenFlowImageProcessor,
        exist_ok=True,
    )


class _WhenImported(MetaPathFinder):
    """Registers as soon as somebody imports transformers."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PACKAGE or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers now where transformers is imported already, else right after its import."""
    if _PACKAGE in sys.modules:
        register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
