"""Which parts of known pictures are nearest to a code, and how often each code is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.evaluation.clusters import Clusters, codebooks_of, nearest
from tokenflow_ext.train.evaluation.preprocess import CenterCropDataset, to_float

from .codes import Codes
from .indices import codes_of
from .layout import Layout, Place
from .pictures import features_after


@torch.no_grad()
def step_rows(
    tokenizer: TokenFlowTokenizer, codes: Sequence[Codes], h: Tensor, indices: Tensor
) -> list[list[Tensor]]:
    """What each step's tokens stand for: the features that earlier steps leave, averaged over each
    place of the scale.

    The nearest code of a row is its token (arXiv 2412.03069, section 3.1).

    Args:
        codes: of each index.
        h: features [B, D, rows, columns].
        indices: as the tokenizer has them, [B, ...].

    Returns:
        for each index, comparable rows [B, h * w, D'] of each step, see :class:`.codes.Codes`.
    """
    layout, grid = Layout.of(tokenizer), (h.shape[2], h.shape[3])
    found: list[list[Tensor]] = [[] for _ in codes]
    for step, (scale, part) in enumerate(layout.steps):
        rest = h.float()
        if step:
            rest = rest - features_after(tokenizer, layout, indices, step - 1, grid)
        rows = F.adaptive_avg_pool2d(rest, layout.scales[scale]).flatten(2).mT
        for own, one in zip(found, codes, strict=True):
            own.append(one.comparable(rows[..., one.columns], part))
    return found


@dataclass(frozen=True)
class Patch:
    """A part of a known picture: the picture's number, the part's place and its own code."""

    picture: int
    place: Place
    code: int


class PatchIndex:
    """The patches of a data set's pictures at every step, by the codes of one index.

    Args:
        layout: of the tokenizer's tokens.
        group: whose index it is, from 0.
        codes: of the index.
        images: the pictures; they are read again when they are shown.
        tokens: of all pictures and groups, [N, L] int64, see :class:`.layout.Layout`.
        rows: comparable rows [N, h * w, D'] of each step.
        clusters: the pictures by the code of their mean feature, for each codebook.

    Attributes:
        usage: how often each code is a token, at each step, [S, K] int64.
    """

    def __init__(
        self,
        layout: Layout,
        group: int,
        codes: Codes,
        images: CenterCropDataset,
        tokens: Tensor,
        rows: list[Tensor],
        clusters: list[Clusters],
    ) -> None:
        self.layout, self.group, self.images = layout, group, images
        self.tokens, self._rows, self.clusters = tokens, rows, clusters
        steps = [layout.numbers(step, group) for step in range(len(rows))]
        self.usage = torch.stack(
            [
                torch.bincount(tokens[:, list(numbers)].flatten(), minlength=len(codes))
                for numbers in steps
            ]
        )
        self.codes = codes.coloured_by(self.hits)

    @property
    def hits(self) -> Tensor:
        """How often each code is a token, at all steps, [K] int64."""
        return self.usage.sum(dim=0)

    def step_of(self, code: int) -> int:
        """The step at which a code has the largest share of the tokens."""
        return int((self.usage[:, code] / self.usage.sum(dim=1)).argmax())

    def searched(self, step: int) -> int:
        """How many patches there are at a step."""
        return self._rows[step].shape[0] * self._rows[step].shape[1]

    def nearest(self, code: int, step: int, count: int) -> list[Patch]:
        """The patches at a step that are nearest to a code, nearest first, at most ``count``."""
        rows = self._rows[step].flatten(0, 1)
        row = self.codes.row(code, self.layout.steps[step][1])
        distances = (rows - row).square().sum(dim=1)
        order = distances.argsort(stable=True)[:count].tolist()
        numbers = self.layout.numbers(step, self.group)
        found = []
        for at in order:
            picture, place = divmod(at, len(numbers))
            number = numbers[place]
            code_there = int(self.tokens[picture, number])
            found.append(Patch(picture, self.layout.place(number), code_there))
        return found

    def pixels(self, patch: Patch) -> np.ndarray:
        """The patch, uint8 [h, w, 3].

        Raises:
            BrokenImageError: a file that could be read before and cannot now.
        """
        image = self.images[patch.picture][1]
        left, top, right, bottom = patch.place.box(image.shape[-1])
        return image[:, top:bottom, left:right].permute(1, 2, 0).numpy()


@torch.no_grad()
def indices_of(
    tokenizer: TokenFlowTokenizer, images: CenterCropDataset, name: str, batch: int = 32
) -> list[PatchIndex]:
    """One for each index of a tokenizer; every picture is encoded once.

    Args:
        images: the pictures.
        name: of the tokenizer, in titles.
        batch: pictures encoded at once.
    """
    layout, codes = Layout.of(tokenizer), codes_of(tokenizer)
    device = next(tokenizer.parameters()).device
    tokens, rows, assigned = [], [], []
    with tqdm(total=len(images), unit="image", desc=f"patches of {name}") as bar:
        for start in range(0, len(images), batch):
            numbers = range(start, min(start + batch, len(images)))
            pixels = torch.stack([images[number][1] for number in numbers])
            h = tokenizer.features(to_float(pixels.to(device)))
            found = tokenizer.quantizer.encode(h)
            tokens.append(found.flatten(1).cpu())
            by_index = step_rows(tokenizer, codes, h, found)
            rows.append([[one.cpu() for one in steps] for steps in by_index])
            assigned.append([part.cpu() for part in _assigned(tokenizer, codes, h)])
            bar.update(len(numbers))
    joined = [torch.cat(parts) for parts in zip(*assigned, strict=True)]
    titles = _titles(tokenizer, codes)
    made = []
    for group, one in enumerate(codes):
        clusters = [
            Clusters(name, by, len(one), row)
            for (own, by), row in zip(titles, joined, strict=True)
            if own == group
        ]
        own_rows = [torch.cat(parts) for parts in zip(*(r[group] for r in rows), strict=True)]
        made.append(PatchIndex(layout, group, one, images, torch.cat(tokens), own_rows, clusters))
    return made


def _titles(tokenizer: TokenFlowTokenizer, codes: Sequence[Codes]) -> list[tuple[int, str]]:
    """(index, by which codebook) of each clustering of pictures: as the analysis has them, or of
    each index of a quantizer of the family."""
    if tokenizer.config.quantizer.kind == "family":
        branches = tokenizer.config.branches
        shared = "joint" if len(branches) > 1 else branches[0]
        return [(group, one.name or shared) for group, one in enumerate(codes)]
    return [(0, by) for by in codebooks_of(tokenizer, None)]


def _assigned(tokenizer: TokenFlowTokenizer, codes: Sequence[Codes], h: Tensor) -> list[Tensor]:
    """The code [B] of each picture's mean feature, for each of the titles."""
    if tokenizer.config.quantizer.kind == "family":
        means = h.float().mean(dim=(2, 3))
        return [one.find(one.comparable(means[:, one.columns])) for one in codes]
    return [nearest(tokenizer, h, by) for _, by in _titles(tokenizer, codes)]
