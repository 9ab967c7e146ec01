"""TokenFlow's quantizer on fused C++ and CUDA kernels.

`MultiScaleQuantizer` and `MultiStepSampler` are what people use. `Quantizer` is the whole family of
quantizers, made of `Table`, `Projected`, `Signs` and `Levels`, with `presets` by name. `ops` and
`scalar` have the operators, `sampler` draws tokens from logits, `reference` is the same mathematics
in plain PyTorch, `compat` has classes that stand in for other libraries' quantizers.
`tokenflow_ext.models` and `tokenflow_ext.train` hold the tokenizer and its training; they need the
extras `models` and `train`.
"""

from . import _moved
from ._build import build_info
from .codes import Entropy, Levels, Projected, Signs, Table
from .errors import TokenFlowError
from .family import Quantizer, QuantizerResult
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


def __getattr__(name: str) -> str:
    """``__version__``, which the package's metadata say."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("tokenflow_ext")


__all__ = [
    "CodebookUsage",
    "Draw",
    "Entropy",
    "Levels",
    "MultiScaleQuantizer",
    "MultiStepSampler",
    "Projected",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerResult",
    "SamplingConfig",
    "SamplingLogitsProcessor",
    "Signs",
    "Table",
    "TokenFlowError",
    "build_info",
    "nearest_code",
    "sample_code",
    "sample_top_k_top_p",
    "segment_sum",
]
