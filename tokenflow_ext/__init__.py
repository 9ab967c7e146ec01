"""TokenFlow's quantizer on fused C++ and CUDA kernels.

`MultiScaleQuantizer` is the module people use; `ops` has the operators under it, `reference` the
same mathematics in plain PyTorch, `compat` classes that stand in for other libraries' quantizers.
`tokenflow_ext.models` and `tokenflow_ext.train` hold the tokenizer and its training; they need the
extras `models` and `train`.
"""

from tokenflow_ext._build import build_info
from tokenflow_ext.ops import nearest_code, segment_sum
from tokenflow_ext.quantizer import CodebookUsage, MultiScaleQuantizer, QuantizerOutput

__all__ = [
    "CodebookUsage",
    "MultiScaleQuantizer",
    "QuantizerOutput",
    "build_info",
    "nearest_code",
    "segment_sum",
]
