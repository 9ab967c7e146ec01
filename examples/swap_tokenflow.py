"""From TokenFlow: its class, constructor and results, and its loop over scales as one call.

    python examples/swap_tokenflow.py

The commented import is that of a program beside TokenFlow. In tokenflow/tokenizer/vq_model.py
itself, ours takes the place of the class.
"""

import torch

# from tokenflow.tokenizer.vq_model import VectorQuantizer
from tokenflow_ext.compat import VectorQuantizer

torch.manual_seed(0)
scales = [1, 2, 4, 6, 8, 10, 12, 14]
quantize = VectorQuantizer(8192, 40, 0.25, 0.0, True, True, split=[32, 8])
h = torch.randn(2, 40, 14, 14, requires_grad=True)

z_q, losses, (_, _, indices) = quantize(h)  # one scale
print(f"one map: {tuple(z_q.shape)}, {len(indices)} indices, commitment loss {losses[1]:.4f}")

f_hat, losses, indices = quantize.encode_scales(h, scales)  # the loop of TokenFlow.encode
(losses[0] + losses[1]).backward()
decoded = quantize.decode_scales(indices, scales)
print(f"all scales: {tuple(indices.shape)} indices, codebook usage {losses[3]:.1%}")
print(f"decoding the indices gives f_hat: {torch.allclose(decoded, f_hat, atol=1e-5)}")
