"""The image tokenizer: its configuration, its networks, and the checkpoints of its authors."""

from tokenflow_ext.models.serialization.config import CheckpointError

from .config import PixelConfig, QuantizerConfig, SemanticConfig, TokenizerConfig
from .model import PARTS, TokenFlowTokenizer, TokenizerOutput

__all__ = [
    "PARTS",
    "CheckpointError",
    "PixelConfig",
    "QuantizerConfig",
    "SemanticConfig",
    "TokenFlowTokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
]
