"""The semantic decoder against its formulas written out, and its released shapes."""

import math

import pytest
import torch

from tokenflow_ext.models import TokenizerConfig
from tokenflow_ext.models.tokenizer.semantic_decoder import SemanticDecoder, task_layer


def plain(state, x, depth, heads):
    """Pre-norm ViT in float64 from the weights alone (x [B, C, h, w] at the base grid)."""
    state = {k: v.double() for k, v in state.items()}

    def norm(name, y):
        mean = y.mean(-1, keepdim=True)
        variance = ((y - mean) ** 2).mean(-1, keepdim=True)
        y = (y - mean) / (variance + 1e-6).sqrt()
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(y):
        return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))

    batch, channels = x.shape[:2]
    w = state["patch_embed.proj.weight"][:, :, 0, 0]
    y = x.double().reshape(batch, channels, -1).transpose(1, 2) @ w.T
    y = y + state["patch_embed.proj.bias"]
    y = torch.cat([state["cls_token"].expand(batch, 1, -1), y], dim=1) + state["pos_embed"]
    for i in range(depth):
        name = f"blocks.{i}"
        z = norm(f"{name}.norm1", y)
        size = z.shape[-1]
        wq, wk, wv = state[f"{name}.attn.qkv.weight"].split(size)
        q = z @ wq.T + state[f"{name}.attn.q_bias"]
        k = z @ wk.T
        v = z @ wv.T + state[f"{name}.attn.v_bias"]
        parts = []
        for head in range(heads):
            cut = slice(head * size // heads, (head + 1) * size // heads)
            scores = q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(size // heads)
            parts.append(scores.softmax(-1) @ v[..., cut])
        z = torch.cat(parts, dim=-1)
        y = y + z @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
        z = norm(f"{name}.norm2", y)
        z = gelu(z @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"])
        y = y + z @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
    return norm("fc_norm", y[:, 1:])


def test_against_plain():
    torch.manual_seed(0)
    decoder = SemanticDecoder(6, 24, 3, 4, 5)
    for parameter in decoder.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 6, 5, 5)
    got = decoder(x)
    assert got.shape == (2, 25, 24)
    expected = plain(decoder.state_dict(), x, 3, 4)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_another_grid_uses_resampled_positions():
    decoder = SemanticDecoder(6, 24, 1, 4, 5)
    assert decoder(torch.randn(2, 6, 7, 6)).shape == (2, 42, 24)


def test_task_layer():
    layer = task_layer(5, 3)
    x = torch.randn(2, 7, 5)
    first = torch.tanh(x @ layer[0].weight.T + layer[0].bias)
    torch.testing.assert_close(layer(x), first @ layer[2].weight.T + layer[2].bias)


@pytest.mark.parametrize(("preset", "width", "positions"), [("B", 768, 197), ("XL", 1152, 730)])
def test_original_shapes(preset, width, positions):
    semantic = TokenizerConfig.preset(preset).semantic
    with torch.device("meta"):
        decoder = SemanticDecoder(
            semantic.code_dim,
            semantic.decoder_width,
            semantic.decoder_depth,
            semantic.decoder_heads,
            semantic.decoder_grid,
        )
    shapes = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}
    assert semantic.decoder_heads == 12
    assert shapes == {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 32, 1, 1),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
    } | {
        f"blocks.{i}.{name}": shape
        for i in range(3)
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
        }.items()
    }
