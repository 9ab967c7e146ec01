"""Models on top of :mod:`tokenflow_ext`: the tokenizer, its losses, teachers and metrics.

Importing this package imports torch alone; open_clip, timm, transformers, lpips and safetensors are
imported where they are used.
"""

from tokenflow_ext.models.config import (
    ConfigError,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenizerConfig,
    TowerConfig,
)
from tokenflow_ext.models.teachers import WeightsError
from tokenflow_ext.models.tokenizer import CheckpointError, TokenFlowTokenizer, TokenizerOutput

__all__ = [
    "CheckpointError",
    "ConfigError",
    "PixelConfig",
    "QuantizerConfig",
    "SemanticConfig",
    "TokenFlowTokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "TowerConfig",
    "WeightsError",
]
