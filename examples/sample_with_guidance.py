"""One draw from logits: classifier-free guidance, top-k, top-p and seeds.

    python examples/sample_with_guidance.py

A toy model of 4,096 codes prefers the first 64 a little. Guidance turns that preference up.
"""

import torch

from tokenflow_ext import sample_top_k_top_p

torch.manual_seed(0)
uncond = torch.randn(4096).repeat(2000, 1)
cond = uncond.clone()
cond[:, :64] += 1.5

for guidance in (0.0, 1.0, 2.0, 4.0):
    tokens = sample_top_k_top_p(
        cond, uncond=uncond, guidance=guidance, top_k=1200, top_p=0.8, seed=0
    )
    share = (tokens < 64).float().mean()
    print(f"guidance {guidance:.0f}: {share:.1%} of the tokens are among the first 64")

whole = sample_top_k_top_p(cond, top_p=0.8, seed=1)
halves = [sample_top_k_top_p(cond[i : i + 1000], top_p=0.8, seed=1, offset=i) for i in (0, 1000)]
print(f"the same tokens from two half batches: {torch.equal(whole, torch.cat(halves))}")
