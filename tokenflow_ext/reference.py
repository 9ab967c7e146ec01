"""The quantizer in the plainest PyTorch: the definition that the kernels are held against.

Everything here works in the dtype of its inputs, on any device, with every intermediate in memory
and every gradient by autograd. It is the oracle of the tests, the baseline of the benchmarks and
the documentation of what is computed; the library never falls back to it.

Shapes as in `tokenflow_ext.ops`: codebook [K, D] with the groups side by side, D = sum(dims).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import QuantizeResult, Size


def normalize_groups(x: Tensor, dims: Sequence[int], l2_norm: bool = True) -> Tensor:
    """Each group of the last dimension scaled to unit length; x itself without l2_norm."""
    if not l2_norm:
        return x
    return torch.cat([F.normalize(part, dim=-1) for part in x.split(list(dims), dim=-1)], dim=-1)


def distances(
    rows: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    l2_norm: bool = True,
) -> Tensor:
    """Weighted squared distances [N, K] of rows [N, D] to codes (arXiv 2412.03069, eq. 1-3)."""
    row_groups = normalize_groups(rows, dims, l2_norm).split(list(dims), dim=-1)
    code_groups = normalize_groups(codebook, dims, l2_norm).split(list(dims), dim=-1)
    total = rows.new_zeros(())
    for weight, row, code in zip(weights, row_groups, code_groups, strict=True):
        distance = torch.cdist(row, code, compute_mode="donot_use_mm_for_euclid_dist").square()
        total = total + weight * distance
    return total


def nearest_code(
    rows: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    l2_norm: bool = True,
) -> Tensor:
    """Index [N] of the nearest code, the lowest on a tie."""
    return distances(rows, codebook, dims, weights, l2_norm).argmin(dim=1)


def multiscale_quantize(
    h: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    weights: Sequence[float] | None = None,
    l2_norm: bool = True,
    dropped: int = -1,
    indices: Tensor | None = None,
) -> QuantizeResult:
    """The residual loop, line by line (arXiv 2412.03069, section 3.1).

    With `indices` [B, L] the codes are given and nothing is searched.
    """
    weights = [1.0] * len(dims) if weights is None else weights
    batch, _, height, width = h.shape
    given = None if indices is None else indices.split([a * b for a, b in sizes], dim=1)
    codes = normalize_groups(codebook, dims, l2_norm)
    residual = h
    quantized = torch.zeros_like(h)
    all_indices, code_error, row_error = [], [], []
    for scale, size in enumerate(sizes):
        if scale == dropped:
            all_indices.append(h.new_full((batch, size[0] * size[1]), -1, dtype=torch.int64))
            code_error.append(h.new_zeros(()))
            row_error.append(h.new_zeros(()))
            continue
        rows = F.interpolate(residual, size, mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        z = normalize_groups(rows, dims, l2_norm)
        if given is None:
            index = nearest_code(rows, codebook, dims, weights, l2_norm)
        else:
            index = given[scale].flatten()
        q = codes[index]
        all_indices.append(index.view(batch, -1))
        code_error.append((q - z.detach()).square().mean())
        row_error.append((q.detach() - z).square().mean())
        straight_through = z + (q - z).detach()
        grid = straight_through.view(batch, *size, -1).permute(0, 3, 1, 2)
        upsampled = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        quantized = quantized + upsampled
        residual = residual - upsampled.detach()
    indices = torch.cat(all_indices, dim=1)
    hits = torch.bincount(indices[indices >= 0], minlength=codebook.shape[0])
    return QuantizeResult(quantized, indices, torch.stack(code_error), torch.stack(row_error), hits)


def multiscale_rows(
    h: Tensor,
    codebook: Tensor,
    indices: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    l2_norm: bool = True,
) -> Tensor:
    """The rows [B, L, D] every scale searched with; indices of -1 are dropped tokens."""
    height, width = h.shape[2:]
    residual, out, first = h, [], 0
    for size in sizes:
        rows = F.interpolate(residual, size, mode="area").permute(0, 2, 3, 1).flatten(1, 2)
        out.append(normalize_groups(rows, dims, l2_norm))
        step = indices[:, first : first + size[0] * size[1]]
        residual = residual - multiscale_decode(
            step, codebook, dims, [size], (height, width), l2_norm
        )
        first += size[0] * size[1]
    return torch.cat(out, dim=1)


def multiscale_decode(
    indices: Tensor,
    codebook: Tensor,
    dims: Sequence[int],
    sizes: Sequence[Size],
    output_size: Size,
    l2_norm: bool = True,
) -> Tensor:
    """`f^ [B, D, *output_size]` from indices [B, L]."""
    codes = normalize_groups(codebook, dims, l2_norm)
    rows = codes[indices.clamp(min=0)] * (indices >= 0).unsqueeze(-1)
    total = rows.new_zeros((indices.shape[0], codes.shape[1], *output_size))
    for size, part in zip(sizes, rows.split([a * b for a, b in sizes], dim=1), strict=True):
        grid = part.unflatten(1, size).permute(0, 3, 1, 2)
        total = total + F.interpolate(grid, output_size, mode="bicubic", align_corners=False)
    return total


def segment_sum(rows: Tensor, indices: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Sums of rows [N, D] by index [N], and counts; indices of -1 are skipped."""
    kept = indices >= 0
    sums = rows.new_zeros((num_segments, rows.shape[1]))
    sums.index_add_(0, indices[kept], rows[kept])
    return sums, torch.bincount(indices[kept], minlength=num_segments)


