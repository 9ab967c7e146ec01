"""Modules by the names that they had before they moved, for one version.

A program that says ``from tokenflow_ext.models.released import read`` gets the module that has this
function now, and a DeprecationWarning, once a process, that names it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ._deprecated import REMOVED_IN

# By folder: where its modules of before are now, several where a module was split.
_NOW: dict[str, dict[str, tuple[str, ...]]] = {
    "models": {
        "config": ("tokenizer.config", "towers.config", "serialization.config"),
        "discriminators": ("losses.discriminators",),
        "files": ("serialization.files",),
        "released": ("tokenizer.original_checkpoint",),
        "saved": ("serialization.pretrained",),
        "semantic": ("towers.towers", "tokenizer.semantic_decoder"),
        "teachers": ("towers.teachers",),
        "text_to_image_backbone": ("text_to_image.backbone",),
        "text_to_image_generation": ("text_to_image.generation",),
        "text_to_image_released": ("text_to_image.original_checkpoint",),
        "text_to_image_rope": ("text_to_image.rope",),
        "text_to_image_sequence": ("text_to_image.sequence",),
        "vision": ("towers.networks",),
        "vqgan": ("tokenizer.vqgan",),
    },
    "train": {
        "analyse": ("evaluation.analyse",),
        "captions": ("data.captions",),
        "checkpoint": ("engine.checkpoint",),
        "decoder_trainer": ("tasks.decoder",),
        "distributed": ("engine.distributed",),
        "emojis": ("data.emojis",),
        "entry": ("cli.entry",),
        "evaluate": ("evaluation.evaluate",),
        "fid": ("evaluation.fid",),
        "generate": ("cli.image_generator", "tasks.image_generator"),
        "images": ("data.images",),
        "language": ("tasks.language",),
        "logs": ("engine.logs",),
        "loop": ("engine.loop",),
        "messages": ("engine.messages",),
        "outputs": ("data.outputs",),
        "parallel": ("engine.parallel",),
        "pictures": ("data.image_files",),
        "reading": ("data.text_files",),
        "runs": ("engine.runs",),
        "shards": ("data.webdataset",),
        "text_trainer": ("tasks.text_to_image",),
        "tokens": ("data.tokens",),
        "trainer": ("tasks.tokenizer",),
    },
}

#: Old name -> new names.
MOVED: dict[str, tuple[str, ...]] = {
    f"tokenflow_ext.{folder}.{old}": tuple(f"tokenflow_ext.{folder}.{name}" for name in new)
    for folder, moves in _NOW.items()
    for old, new in moves.items()
}


class _Loader(importlib.abc.Loader):
    """Puts what has moved in the place of the module that is asked for."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        new = MOVED[name]
        warnings.warn(
            f"{name} has moved to {' and '.join(new)}; the old name goes in tokenflow_ext "
            f"{REMOVED_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        found = [importlib.import_module(each) for each in new]
        if len(found) == 1:
            sys.modules[name] = found[0]  # the import system takes what stands here
            return

        def lookup(attribute: str) -> Any:
            for each in found:
                if hasattr(each, attribute):
                    return getattr(each, attribute)
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

        module.__getattr__ = lookup  # type: ignore[method-assign]


class _Finder(importlib.abc.MetaPathFinder):
    """Asked after all others: a module that exists is never replaced."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader())


def install() -> None:
    """Let the old names be imported; again in the same process, nothing more happens."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
