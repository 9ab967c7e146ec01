"""The sampler in the `generate` of transformers, as a logits processor.

    python examples/sample_generate.py

The model is a small Llama with random weights. Its words are ids 0 to 99, its
image tokens 100 to 1,123.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenflow_ext import SamplingLogitsProcessor

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=1124, num_attention_heads=4, eos_token_id=None, **shape)
model = LlamaForCausalLM(config).eval()

prompt = torch.tensor([[1, 5, 9], [1, 5, 9]])
drawn = []
for seed in (0, 0, 1):
    processor = SamplingLogitsProcessor(top_k=600, top_p=0.9, vocab=(100, 1124), seed=seed)
    # top_k=0: without it generate has a top-k of 50 of its own.
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0}
    out = model.generate(prompt, logits_processor=[processor], **settings)
    drawn.append(out[:, prompt.shape[1] :] - 100)
    print(f"seed {seed}: {drawn[-1][0].tolist()}")
print(f"the same seed gives the same tokens: {torch.equal(drawn[0], drawn[1])}")
