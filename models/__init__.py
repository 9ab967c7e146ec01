"""Models on top of :mod:`tokenflow_ext`: the tokenizer, its losses, teachers and metrics, text to
image and understanding.

Importing this package imports torch alone; timm, transformers, lpips and safetensors are imported
where they are used. Once transformers is imported too, its Auto classes know this package's models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_when_imported
from .serialization.config import CheckpointError, ConfigError
from .text_to_image.model import TextToImage, TextToImageOutput
from .text_to_image.rope import RopeConfig
from .text_to_image.sequence import (
    BackboneConfig,
    NextScaleSequence,
    TextToImageConfig,
    encode_prompts,
)
from .tokenizer.config import PixelConfig, QuantizerConfig, SemanticConfig, TokenizerConfig
from .tokenizer.model import TokenFlowTokenizer, TokenizerOutput
from .torchvision_shim import register
from .towers.config import TowerConfig
from .towers.teachers import WeightsError
from .var.config import VarConfig
from .var.model import VAR, VarOutput

if TYPE_CHECKING:
    from .understanding.build import build_processor, build_understanding
    from .understanding.original_checkpoint import (
        load_released_understanding,
        save_released_understanding,
    )
    from .understanding.push import push_understanding
    from .unified.build import as_text_to_image, build_unified

register()  # before any import of torchvision, on whichever way
register_when_imported()

__all__ = [
    "VAR",
    "BackboneConfig",
    "CheckpointError",
    "ConfigError",
    "NextScaleSequence",
    "PixelConfig",
    "QuantizerConfig",
    "RopeConfig",
    "SemanticConfig",
    "TextToImage",
    "TextToImageConfig",
    "TextToImageOutput",
    "TokenFlowTokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "TowerConfig",
    "VarConfig",
    "VarOutput",
    "WeightsError",
    "as_text_to_image",
    "build_processor",
    "build_understanding",
    "build_unified",
    "encode_prompts",
    "load_released_understanding",
    "push_understanding",
    "save_released_understanding",
]

# They need transformers, which takes seconds to import.
_LATER = {
    "as_text_to_image": "unified.build",
    "build_processor": "understanding.build",
    "build_understanding": "understanding.build",
    "build_unified": "unified.build",
    "load_released_understanding": "understanding.original_checkpoint",
    "push_understanding": "understanding.push",
    "save_released_understanding": "understanding.original_checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
