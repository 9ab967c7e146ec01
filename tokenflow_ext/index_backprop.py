"""Index backpropagation (IBQ, arXiv 2412.02692): every code receives a gradient through the softmax
over all of them, without a matrix of rows x codes.

The scores of a few rows at a time are in memory, in the backward pass too, where they are computed
again. Sums are in the order of the rows, so results are the same bits at every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebook import sum_by_code

#: Scores in memory at a time.
CHUNK = 3 << 22
#: Codes that a CPU multiplies with at a time.
TILE = 2048


class Choice(NamedTuple):
    """What `choose` returns."""

    quantized: Tensor
    """The chosen code of each row, [N, D]; its gradient reaches all codes, and the rows."""
    sample_entropy: Tensor
    """Mean over rows of the entropy of softmax(<z, code> / temperature), a scalar."""
    codebook_entropy: Tensor
    """Entropy of the mean of that choice over rows, a scalar."""


def choose(
    rows: Tensor,
    codes: Tensor,
    indices: Tensor,
    *,
    temperature: float | None = None,
    eps: float = 1e-5,
) -> Choice:
    """The chosen codes, as if by (one_hot + softmax(<z, code>) - sg softmax) times the codes.

    Args:
        rows: z [N, D], float32 or float64.
        codes: [K, D], alike.
        indices: the code of each row, [N] int64.
        temperature: of the entropies' softmax; the straight-through one has 1. None: no entropies
            are wanted, they are 0.
        eps: added to the mean choice in its logarithm.

    Raises:
        ValueError: a temperature that is not positive, or shapes that do not fit.
    """
    fits = rows.dim() == codes.dim() == 2 and rows.shape[1] == codes.shape[1]
    if not fits or len(rows) == 0 or indices.shape != rows.shape[:1]:
        raise ValueError(
            "rows [N, D], N > 0, codes [K, D] and indices [N] must fit, got "
            f"{tuple(rows.shape)}, {tuple(codes.shape)} and {tuple(indices.shape)}"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    quantized, entropies, mean = _Choose.apply(rows, codes, indices, temperature)
    if temperature is None:
        return Choice(quantized, rows.new_zeros(()), rows.new_zeros(()))
    return Choice(quantized, entropies.mean(), -(mean * (mean + eps).log()).sum())


def _chunks(rows: Tensor, codes: Tensor, kinds: int) -> tuple[list[slice], Tensor]:
    """Parts of the rows, and room for so many kinds of scores of the longest, [kinds, n, K]."""
    step = min(len(rows), max(1, CHUNK // (kinds * len(codes))))
    room = rows.new_empty(kinds, step, len(codes))
    return [slice(first, first + step) for first in range(0, len(rows), step)], room


def _products(rows: Tensor, codes: Tensor, out: Tensor) -> Tensor:
    """Of all rows [M, D] with all codes, in the room for them [M, K]."""
    # A CPU's matrix product lays the codes out anew, best while they are in its cache. (A graph
    # takes no part of a row as a result.)
    tiled = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    step = TILE if tiled else len(codes)
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        torch.mm(rows, codes[part].T, out=out[:, part])
    return out


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, codes: Tensor, indices: Tensor, temperature: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        entropies, mean = rows.new_zeros(len(rows)), codes.new_zeros(len(codes))
        if temperature is not None:
            parts, room = _chunks(rows, codes, 2)
            for part in parts:
                logs, p = room[:, : len(rows[part])]
                _products(rows[part], codes, logs)
                _probabilities_(logs, p, temperature)
                mean += p.sum(0)
                entropies[part] = -_dot(p, logs).squeeze(1)
            mean /= len(rows)
        ctx.save_for_backward(rows, codes, indices)
        ctx.temperature = temperature
        return F.embedding(indices, codes), entropies, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_quantized: Tensor, grad_entropies: Tensor, grad_mean: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        rows, codes, indices = ctx.saved_tensors
        temperature = ctx.temperature
        grad_rows = torch.empty_like(rows)
        grad_codes, _ = sum_by_code(grad_quantized.contiguous(), indices, len(codes))
        by_mean = grad_mean / len(rows)
        parts, room = _chunks(rows, codes, 3)
        for part in parts:
            count = len(rows[part])
            # Scores and their gradients in one product, [2 n, K].
            both = _products(
                torch.cat([rows[part], grad_quantized[part]]),
                codes,
                room[:2].flatten(0, 1)[: 2 * count],
            )
            scores, grad, p = both[:count], both[count:], room[2, :count]
            _softmax_gradient_(grad, torch.softmax(scores, dim=1, out=p))
            if temperature is not None:
                _probabilities_(scores, p, temperature)
                # Of the entropy, -p (log p + entropy); of the mean, p (g - <p, g>).
                of_choice = scores.mul_(-grad_entropies[part].unsqueeze(1)).add_(by_mean)
                grad.add_(_softmax_gradient_(of_choice, p), alpha=1 / temperature)
            torch.matmul(grad, codes, out=grad_rows[part])
            grad_codes.addmm_(grad.T, rows[part])
        return grad_rows, grad_codes, None, None


def _probabilities_(scores: Tensor, p: Tensor, temperature: float) -> None:
    """softmax(scores / temperature) of each row into p, its logarithm in place of the scores."""
    if temperature != 1:
        scores.div_(temperature)
    # Not exp of the logarithms: a CPU's takes ten times as long where results underflow.
    torch.softmax(scores, dim=1, out=p)
    torch.log_softmax(scores, dim=1, out=scores)


def _softmax_gradient_(grad: Tensor, p: Tensor) -> Tensor:
    """What comes to the scores of probabilities p from their gradient, in place of it."""
    return grad.sub_(_dot(p, grad)).mul_(p)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows with rows, [N, 1]."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)
