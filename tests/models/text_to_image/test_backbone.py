"""The transformer's parts, in Llama's own order, against transformers' whole models."""

import pytest
import torch
from torch import nn

from tokenflow_ext.models import BackboneConfig, TextToImageConfig
from tokenflow_ext.models.text_to_image.backbone import Backbone, rotary
from tokenflow_ext.models.text_to_image.rope import RopeConfig

VARIANTS = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "qwen2": {"family": "qwen2", "hidden_act": "relu", "num_key_value_heads": 1},
    "qwen3": {"family": "qwen3", "head_dim": 12, "attention_bias": True, "rms_norm_eps": 0.1},
    "scaled": {"rope": RopeConfig("dynamic", factor=2.0), "hidden_act": "gelu_pytorch_tanh"},
    "far": {"rope_theta": 33.0, "num_key_value_heads": 0, "hidden_act": "swish"},
}


def backbone(config, vocabulary):
    """With a vocabulary of that size in all."""
    return Backbone(TextToImageConfig(config, vocabulary - 2, 1, 6, (1, 2), 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model_of_transformers(variant):
    from transformers import AutoModel

    shape = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "initializer_range": 0.3,
    }
    config = BackboneConfig(**{**shape, **VARIANTS[variant]})
    torch.manual_seed(0)
    theirs = AutoModel.from_config(config.to_transformers(50)).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.uniform_(0.5, 1.5)
    ours = backbone(config, 50)
    for layer in ours.layers:  # theirs has no such norms, but for Qwen3's
        if layer.self_attn.qknorm is not None:
            layer.self_attn.qknorm = nn.ModuleDict(
                {"query_norm": nn.Identity(), "key_norm": nn.Identity()}
            )
    found = ours.load_state_dict(theirs.state_dict(), strict=False)  # every name is the same
    assert not found.unexpected_keys
    parts = {key.split(".")[0] for key in found.missing_keys}
    assert parts == {"mm_projector", "lvl_embed", "pos_1LC"}  # of images
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
        x = ours.embed_tokens(ids)
        turns = rotary(config, 13, x)
        causal = torch.ones(13, 13, dtype=torch.bool).tril()
        for layer in ours.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), turns, causal)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        torch.testing.assert_close(ours.norm(x), expected, rtol=1e-4, atol=1e-4)


def test_groups_with_and_without_a_mask():
    """Both ways through torch's attention give the same."""
    config = BackboneConfig(
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    attention = backbone(config, 4).layers[0].self_attn.double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    turns = rotary(config, 6, x)
    everything = torch.ones(6, 6, dtype=torch.bool)
    torch.testing.assert_close(attention(x, turns), attention(x, turns, everything))
