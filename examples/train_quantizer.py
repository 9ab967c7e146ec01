"""The quantizer in a training loop: the codebooks learn the features, and the error falls.

    python examples/train_quantizer.py

The features are smooth random fields of 40 channels, mixed from four causes. They stand for an
encoder's.
"""

import torch
import torch.nn.functional as F

from tokenflow_ext import MultiScaleQuantizer

torch.manual_seed(0)
mixing = torch.randn(4, 40)
quantizer = MultiScaleQuantizer(1024, dims=(32, 8), scales=(1, 2, 4, 8), l2_norm=False)
optimizer = torch.optim.Adam(quantizer.parameters(), lr=2e-2)
for step in range(101):
    causes = F.interpolate(torch.randn(16, 4, 3, 3), (8, 8), mode="bicubic")
    h = torch.einsum("bchw,cd->bdhw", causes, mixing)  # [16, 40, 8, 8]
    out = quantizer(h)
    optimizer.zero_grad()
    out.vq_loss.backward()  # with an encoder: (out.vq_loss + out.commitment_loss + ...).backward()
    optimizer.step()
    if step % 25 == 0:
        error = (out.quantized - h).square().mean() / h.square().mean()
        print(f"step {step:3d}: relative error {error:.3f}, codes in use {out.usage.share:.0%}")
