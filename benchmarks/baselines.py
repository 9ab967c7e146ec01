"""What the kernels are measured against: the same loop in PyTorch, written two ways.

Both take features h [B, D, H, W], one codebook [K, C_g] for each group and square scales, and
return what `MultiScaleQuantizer` returns in training: quantized features, indices, both losses
(arXiv 2412.03069, eq. 1-3 and section 3.1) and the hits of each code. Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.searches import Query, product_argmax


class Output(NamedTuple):
    """Result of a baseline."""

    quantized: Tensor
    """[B, D, H, W]."""
    indices: Tensor
    """[B, L] int64."""
    vq_loss: Tensor
    commitment_loss: Tensor
    hits: Tensor
    """[K]."""


def released(
    h: Tensor, codebooks: Sequence[Tensor], sides: Sequence[int], beta: float = 0.25
) -> Output:
    """The algorithm as TokenFlow's authors released it, step by step.

    At every scale: both codebooks are normalised anew, a squared distance matrix [N, K] is formed
    for the semantic group, one for the pixel group and one for their weighted sum, its argmin is
    taken, and a one-hot matrix [N, K] is made (int64, then cast), which nothing uses.

    Left out, though the released code computes them too, because their results are only logged or
    multiplied by zero: the mean square of both distance matrices and, in training, the softmax
    entropy of the joint one and the distinct codes of a window of 131,072 tokens. With them the
    baseline would need more time and memory than is reported.
    """
    semantic, pixel = codebooks
    split = [semantic.shape[1], pixel.shape[1]]
    codes = semantic.shape[0]
    residual, quantized = h, torch.zeros_like(h)
    indices, vq_losses, commitment_losses = [], [], []
    hits = h.new_zeros(codes)
    for side in sides:
        z = F.interpolate(residual, size=(side, side), mode="area").permute(0, 2, 3, 1)
        z_semantic, z_pixel = (F.normalize(part, dim=-1) for part in z.split(split, dim=-1))
        z = torch.cat([z_semantic, z_pixel], dim=-1)
        unit_semantic, unit_pixel = F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)

        distances = []
        for rows, unit in ((z_semantic, unit_semantic), (z_pixel, unit_pixel)):
            rows = rows.flatten(0, 2)
            distances.append(
                rows.square().sum(dim=1, keepdim=True)
                + unit.square().sum(dim=1)
                - 2 * torch.einsum("nd,kd->nk", rows, unit)
            )
        index = torch.argmin(distances[0] + 1.0 * distances[1], dim=1)
        del distances

        encodings = F.one_hot(index, codes).to(z.dtype)
        del encodings
        hits += torch.bincount(index, minlength=codes)
        q = torch.cat([unit_semantic, unit_pixel], dim=-1)[index].view(z.shape)
        vq_losses.append((q - z.detach()).square().mean())
        commitment_losses.append(beta * (q.detach() - z).square().mean())
        q = z + (q - z).detach()
        upsampled = F.interpolate(q.permute(0, 3, 1, 2), size=h.shape[2:], mode="bicubic")
        quantized = quantized + upsampled
        residual = residual - upsampled.detach()
        indices.append(index.view(h.shape[0], -1))
    return Output(
        quantized,
        torch.cat(indices, dim=1),
        sum(vq_losses) / len(sides),
        sum(commitment_losses) / len(sides),
        hits,
    )


def eager(
    h: Tensor,
    codebooks: Sequence[Tensor],
    sides: Sequence[int],
    beta: float = 0.25,
    search: Callable[[Tensor], Query] = product_argmax,
) -> Output:
    """The plainest good eager form.

    The codebook is normalised and given to `search` once; a scale is then one query over all
    groups, by default a matrix product and an argmax, and a gather.
    """
    split = [codebook.shape[1] for codebook in codebooks]
    unit = torch.cat([F.normalize(codebook, dim=-1) for codebook in codebooks], dim=-1)
    with torch.no_grad():
        query = search(unit.detach())
    residual, quantized = h, torch.zeros_like(h)
    indices, vq_losses, commitment_losses = [], [], []
    for side in sides:
        z = F.interpolate(residual, size=(side, side), mode="area").permute(0, 2, 3, 1)
        z = torch.cat([F.normalize(part, dim=-1) for part in z.split(split, dim=-1)], dim=-1)
        with torch.no_grad():
            index = query(z.flatten(0, 2))
        q = unit[index].view(z.shape)
        vq_losses.append(F.mse_loss(q, z.detach()))
        commitment_losses.append(F.mse_loss(z, q.detach()))
        q = z + (q - z).detach()
        upsampled = F.interpolate(q.permute(0, 3, 1, 2), size=h.shape[2:], mode="bicubic")
        quantized = quantized + upsampled
        residual = residual - upsampled.detach()
        indices.append(index.view(h.shape[0], -1))
    joined = torch.cat(indices, dim=1)
    return Output(
        quantized,
        joined,
        torch.stack(vq_losses).mean(),
        beta * torch.stack(commitment_losses).mean(),
        torch.bincount(joined.flatten(), minlength=unit.shape[0]),
    )
