"""SimVQ: a frozen table of codes behind a learned linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops import Size
from .quantizer import MultiScaleQuantizer


class ProjectedQuantizer(MultiScaleQuantizer):
    """`MultiScaleQuantizer` whose codes are a frozen random table times a learned linear layer
    (SimVQ, arXiv 2411.02038): every step moves all codes, so none dies.

    The loss of the codes reaches the layer through the chosen codes. Nothing restarts them and no
    k-means sets them.

    Args:
        codebook_size, dims, scales: as for `MultiScaleQuantizer`.
        bias: whether the layers have one, as the original's has.
        options: the others of `MultiScaleQuantizer`, but for `codebook_update`.

    Attributes:
        projections: one layer for each group.

    Raises:
        ValueError, TypeError: as `MultiScaleQuantizer`.
    """

    def __init__(
        self,
        codebook_size: int,
        dims: Sequence[int],
        scales: Sequence[int | Size],
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        if "codebook_update" in options:
            raise TypeError(
                "codebook_update is no option of ProjectedQuantizer: a gradient moves it"
            )
        super().__init__(codebook_size, dims, scales, **options)
        self.projections = nn.ModuleList(nn.Linear(d, d, bias=bias) for d in self.dims)
        self.codebooks.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tables: normal with variance 1 / D; layers: torch's own; statistics: zero."""
        super().reset_parameters()
        with torch.no_grad():
            for codebook in self.codebooks:
                codebook.normal_(std=codebook.shape[1] ** -0.5)
        # The base class fills its parameters before there are layers.
        for projection in getattr(self, "projections", ()):
            projection.reset_parameters()

    def _tables(self) -> list[Tensor]:
        groups = zip(self.projections, self.codebooks, strict=True)
        tables = []
        for projection, codebook in groups:
            with torch.autocast(codebook.device.type, enabled=False):
                tables.append(projection(codebook))
        return tables

    def init_kmeans(self, features: Tensor, iterations: int = 10) -> None:
        """Raises NotImplementedError: no set of codes is wanted of a layer's outputs."""
        raise NotImplementedError("k-means sets codes, and here they are outputs of a layer")

    def restart_dead_codes(self, features: Tensor, threshold: float = 0.05) -> int:
        """Raises NotImplementedError: codes are outputs of a layer that moves them all."""
        raise NotImplementedError("a restart sets codes, and here they are outputs of a layer")
