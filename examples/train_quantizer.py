"""The quantizer in a training loop: the codebooks learn the features, and the error falls.

    python examples/train_quantizer.py

The features are smooth random fields of 40 channels, mixed from four causes. They stand for an
encoder's. At the end held-out features are read back from more and more of their scales.
"""

import torch
import torch.nn.functional as F

from tokenflow_ext import MultiScaleQuantizer

torch.manual_seed(0)
mixing = torch.randn(4, 40)


def features(count: int) -> torch.Tensor:
    """[count, 40, 8, 8], which vary slowly over the grid."""
    causes = F.interpolate(torch.randn(count, 4, 3, 3), (8, 8), mode="bicubic")
    return torch.einsum("bchw,cd->bdhw", causes, mixing)


quantizer = MultiScaleQuantizer(1024, dims=(32, 8), scales=(1, 2, 4, 8), l2_norm=False)
optimizer = torch.optim.Adam(quantizer.parameters(), lr=2e-2)
for step in range(101):
    out = quantizer(features(16))
    optimizer.zero_grad()
    out.vq_loss.backward()  # with an encoder: (out.vq_loss + out.commitment_loss + ...).backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step:3d}: loss {out.vq_loss:.3f}, codes in use {out.usage.share:.0%}")

quantizer.eval()
h = features(64)
tokens = quantizer.encode(h)  # [64, 85]
for upto in range(1, 5):
    error = (quantizer.decode(tokens, upto) - h).square().mean() / h.square().mean()
    print(f"{sum(quantizer.tokens_per_scale[:upto]):3d} tokens: relative error {error:.3f}")
