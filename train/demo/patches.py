"""Which parts of known pictures are nearest to a code, and how often each code is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.evaluation.clusters import Clusters, codebooks_of, nearest
from tokenflow_ext.train.evaluation.preprocess import CenterCropDataset, to_float

from .codes import Codes, comparable
from .pictures import Place, sides


@torch.no_grad()
def scale_rows(tokenizer: TokenFlowTokenizer, h: Tensor, tokens: Tensor) -> list[Tensor]:
    """What each scale's tokens stand for: the features that earlier scales leave, averaged over
    each place of the scale.

    The nearest code of a row is its token (arXiv 2412.03069, section 3.1).

    Args:
        h: features [B, D, rows, columns].
        tokens: [B, L].

    Returns:
        comparable rows [B, h * w, D] of each scale, see :func:`.codes.comparable`.
    """
    quantizer = tokenizer.quantizer
    grid = (h.shape[2], h.shape[3])
    found = []
    for scale, size in enumerate(sides(tokenizer)):
        rest = h.float()
        if scale:
            rest = rest - quantizer.decode(tokens, scale, grid)
        rows = F.adaptive_avg_pool2d(rest, size).flatten(2).mT
        found.append(comparable(quantizer, rows))
    return found


@dataclass(frozen=True)
class Patch:
    """A part of a known picture: the picture's number, the part's place and its own code."""

    picture: int
    place: Place
    code: int


class PatchIndex:
    """The patches of a data set's pictures at every scale.

    Args:
        tokenizer: the tokenizer.
        codes: its codes.
        images: the pictures; they are read again when they are shown.
        batch: pictures encoded at once.
        name: of the tokenizer, in titles.

    Attributes:
        tokens: [N, L] int64.
        usage: how often each code is a token, at each scale, [S, K] int64.
        clusters: the pictures by the code of their mean feature, for each codebook.
    """

    @torch.no_grad()
    def __init__(
        self,
        tokenizer: TokenFlowTokenizer,
        codes: Codes,
        images: CenterCropDataset,
        name: str,
        batch: int = 32,
    ) -> None:
        self.images, self.codes, self.sides = images, codes, sides(tokenizer)
        device = next(tokenizer.parameters()).device
        codebooks = codebooks_of(tokenizer, None)
        tokens, rows, assigned = [], [], []
        with tqdm(total=len(images), unit="image", desc=f"patches of {name}") as bar:
            for start in range(0, len(images), batch):
                numbers = range(start, min(start + batch, len(images)))
                pixels = torch.stack([images[number][1] for number in numbers])
                h = tokenizer.features(to_float(pixels.to(device)))
                found = tokenizer.quantizer.encode(h)
                tokens.append(found.cpu())
                rows.append([one.cpu() for one in scale_rows(tokenizer, h, found)])
                assigned.append(torch.stack([nearest(tokenizer, h, by).cpu() for by in codebooks]))
                bar.update(len(numbers))
        self.tokens = torch.cat(tokens)
        self._rows = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        self.usage = torch.stack(
            [
                torch.bincount(part.flatten(), minlength=len(codes))
                for part in self.tokens.split([h * w for h, w in self.sides], dim=1)
            ]
        )
        parts = torch.cat(assigned, dim=1)
        self.clusters = [
            Clusters(name, by, len(codes), row) for by, row in zip(codebooks, parts, strict=True)
        ]

    @property
    def hits(self) -> Tensor:
        """How often each code is a token, at all scales, [K] int64."""
        return self.usage.sum(dim=0)

    def scale_of(self, code: int) -> int:
        """The scale at which a code has the largest share of the tokens."""
        return int((self.usage[:, code] / self.usage.sum(dim=1)).argmax())

    def searched(self, scale: int) -> int:
        """How many patches there are at a scale."""
        return self._rows[scale].shape[0] * self._rows[scale].shape[1]

    def nearest(self, code: int, scale: int, count: int) -> list[Patch]:
        """The patches at a scale that are nearest to a code, nearest first, at most ``count``."""
        rows = self._rows[scale].flatten(0, 1)
        distances = (rows - self.codes.rows[code]).square().sum(dim=1)
        order = distances.argsort(stable=True)[:count].tolist()
        height, width = self.sides[scale]
        first = sum(h * w for h, w in self.sides[:scale])
        found = []
        for at in order:
            picture, number = divmod(at, height * width)
            place = Place(scale, number // width, number % width, height, width)
            found.append(Patch(picture, place, int(self.tokens[picture, first + number])))
        return found

    def pixels(self, patch: Patch) -> np.ndarray:
        """The patch, uint8 [h, w, 3].

        Raises:
            BrokenImageError: a file that could be read before and cannot now.
        """
        image = self.images[patch.picture][1]
        left, top, right, bottom = patch.place.box(image.shape[-1])
        return image[:, top:bottom, left:right].permute(1, 2, 0).numpy()
