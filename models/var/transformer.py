"""VAR's blocks: attention by scale, adaptive norms. Names are those of the released weights.

Method: arXiv 2404.02905, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from tokenflow_ext.models.text_to_image.backbone import attend_flex

from .config import VarConfig

_MOST_SCALE = math.log(100)
#: What says which places an attention sees: the place after the last of each scale, or a mask for
#: FlexAttention.
Visible = Sequence[int] | BlockMask


class Cache(Protocol):
    """Where an attention leaves its keys and values, and finds those of earlier scales."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]: ...


def attend_by_scale(
    query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], scale: float | None
) -> Tensor:
    """Attention in which a place sees all places of its own scale and of earlier ones.

    What a scale's places see is a prefix: one call of plain attention for each scale is the same as
    one with a mask, and needs no mask of L x L.

    Args:
        query, key, value: [B, heads, L, channels of a head].
        ends: the place after the last of each scale.
        scale: of the softmax; None is 1 / sqrt(channels of a head).
    """
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = []
    # Backwards: a prefix is cut from the one before, so that its gradient is padded to that alone.
    for part, end in zip(reversed(query.split(sizes, dim=2)), reversed(ends), strict=True):
        key, value = key[:, :, :end], value[:, :, :end]
        parts.append(F.scaled_dot_product_attention(part, key, value, scale=scale))
    return torch.cat(parts[::-1], dim=2)


class SelfAttention(nn.Module):
    """Attention whose queries and keys have unit length, with a learned scale for each head."""

    def __init__(self, config: VarConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        width, heads = config.channels, config.attention_heads
        self.heads, self.l2_norm = heads, config.l2_attention
        self.softmax_scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(width // heads)
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    zero_k_bias: Tensor

    def forward(self, x: Tensor, visible: Visible, cache: Cache | None = None) -> Tensor:
        """[B, n, width] -> [B, n, width].

        Args:
            visible: of all n places; not used with a cache.
            cache: of a run that computes one scale, whose places see all that it holds then.
        """
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        weight = self.mat_qkv.weight
        if weight.dtype != bias.dtype:
            bias = bias.to(weight.dtype)
        found = F.linear(x, weight, bias).unflatten(2, (3, self.heads, -1))
        query, key, value = found.permute(2, 0, 3, 1, 4)
        if self.l2_norm:
            scale = self.scale_mul_1H11.clamp(max=_MOST_SCALE).exp()
            query = (F.normalize(query, dim=-1) * scale).to(value.dtype)
            key = F.normalize(key, dim=-1).to(value.dtype)
        if cache is None:
            if isinstance(visible, BlockMask):
                out = attend_flex(query, key, value, visible, scale=self.softmax_scale)
            else:
                out = attend_by_scale(query, key, value, visible, self.softmax_scale)
        else:
            key, value = cache.update(key, value, self.layer)
            out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The MLP, with tanh-GELU."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        inner = round(config.mlp_ratio * config.channels)
        self.fc1 = nn.Linear(config.channels, inner)
        self.fc2 = nn.Linear(inner, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(width: int, rows: int) -> nn.Sequential:
    """A condition [B, width] to ``rows`` rows of an adaptive norm."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, rows * width))


def drop_path(x: Tensor, share: float) -> Tensor:
    """Each sample's branch dropped with probability ``share``, the others made up for it."""
    if not share:
        return x
    kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= share
    return x * kept.to(x.dtype) / (1 - share)


class Block(nn.Module):
    """A block with adaptive norms. Of its six rows the first two are gates (gamma), then come the
    scales and the shifts, of attention and MLP in turn.

    Attributes:
        checkpointing: compute the activations again in the backward pass.
    """

    checkpointing = False

    def __init__(self, config: VarConfig, layer: int) -> None:
        super().__init__()
        width = config.channels
        self.width, self.eps = width, config.norm_eps
        self.drop_path = config.drop_path_of(layer)
        self.attn = SelfAttention(config, layer)
        self.ffn = FeedForward(config)
        self.shared = config.shared_adaln
        if self.shared:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))
        else:
            self.ada_lin = modulation(width, 6)

    def rows(self, condition: Tensor) -> Tensor:
        """The norms' rows [B, 1, 6, width] of a condition: the class [B, width], or with shared
        norms what they have in common [B, 1, 6, width]."""
        return self._rows(condition)

    def _rows(self, condition: Tensor) -> Tensor:
        # Apart: where weights are split over processes, `rows` and `forward` each gather them.
        if self.shared:
            return self.ada_gss + condition
        return self.ada_lin(condition).view(-1, 1, 6, self.width)

    def forward(self, x: Tensor, condition: Tensor, visible: Visible) -> Tensor:
        """[B, n, width] -> [B, n, width], all places at once.

        Args:
            condition: see :meth:`rows`.
            visible: see :class:`SelfAttention`.
        """
        rows = self._rows(condition)
        if self.checkpointing and torch.is_grad_enabled():
            # Random numbers of dropped branches are drawn alike both times.
            return checkpoint(self._compute, x, rows, visible, use_reentrant=False)
        return self._compute(x, rows, visible)

    def step(self, x: Tensor, rows: Tensor, cache: Cache) -> Tensor:
        """[B, n, width] -> [B, n, width] of a scale, in a generation.

        Args:
            rows: of the norms.
        """
        return self._compute(x, rows, (), cache)

    def _compute(
        self, x: Tensor, rows: Tensor, visible: Visible, cache: Cache | None = None
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = rows.unbind(2)
        share = self.drop_path if self.training else 0.0
        seen = self._norm(x) * (scale1 + 1) + shift1
        x = x + drop_path(self.attn(seen, visible, cache) * gamma1, share)
        seen = self._norm(x) * (scale2 + 1) + shift2
        return x + drop_path(self.ffn(seen) * gamma2, share)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=self.eps)


class AdaptiveHeadNorm(nn.Module):
    """The norm before the head: scale and shift from the class."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.width, self.eps = config.channels, config.norm_eps
        self.ada_lin = modulation(self.width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, n, width] and the class [B, width] -> [B, n, width], in the dtype of ``x``."""
        linear = self.ada_lin[1]
        assert isinstance(linear, nn.Linear)
        weight, bias = linear.weight.to(x.dtype), linear.bias.to(x.dtype)
        rows = F.linear(F.silu(condition.to(x.dtype)), weight, bias)
        scale, shift = rows.view(-1, 1, 2, self.width).unbind(2)
        return F.layer_norm(x, (self.width,), eps=self.eps) * (scale + 1) + shift
