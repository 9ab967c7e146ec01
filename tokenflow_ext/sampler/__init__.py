"""Drawing codes from logits: guidance, top-k, top-p, min-p and the draw in one kernel.

`MultiStepSampler` takes a model through TokenFlow's sampling with it (arXiv 2412.03069, section
3.3), `SamplingLogitsProcessor` transformers' `generate`.

Random numbers are counter-based (Philox 4x32-10): the same seed and offset give the same codes for
any split of a batch, any number of threads, on the CPU and on CUDA. docs/guides/sampling.md has the
definition, the results for inputs that make no sense, and how to use seeds.
"""

from .config import PRESETS, SamplingConfig
from .logits_processor import SamplingLogitsProcessor
from .multi_step import MultiStepSampler, ScaleModel
from .operators import Draw, sample_top_k_top_p

__all__ = [
    "PRESETS",
    "Draw",
    "MultiStepSampler",
    "SamplingConfig",
    "SamplingLogitsProcessor",
    "ScaleModel",
    "sample_top_k_top_p",
]
