"""Sampling a next-scale model: TokenFlow's refinement steps as a loop over scales.

    python examples/sample_scales.py

Each scale but the first is drawn three times, and the model is given the last draw. The toy model
prefers the codes that it was given.
"""

import torch
import torch.nn.functional as F

from tokenflow_ext import MultiStepSampler

torch.manual_seed(0)
scales, codes = (1, 2, 4, 8), 512
table = torch.randn(64, codes)


def model(scale: int, drawn: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, s * s, 512] with a condition and without one."""
    uncond = table[: scales[scale] ** 2].expand(2, -1, -1)
    return uncond + (0 if drawn is None else 2 * F.one_hot(drawn, codes)), uncond


sampler = MultiStepSampler.preset("three", scales=scales, guidance=4.0)
for side, tokens in zip(scales, sampler.sample(model, seed=0), strict=True):
    distinct = len(tokens.unique())
    print(f"{side} x {side}: tokens {tuple(tokens.shape)}, {distinct} different codes")
print(f"the model was asked {sampler.model_runs} times")