def filtered_logits(
    logits: Tensor,
    *,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    vocab: tuple[int, int] | None = None,
) -> Tensor:
    """The guided logits that `sample_top_k_top_p` draws from, before the division by the
    temperature, -inf where a code is masked or dropped: [..., V] in float64. Arguments as there,
    for inputs that pass its checks."""
    if vocab is not None:
        logits = logits[..., vocab[0] : vocab[1]]
        uncond = None if uncond is None else uncond[..., vocab[0] : vocab[1]]
    half = logits.dtype == torch.float16
    lowest = torch.finfo(torch.float16 if half else torch.bfloat16).min
    z, masked = logits.double(), logits <= lowest
    if uncond is not None:
        t = _column(guidance, z)
        z = torch.where(t == 0, z, (1 + t) * z - t * uncond.double())
        masked = masked | ((t != 0) & (uncond <= lowest))
    z = z.masked_fill(masked, -torch.inf)

    count = z.shape[-1]
    k = _column(top_k, z).long()
    k = torch.where(k <= 0, count, k).clamp(max=count).expand(*z.shape[:-1], 1)
    descending = z.sort(dim=-1, descending=True).values
    kept = z >= descending.gather(-1, k - 1)
    # One code: the lowest index of the largest.
    first = torch.zeros_like(kept).scatter(-1, z.argmax(dim=-1, keepdim=True), True)
    kept = torch.where(k == 1, first, kept)

    p = _column(top_p, z)
    scaled = _scaled(z, temperature)
    ascending, order = scaled.masked_fill(~kept, -torch.inf).sort(dim=-1, stable=True)
    dropped = (ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p) & (p > 0)
    dropped[..., -1] = False
    kept = kept & ~torch.zeros_like(dropped).scatter(-1, order, dropped)
    kept = kept & (scaled.exp() >= _column(min_p, z))  # of the largest probability
    return z.masked_fill(~kept, -torch.inf)


def filtered_probabilities(logits: Tensor, **arguments: Any) -> Tensor:
    """The distribution that `sample_top_k_top_p` draws from, [..., V] in the dtype of `logits`
    (pass float64 for the exact one); arguments as for `filtered_logits`."""
    z = filtered_logits(logits, **arguments)
    return _scaled(z, arguments.get("temperature", 1.0)).softmax(dim=-1).to(logits.dtype)


def _column(value: float | Tensor, z: Tensor) -> Tensor:
    """An argument of the rows of z, beside its last dimension."""
    value = torch.as_tensor(value, dtype=z.dtype, device=z.device)
    return value.unsqueeze(-1) if value.dim() else value


def _scaled(z: Tensor, temperature: float | Tensor) -> Tensor:
    """(z - max z) / temperature, which no temperature makes overflow upwards."""
    return (z - z.amax(dim=-1, keepdim=True)) / _column(temperature, z)
