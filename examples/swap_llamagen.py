"""From LlamaGen: its class, constructor and results on the fused search.

    python examples/swap_llamagen.py

The commented import is that of a program beside LlamaGen. In
tokenizer/tokenizer_image/vq_model.py itself, ours takes the place of the class. The indices are
compared with a search in plain PyTorch, through the matrix of all distances.
"""

import torch
import torch.nn.functional as F

# from tokenizer.tokenizer_image.vq_model import VectorQuantizer
from tokenflow_ext.compat.llamagen import VectorQuantizer

torch.manual_seed(0)
quantize = VectorQuantizer(16384, 8, 0.25, 0.0, True, True)
z = torch.randn(2, 8, 24, 16, requires_grad=True)

z_q, (vq_loss, commit_loss, entropy_loss, usage), (_, _, indices) = quantize(z)
(vq_loss + commit_loss + entropy_loss).backward()
print(f"{len(indices)} indices, vq loss {vq_loss:.4f}, codebook usage {usage:.1%}")

rows = F.normalize(z.detach().movedim(1, -1).reshape(-1, 8), dim=-1).double()
codes = F.normalize(quantize.embedding.weight.detach(), dim=-1).double()
same = (torch.cdist(rows, codes).argmin(1) == indices).sum()
print(f"the same as by the matrix of distances: {same} of {len(indices)}")

decoded = quantize.get_codebook_entry(indices, (2, 8, 24, 16))
print(f"decoding the indices gives z_q: {torch.allclose(decoded, z_q, atol=1e-5)}")
