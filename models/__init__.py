"""Models on top of :mod:`tokenflow_ext`: the tokenizer, its losses, teachers and metrics, and text
to image.

Importing this package imports torch alone; timm, transformers, lpips and safetensors are imported
where they are used.
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
from tokenflow_ext.models.text_to_image import TextToImage, TextToImageOutput
from tokenflow_ext.models.text_to_image_rope import RopeConfig
from tokenflow_ext.models.text_to_image_sequence import (
    BackboneConfig,
    NextScaleSequence,
    TextToImageConfig,
    encode_prompts,
)
from tokenflow_ext.models.tokenizer import CheckpointError, TokenFlowTokenizer, TokenizerOutput
from tokenflow_ext.models.torchvision_shim import register

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
