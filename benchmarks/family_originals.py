"""The family's quantizers in their originals' own form: the other side of benchmarks/family.py.

Each is derived from its paper and released algorithm once more, with the same intermediates in
memory: distances or logits of all rows and codes, one-hot matrices, a loop over codebooks, depths
and scales. Codes and modules come from the quantizer that they are compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext import Quantizer

Result = tuple[Tensor, Tensor, Tensor]
"""Quantized features, indices as `Quantizer` arranges them, and the sum of losses."""


def _rows(h: Tensor) -> Tensor:
    return h.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2).contiguous()


def _entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the rows' softmax, less that of the mean."""
    p, log_p = logits.softmax(-1), F.log_softmax(logits + 1e-5, dim=-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


def unitok(quantizer: Quantizer, h: Tensor) -> Result:
    """A loop over codebooks; the product of all normalised rows and codes (arXiv 2502.20321)."""
    out, indices, loss = [], [], h.new_zeros(())
    books = quantizer.parts[0].codebooks
    for x, book in zip(h.chunk(len(books), 1), books, strict=True):
        f, table = F.normalize(_rows(x), dim=-1), F.normalize(book, dim=-1)
        index = torch.matmul(f.detach(), table.detach().T).argmax(-1)
        e = F.embedding(index, table)
        loss = loss + (F.mse_loss(e, f.detach()) + 0.25 * F.mse_loss(e.detach(), f)) / len(books)
        out.append(_maps(f + (e - f).detach(), x))
        indices.append(index.view(len(h), -1))
    return torch.cat(out, 1), torch.stack(indices, -1), loss


def dualtoken(quantizer: Quantizer, h: Tensor, averages: list[tuple[Tensor, Tensor]]) -> Result:
    """Two branches of residual quantization by squared distances, and in training its running means
    by one-hot matrices (arXiv 2503.14324, 2203.01941).

    Args:
        averages: hits [K] and sums [K, D] of each branch, changed in training.
    """
    out, indices, loss = [], [], h.new_zeros(())
    books = quantizer.parts[0].codebooks
    for number, (x, book) in enumerate(zip(h.chunk(2, 1), books, strict=True)):
        rows = _rows(x)
        residual, total, of_depth = rows.detach().clone(), torch.zeros_like(rows), []
        hits, sums = torch.zeros(len(book)), torch.zeros_like(book)
        for _ in range(quantizer.depth):
            squares = residual.square().sum(1, keepdim=True) + book.square().sum(1)
            index = torch.addmm(squares, residual, book.T, alpha=-2).argmin(-1)
            if quantizer.training:
                one_hot = residual.new_zeros(len(book), len(residual))
                one_hot.scatter_(0, index.unsqueeze(0), 1)
                hits, sums = hits + one_hot.sum(1), sums + one_hot @ residual
            code = F.embedding(index, book)
            total, residual = total + code, residual - code
            loss = loss + F.mse_loss(rows, total.detach()) / (2 * quantizer.depth)
            of_depth.append(index.view(len(h), -1))
        if quantizer.training:
            running_hits, running_sums = averages[number]
            running_hits.mul_(0.99).add_(hits, alpha=0.01)
            running_sums.mul_(0.99).add_(sums, alpha=0.01)
            count = running_hits.sum()
            smooth = (running_hits + 1e-5) / (count + len(book) * 1e-5) * count
            book.data.copy_(running_sums / smooth.unsqueeze(1))
        out.append(_maps(rows + (total - rows).detach(), x))
        indices.append(torch.stack(of_depth, -1))
    return torch.cat(out, 1), torch.stack(indices, 2), loss


def ibq(quantizer: Quantizer, h: Tensor) -> Result:
    """The softmax over all codes, one-hot matrices and their products (arXiv 2412.02692)."""
    z, table = _rows(h), quantizer.parts[0].codebooks[0]
    logits = z @ table.T
    soft = logits.softmax(-1)
    index = soft.argmax(-1)
    hard = torch.zeros_like(logits).scatter_(1, index.unsqueeze(1), 1.0)
    q_soft, q_hard = (hard - soft.detach() + soft) @ table, hard @ table
    loss = (
        F.mse_loss(q_soft, z)
        + F.mse_loss(q_hard.detach(), z)
        + 0.25 * F.mse_loss(q_hard, z.detach())
    )
    if quantizer.training:
        loss = loss + 0.05 * _entropy(logits / 0.01)
    return _maps(q_soft, h), index.view(len(h), -1), loss


def infinity(quantizer: Quantizer, h: Tensor) -> Result:
    """A loop over scales of area pooling, signs and trilinear upsampling, with BSQ's entropies of
    bits (arXiv 2412.04431, 2406.07548)."""
    assert quantizer.entropy is not None
    dim = quantizer.dim
    residual, total, indices = h, torch.zeros_like(h), []
    loss, scales = h.new_zeros(()), quantizer.scales
    mask = 2 ** torch.arange(dim - 1, -1, -1)
    for size in scales:
        z = residual
        if size != tuple(h.shape[2:]):
            z = F.interpolate(residual, size, mode="area")
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        q = torch.where(z > 0, 1.0, -1.0) * dim**-0.5
        indices.append(((z > 0).long() * mask).sum(-1).flatten(1))
        if quantizer.training:
            p = torch.sigmoid(4 * z.reshape(-1, dim) * dim**-0.5 / quantizer.entropy.temperature)
            both = torch.stack([p, 1 - p], -1)
            sample = -(both * (both + 1e-8).log()).sum(-1).sum(-1).mean()
            mean = both.mean(0)
            codebook = -(mean * (mean + 1e-8).log()).sum()
            loss = loss + quantizer.entropy.weight * (sample - codebook) / len(scales)
        q = (z + (q - z).detach()).permute(0, 3, 1, 2)
        if size != tuple(h.shape[2:]):
            q = F.interpolate(q.unsqueeze(2), (1, *h.shape[2:]), mode="trilinear").squeeze(2)
        residual, total = residual - q.detach(), total + q
    return total, torch.cat(indices, 1), loss
