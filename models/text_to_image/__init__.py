"""Text to image: a language model that predicts the tokenizer's tokens scale by scale."""

from .model import NEGATIVE_PROMPT, TextToImage, TextToImageOutput
from .rope import RopeConfig
from .sequence import BackboneConfig, NextScaleSequence, TextToImageConfig, encode_prompts

__all__ = [
    "NEGATIVE_PROMPT",
    "BackboneConfig",
    "NextScaleSequence",
    "RopeConfig",
    "TextToImage",
    "TextToImageConfig",
    "TextToImageOutput",
    "encode_prompts",
]
