"""Measures of reconstruction on images in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to 8 bits: 127.5 x + 128, clamped to 0-255, truncated (uint8)."""
    return (images.detach().float() * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8)


def psnr(a: Tensor, b: Tensor, *, reduction: str = "mean") -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in [-1, 1] (clamped to it).

    Args:
        reduction: ``mean`` over the images' own values (0-dim), or ``none`` ([B]).

    Raises:
        ValueError: shapes that differ, or another reduction. Equal images give infinity.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(
            f"a and b must have one shape [B, C, H, W], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    error = (a.detach().float().clamp(-1, 1) - b.detach().float().clamp(-1, 1)).square()
    values = 10.0 * torch.log10(4.0 / error.mean(dim=(1, 2, 3)))
    return values.mean() if reduction == "mean" else values


def cosine(pred: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of tokens [B, N, C] with their targets (0-dim)."""
    if pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have one shape, got {tuple(pred.shape)} and "
            f"{tuple(target.shape)}"
        )
    return torch.nn.functional.cosine_similarity(pred.float(), target.float(), dim=-1).mean()
