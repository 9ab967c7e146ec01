"""Which images share a code: every image's mean feature and its nearest code.

Every image's features are averaged over the grid and given their nearest code, in the semantic
codebook alone, in the pixel codebook alone, and in both together, as the quantizer searches (arXiv
2412.03069, figures 4 and 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext import nearest_code
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.data import read_batches
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.precision import arithmetic

from .preprocess import CenterCropDataset, collate, digest_of, evenly_spread, to_float

CODEBOOKS = ("joint", "semantic", "pixel")


@dataclass(frozen=True)
class Clusters:
    """The images of a data set by their code in one codebook.

    Attributes:
        name: of the tokenizer.
        by: ``joint``, ``semantic`` or ``pixel``.
        codes: K.
        assigned: each image's code, [N] int64 on the CPU.
    """

    name: str
    by: str
    codes: int
    assigned: Tensor

    @property
    def title(self) -> str:
        """The tokenizer and the codebook."""
        return f"{self.name}, {self.by}"

    @property
    def counts(self) -> Tensor:
        """Images of each code, [K] int64."""
        return torch.bincount(self.assigned, minlength=self.codes)

    def largest_first(self) -> list[tuple[int, int]]:
        """(code, images) of every code that has any; the lower code first on a tie."""
        counts, order = self.counts.sort(descending=True, stable=True)
        pairs = zip(order.tolist(), counts.tolist(), strict=True)
        return [(code, count) for code, count in pairs if count]

    def members(self, code: int, limit: int) -> list[int]:
        """The numbers of a code's images, at most ``limit``, evenly spread over the data."""
        found = (self.assigned == code).nonzero().flatten().tolist()
        return evenly_spread(found, limit)


def codebooks_of(model: TokenFlowTokenizer, asked: Sequence[str] | None) -> list[str]:
    """Those of ``asked`` that the tokenizer has; by default all that differ.

    With one branch there is one codebook, ``joint`` by another name.
    """
    branches = model.config.branches
    if asked is None:
        return [by for by in CODEBOOKS if by in branches or (by == "joint" and len(branches) > 1)]
    return [by for by in CODEBOOKS if by in asked and (by == "joint" or by in branches)]


def nearest(model: TokenFlowTokenizer, h: Tensor, by: str) -> Tensor:
    """The code of each image's mean feature.

    Args:
        h: features [B, sum(dims), rows, columns], as ``model.features`` gives them.
        by: the codebook to look in; the tokenizer must have it.

    Returns:
        [B] int64.
    """
    branches, quantizer = model.config.branches, model.quantizer
    groups = range(len(branches)) if by == "joint" else (branches.index(by),)
    means = h.mean(dim=(2, 3)).float().split(quantizer.dims, dim=1)
    return nearest_code(
        torch.cat([means[g] for g in groups], dim=1),
        torch.cat([quantizer.codebooks[g].float() for g in groups], dim=1),
        [quantizer.dims[g] for g in groups],
        # A group's weight says how it counts beside the others: alone it is all there is.
        [quantizer.weights[g] for g in groups] if by == "joint" else None,
        quantizer.l2_norm,
    )


@torch.no_grad()
def assign(
    model: TokenFlowTokenizer,
    images: CenterCropDataset,
    codebooks: Sequence[str],
    group: Processes,
    *,
    batch: int = 32,
    workers: int = 0,
    dtype: str = "float32",
) -> tuple[Tensor, str]:
    """The code of every image in each codebook; the images are dealt out to the processes.

    Returns:
        ([len(codebooks), N] int64 on the CPU, SHA-256 of the images' pixels), on every process.
    """
    mine = range(group.rank, len(images), group.world)
    loader = read_batches(images, collate, batch_size=batch, sampler=mine, num_workers=workers)
    with tqdm(total=len(mine), unit="image", disable=not group.first) as bar:
        found: list[tuple[Any, ...]] = []
        for indices, pixels, _, digests in loader:
            with arithmetic(group.device, dtype):
                h = model.features(to_float(pixels.to(group.device)))
            codes = [nearest(model, h, by).tolist() for by in codebooks]
            found += zip(indices, digests, *codes, strict=True)
            bar.update(len(indices))
    rows = sorted(row for part in group.gather(found) for row in part)
    assigned = torch.tensor([row[2:] for row in rows]).T
    return assigned, digest_of(row[1] for row in rows)
