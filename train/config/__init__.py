"""Configuration of a training run: dataclasses, YAML files and dotted command-line overrides.

A configuration is made in this order, later wins: the defaults of the classes, the preset of the
model, the YAML file, the command line (``optim.lr=3e-4`` or ``--optim.lr 3e-4``). An unknown key
and a value of the wrong type are errors that name the key.
"""

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization.config import ConfigError

from .checks import leaves
from .decoder import DecoderConfig
from .reading import (
    Config,
    from_yaml,
    load_config,
    load_decoder_config,
    load_text_config,
    load_understanding_config,
    load_unified_config,
    load_var_config,
    parse_overrides,
    to_yaml,
)
from .sections import DataConfig, OptimConfig, OutputConfig, PixelLossConfig
from .text_to_image import CaptionConfig, TextConfig, TextModelConfig, TextOptimConfig
from .tokenizer import CodebookConfig, LossConfig, PartRates, TokenizerOptimConfig, TrainConfig
from .understanding import (
    ConversationConfig,
    LoraConfig,
    UnderstandingConfig,
    UnderstandingModelConfig,
)
from .unified import UnifiedConfig, UnifiedModelConfig
from .var import LabelConfig, VarModelConfig, VarOptimConfig, VarTrainConfig

__all__ = [
    "CaptionConfig",
    "CodebookConfig",
    "Config",
    "ConfigError",
    "ConversationConfig",
    "DataConfig",
    "DecoderConfig",
    "LabelConfig",
    "LoraConfig",
    "LossConfig",
    "OptimConfig",
    "OutputConfig",
    "PartRates",
    "PixelLossConfig",
    "TextConfig",
    "TextModelConfig",
    "TextOptimConfig",
    "TokenizerOptimConfig",
    "TrainConfig",
    "UnderstandingConfig",
    "UnderstandingModelConfig",
    "UnifiedConfig",
    "UnifiedModelConfig",
    "VarModelConfig",
    "VarOptimConfig",
    "VarTrainConfig",
    "from_yaml",
    "leaves",
    "load_config",
    "load_decoder_config",
    "load_text_config",
    "load_understanding_config",
    "load_unified_config",
    "load_var_config",
    "parse_overrides",
    "to_yaml",
]

__getattr__ = renamed(__name__, {"SampleConfig": "tokenflow_ext.sampler:SamplingConfig"})
