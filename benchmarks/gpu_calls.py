"""What the modes of `benchmarks.gpu` have in common: where they run, and the calls they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import DIMS, PYRAMIDS
from tokenflow_ext import MultiScaleQuantizer

DIM = sum(DIMS)

Lines = Iterator[str]


class Wrong(Exception):
    """A mode found a wrong result; the message says which."""


@dataclass(frozen=True)
class Settings:
    """Where and how much."""

    device: str
    codes: int
    pyramid: str
    batch: int
    seconds: float
    out: Path | None = None  # folder for results

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


def quantizer_for(settings: Settings, device: str) -> MultiScaleQuantizer:
    quantizer = MultiScaleQuantizer(
        settings.codes, DIMS, PYRAMIDS[settings.pyramid], scale_drop=0.0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook.copy_(torch.randn(codebook.shape, generator=generator))
    return quantizer.to(device).train()


def step(quantizer: MultiScaleQuantizer, h: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward: indices, features, loss and all gradients."""
    h = h.detach().requires_grad_()
    out = quantizer(h)
    loss = out.vq_loss + out.commitment_loss
    wanted = {"gradient of h": h, **{f"codebook {i}": c for i, c in enumerate(quantizer.codebooks)}}
    gradients = torch.autograd.grad([out.quantized, loss], list(wanted.values()), [grad, None])
    found = {"indices": out.indices, "quantized": out.quantized, "loss": loss}
    return {k: v.detach() for k, v in found.items()} | dict(zip(wanted, gradients, strict=True))


def features(settings: Settings) -> tuple[Tensor, Tensor]:
    side = PYRAMIDS[settings.pyramid][-1]
    shape = (settings.batch, DIM, side, side)
    return torch.randn(shape), torch.randn(shape)
