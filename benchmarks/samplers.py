"""Other ways to draw a code from guided logits filtered by top-k and top-p."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What is drawn with."""

    top_k: int
    top_p: float
    guidance: float


Draw = Callable[[Tensor, Tensor, Settings], Tensor]
"""(logits [N, V], unconditional logits, settings) -> indices [N]."""


def _guided(logits: Tensor, uncond: Tensor, settings: Settings) -> Tensor:
    return (1 + settings.guidance) * logits - settings.guidance * uncond


def by_sorting(logits: Tensor, uncond: Tensor, settings: Settings) -> Tensor:
    """What the released sampling loops do: the k-th largest by topk, top-p over a sorted row."""
    z = _guided(logits, uncond, settings)
    least = z.topk(settings.top_k, dim=-1).values[:, -1:]
    z = z.masked_fill(z < least, -torch.inf)
    if settings.top_p > 0:
        ascending, order = z.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        dropped[:, -1:] = False
        z = z.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return z.softmax(dim=-1).multinomial(1).squeeze(1)


def by_top_k(logits: Tensor, uncond: Tensor, settings: Settings) -> Tensor:
    """A good eager form: only the k largest are sorted, filtered and drawn from."""
    values, indices = _guided(logits, uncond, settings).topk(settings.top_k, dim=-1)
    probabilities = values.softmax(dim=-1)
    if settings.top_p > 0:
        above = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(above >= settings.top_p, 0.0)
    return indices.gather(1, probabilities.multinomial(1)).squeeze(1)


def by_flashinfer(logits: Tensor, uncond: Tensor, settings: Settings) -> Tensor:
    """FlashInfer's sampler, which filters by probability after top-k as ours does; guidance before
    it."""
    sampling = importlib.import_module("flashinfer.sampling")
    z = _guided(logits, uncond, settings)
    if settings.top_p > 0:
        return sampling.top_k_top_p_sampling_from_logits(
            z, settings.top_k, settings.top_p, filter_apply_order="top_k_first"
        ).long()
    return sampling.top_k_top_p_sampling_from_logits(z, settings.top_k, 1.0).long()


@dataclass(frozen=True)
class Sampler:
    """A baseline."""

    draw: Draw
    includes: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None


SAMPLERS = {
    "by sorting": Sampler(
        by_sorting,
        "eager: guidance, topk for the k-th largest, a sort of the whole row with cumulated "
        "probabilities for top-p, softmax, multinomial",
    ),
    "by topk": Sampler(
        by_top_k, "eager: guidance, topk, top-p and multinomial over the k largest alone"
    ),
    "FlashInfer": Sampler(
        by_flashinfer,
        "eager guidance, then FlashInfer's top_k_top_p_sampling_from_logits",
        ("cuda",),
        "flashinfer",
    ),
}
