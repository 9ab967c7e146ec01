"""The transformer of text to image: Llama's, Qwen2's or Qwen3's parts, under their weights' names.

It differs from theirs in two points (arXiv 2412.03069, section 3.3): queries and keys are
normalised per head before RoPE, and a layer's norms are re-ordered, as in Swin v2 (arXiv
2111.09883) and Chameleon (arXiv 2405.09818). They act on what a branch gives, not on what it takes:

    x <- x + input_layernorm(attention(x))
    x <- x + post_attention_layernorm(mlp(x))
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from .sequence import ACTIVATIONS, BackboneConfig, TextToImageConfig

QK_NORM_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]
"""cos and sin of RoPE's angles, each [1, n, channels of a head that turn]."""


class Cache(Protocol):
    """Where an attention leaves its keys and values, and finds those of earlier positions."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]: ...


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **options: Any) -> Any:
    """FlexAttention with a mask, compiled on CUDA.

    Args:
        query, key, value: [B, heads, n, channels of a head].
        options: of FlexAttention.
    """
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    return attend(query, key, value, block_mask=mask, **options)


class RMSNorm(nn.RMSNorm):
    """In the dtype of its input: torch's fused kernel refuses a weight of another one, as under
    autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary(config: BackboneConfig, length: int, like: Tensor) -> Rotary:
    """RoPE's cos and sin for positions 0 to ``length`` - 1, on the device and in the dtype of
    ``like``."""
    frequencies, factor = config.rope.frequencies(
        config.rope_theta,
        config.width_of_head,
        config.max_position_embeddings,
        length,
        like.device,
    )
    position = torch.arange(length, dtype=torch.float64, device=like.device)
    angle = torch.outer(position, frequencies).repeat(1, 2).unsqueeze(0)
    return (factor * angle.cos()).to(like.dtype), (factor * angle.sin()).to(like.dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """RoPE of [B, heads, n, head_dim]: of the channels that turn, one of the first half turns
    together with its like of the second; the others stay."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    turned = cos.shape[-1]
    own = x[..., :turned]
    first, second = own.chunk(2, dim=-1)
    out = own * cos + torch.cat([-second, first], dim=-1) * sin
    if turned == x.shape[-1]:
        return out
    return torch.cat([out, x[..., turned:].to(out.dtype)], dim=-1)


class Attention(nn.Module):
    """Attention whose queries and keys are normalised per head before RoPE.

    Qwen3 has such norms already, which keep their names; the others get ``qknorm``.
    """

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = width = config.width_of_head
        hidden, heads = config.hidden_size, config.num_attention_heads
        groups = config.num_key_value_heads or heads
        self.repeats = heads // groups
        bias = config.attention_bias or config.family == "qwen2"
        self.q_proj = nn.Linear(hidden, heads * width, bias)
        self.k_proj = nn.Linear(hidden, groups * width, bias)
        self.v_proj = nn.Linear(hidden, groups * width, bias)
        self.o_proj = nn.Linear(heads * width, hidden, config.attention_bias)
        self.qknorm = None
        if config.family == "qwen3":
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)
        else:
            names = ("query_norm", "key_norm")
            self.qknorm = nn.ModuleDict({name: RMSNorm(width, QK_NORM_EPS) for name in names})

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """Of queries, of keys."""
        if self.qknorm is None:
            return self.q_norm, self.k_norm
        return self.qknorm["query_norm"], self.qknorm["key_norm"]

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | BlockMask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, n, hidden] -> [B, n, hidden]; the mask is complete, nothing is causal besides it."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        query_norm, key_norm = self.norms()
        query = rotate(query_norm(self.q_proj(x).view(shape)).transpose(1, 2), rotary)
        key = rotate(key_norm(self.k_proj(x).view(shape)).transpose(1, 2), rotary)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        # Under autocast RoPE leaves float32 beside half-precision values.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if isinstance(mask, BlockMask):
            out = attend_flex(query, key, value, mask, enable_gqa=self.repeats > 1)
        elif mask is None:
            grouped = self.repeats > 1
            out = F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
        else:
            if self.repeats > 1:  # with a mask, no fused kernel takes fewer keys than queries
                key = key.repeat_interleave(self.repeats, dim=1)
                value = value.repeat_interleave(self.repeats, dim=1)
            out = F.scaled_dot_product_attention(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated MLP: SwiGLU where the activation is SiLU."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias)
        self.up_proj = nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer with re-ordered norms.

    Attributes:
        checkpointing: compute the activations again in the backward pass.
    """

    checkpointing = False

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | BlockMask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, n, hidden] -> [B, n, hidden]; see :class:`Attention`."""
        # Inside the layer's call, so that what gathers split weights around it runs once.
        if self.checkpointing and cache is None and torch.is_grad_enabled():
            return checkpoint(self._compute, x, rotary, mask, None, use_reentrant=False)
        return self._compute(x, rotary, mask, cache)

    def _compute(
        self, x: Tensor, rotary: Rotary, mask: Tensor | BlockMask | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.input_layernorm(self.self_attn(x, rotary, mask, cache))
        return x + self.post_attention_layernorm(self.mlp(x))


class Backbone(nn.Module):
    """Everything below the head, with random weights: embeddings, layers and last norm, and for
    images the projector and the embeddings of scales and positions. :class:`TextToImage` runs them.
    """

    def __init__(self, config: TextToImageConfig) -> None:
        super().__init__()
        self.config = shape = config.backbone
        hidden = shape.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        layers = (Layer(shape, number) for number in range(shape.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, shape.rms_norm_eps)
        self.reset_parameters()
        self.mm_projector = nn.Sequential(
            nn.Linear(config.feature_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.lvl_embed = nn.Embedding(len(config.scales) + 1, hidden)
        self.pos_1LC = nn.Parameter(torch.empty(config.image_tokens, hidden))

    def reset_parameters(self) -> None:
        """Weights of what text runs through: normal with the configuration's deviation, biases 0;
        norms reset themselves."""
        for module in (self.embed_tokens, *self.layers.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
