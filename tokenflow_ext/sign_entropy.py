"""Entropies of LFQ's choice of a code of signs, without the matrix of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SignEntropies(NamedTuple):
    """Entropies of the choice softmax(2 <z, code> / temperature) over all 2^D codes of signs."""

    per_sample: Tensor
    """Mean over rows of the entropy of a row's choice, scalar."""
    codebook: Tensor
    """Entropy of the mean choice, scalar."""


def sign_entropies(
    z: Tensor,
    *,
    temperature: float = 0.01,
    value: float = 1.0,
    eps: float = 1e-5,
    clamp: bool = False,
    factorized: bool = False,
    average: Callable[[Tensor], Tensor] | None = None,
) -> SignEntropies:
    """The two entropies of LFQ's loss (arXiv 2310.05737, eq. 5) of rows z [N, D], differentiable.

    The choice is a product over channels, so a row's entropy is a sum over channels. The mean
    choice of N rows is not; its 2^D probabilities are the products of two tables of 2^(D / 2), a
    matrix product, so that no matrix of N x 2^D exists.

    Args:
        z: float32 or float64.
        temperature: of the softmax.
        value: magnitude of the codes' channels.
        eps: what the logarithm of the mean choice keeps away from 0: added to the probability, or
            its least with `clamp` (vector-quantize-pytorch).
        clamp: see `eps`.
        factorized: the codebook's entropy as the sum of the channels' (BSQ, arXiv 2406.07548,
            eq. 9): an upper bound of it, for any D.
        average: what is done to the mean choice before its entropy, such as a mean over processes.

    Raises:
        ValueError: more than 24 channels without `factorized`.
    """
    logits = 4 * value / temperature * z  # of 1 against 0, a channel
    bits = logits.sigmoid()
    # H(sigmoid(x)) = softplus(x) - x sigmoid(x), without a logarithm of 0.
    per_sample = (F.softplus(logits) - logits * bits).sum(-1).mean()
    if factorized:
        return SignEntropies(per_sample, factorized_entropy(bits.mean(0)))
    if z.shape[-1] > 24:
        raise ValueError(
            f"2^{z.shape[-1]} codes are too many to list: use factorized=True beyond 24 channels"
        )
    half = z.shape[-1] // 2
    chances = torch.stack([bits, (-logits).sigmoid()], dim=-1)  # not 1 - bits, which cancels
    upper, lower = _joint(chances[:, :half]), _joint(chances[:, half:])
    mean = (upper.T @ lower).flatten() / len(z)
    if average is not None:
        mean = average(mean)
    log = mean.clamp(min=eps).log() if clamp else (mean + eps).log()
    return SignEntropies(per_sample, -(mean * log).sum())


def factorized_entropy(chance: Tensor) -> Tensor:
    """The entropy of signs that are 1 with the probabilities [...], a scalar: the sum of theirs."""
    both = torch.stack([chance, 1 - chance])
    # Its slope at 0 is infinite, and what is certain has none of its own to end that.
    return torch.special.entr(both.clamp(min=torch.finfo(both.dtype).tiny)).sum()


def _joint(chances: Tensor) -> Tensor:
    """Probabilities [N, 2^D] of all combinations of chances [N, D, 2]."""
    joint = chances.new_ones(len(chances), 1)
    for channel in range(chances.shape[1]):
        joint = (joint.unsqueeze(-1) * chances[:, channel].unsqueeze(1)).flatten(1)
    return joint
