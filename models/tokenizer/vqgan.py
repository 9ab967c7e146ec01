"""VQGAN's encoder and decoder: the pixel branch (arXiv 2412.03069, section 3.1).

Module and parameter names are those of the LlamaGen family of VQGAN code, which the released
TokenFlow weights use too.
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with ``groups`` groups, eps 1e-6; gcd(groups, channels) groups for odd widths."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, plus the input (through a 1x1 where widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """One-head self-attention over the H x W places, with 1x1 convolutions."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        y = self.norm(x)
        # [B, 1, HW, C]: one head as wide as the features.
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve each side: pad right and bottom by one, 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double each side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _level(
    in_channels: int, out_channels: int, blocks: int, attention: bool, groups: int
) -> nn.Module:
    level = nn.Module()
    level.res = nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
        for i in range(blocks)
    )
    level.attn = nn.ModuleList(
        AttnBlock(out_channels, groups) for _ in range(blocks if attention else 0)
    )
    return level


def _run_level(level: nn.Module, x: Tensor) -> Tensor:
    blocks, attention = cast(nn.ModuleList, level.res), cast(nn.ModuleList, level.attn)
    for i, block in enumerate(blocks):
        x = block(x)
        if len(attention):
            x = attention[i](x)
    return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, groups),
            AttnBlock(channels, groups),
            ResnetBlock(channels, channels, groups),
        ]
    )


class Encoder(nn.Module):
    """Images to latents: one level per multiplier, each but the last halving the sides.

    Args:
        channels: width of the first level.
        multipliers: width of each level over ``channels``.
        res_blocks: residual blocks a level; the last level has attention after each.
        z_channels: channels of the output.
        groups: GroupNorm groups.
        patch: side of the pixel blocks moved into channels before the first convolution (1: none).
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        z_channels: int = 256,
        groups: int = 32,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(3 * patch * patch, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = channels
        for i, multiplier in enumerate(multipliers):
            last = i == len(multipliers) - 1
            level = _level(width, channels * multiplier, res_blocks, last, groups)
            width = channels * multiplier
            if not last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, z_channels, H/f, W/f], f = patch * 2 ** (levels - 1)."""
        h = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        for level in self.conv_blocks:
            h = _run_level(level, h)
            if hasattr(level, "downsample"):
                h = cast(nn.Module, level.downsample)(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to images: the encoder's levels backwards, one residual block more a level.

    Args: as for :class:`Encoder`; ``res_blocks`` is the encoder's number (a level has one more).
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        z_channels: int = 256,
        groups: int = 32,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.patch = patch
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _middle(width, groups)
        self.conv_blocks = nn.ModuleList()
        for i, multiplier in enumerate(reversed(multipliers)):
            level = _level(width, channels * multiplier, res_blocks + 1, i == 0, groups)
            width = channels * multiplier
            if i != len(multipliers) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3 * patch * patch, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution: where the adaptive GAN weight compares gradients."""
        return cast(nn.Parameter, self.conv_out.weight)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, z_channels, h, w] -> [B, 3, h f, w f], f = patch * 2 ** (levels - 1)."""
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = _run_level(level, h)
            if hasattr(level, "upsample"):
                h = cast(nn.Module, level.upsample)(h)
        images = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(images, self.patch) if self.patch > 1 else images
