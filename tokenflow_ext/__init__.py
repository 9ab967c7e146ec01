"""TokenFlow's quantizer on fused C++ and CUDA kernels.

`MultiScaleQuantizer` and `MultiStepSampler` are what people use; `ops` has the quantizer's
operators, `sampler` draws tokens from logits, `reference` is the same mathematics in plain PyTorch,
`compat` has classes that stand in for other libraries' quantizers.
`tokenflow_ext.models` and `tokenflow_ext.train` hold the tokenizer and its training; they need the
extras `models` and `train`.
"""

from . import _moved
from ._build import build_info
from .errors import TokenFlowError
from .ops import nearest_code, segment_sum
from .quantizer import CodebookUsage, MultiScaleQuantizer, QuantizerOutput
from .sampler import (
    Draw,
    MultiStepSampler,
    SamplingConfig,
    SamplingLogitsProcessor,
    sample_top_k_top_p,
)
from .stochastic import sample_code

_moved.install()

__all__ = [
    "CodebookUsage",
    "Draw",
    "MultiScaleQuantizer",
    "MultiStepSampler",
    "QuantizerOutput",
    "SamplingConfig",
    "SamplingLogitsProcessor",
    "TokenFlowError",
    "build_info",
    "nearest_code",
    "sample_code",
    "sample_top_k_top_p",
    "segment_sum",
]
