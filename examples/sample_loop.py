"""The sampler in a generate loop of your own, with guidance and a seed for each request.

    python examples/sample_loop.py

The model is a small Llama with random weights. A row's tokens hang on its own seed, so that
a request gets the same image alone and in a batch.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenflow_ext import sample_top_k_top_p

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=1024, num_attention_heads=4, initializer_range=0.2, **shape)
model = LlamaForCausalLM(config).eval()


@torch.no_grad()
def generate(classes: list[int], seeds: list[int]) -> torch.Tensor:
    """Tokens [B, 16]. Class 0 is the unconditional one."""
    settings = {"guidance": 2.0, "top_k": 600, "top_p": 0.9, "seed": torch.tensor(seeds)}
    ids, cache, tokens = torch.tensor(classes + [0] * len(classes))[:, None], None, []
    for position in range(16):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cond, uncond = out.logits[:, -1].chunk(2)
        tokens.append(sample_top_k_top_p(cond, uncond=uncond, offset=position, **settings))
        ids, cache = tokens[-1].repeat(2)[:, None], out.past_key_values
    return torch.stack(tokens, dim=1)


batch = generate([7, 8, 9], seeds=[10, 11, 12])
print(*batch.tolist(), sep="\n")
alone = generate([8], seeds=[11])
print(f"the second row alone gets the same tokens: {torch.equal(alone, batch[1:2])}")
