"""Models on top of :mod:`tokenflow_ext`: the tokenizer, its losses, teachers and metrics, and text
to image.

Importing this package imports torch alone; timm, transformers, lpips and safetensors are imported
where they are used.
"""

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

register()  # before any import of torchvision, on whichever way

__all__ = [
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
    "WeightsError",
    "encode_prompts",
]
