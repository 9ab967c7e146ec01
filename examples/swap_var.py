"""From VAR: its multi-scale quantizer, with the input of the transformer by teacher forcing.

    python examples/swap_var.py

The commented import is what a program of VAR has. Only that line changes.
"""

import torch

# from models.quant import VectorQuantizer2
from tokenflow_ext.compat import VectorQuantizer2

torch.manual_seed(0)
sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
quantize = VectorQuantizer2(4096, 32, using_znorm=False, beta=0.25, v_patch_nums=sides)
f = torch.randn(2, 32, 16, 16, requires_grad=True)

f_hat, usages, vq_loss = quantize(f, ret_usages=True)
vq_loss.backward()
print(f"vq loss {vq_loss:.4f}, codes in use at each scale (%): {[round(u, 1) for u in usages]}")

tokens = quantize.f_to_idxBl_or_fhat(f, to_fhat=False)  # a tensor [2, s * s] for each scale
inputs = quantize.idxBl_to_var_input(tokens)
print(f"{sum(t.shape[1] for t in tokens)} tokens, input of the transformer {tuple(inputs.shape)}")

codes = [quantize.embedding(t).mT.unflatten(2, (s, s)) for t, s in zip(tokens, sides, strict=True)]
decoded = quantize.embed_to_fhat(codes, last_one=True)
print(f"decoding the tokens gives f_hat: {torch.allclose(decoded, f_hat, atol=1e-4)}")
