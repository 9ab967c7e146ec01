"""The configuration of a vision tower."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenflow_ext.models.serialization.config import (
    DEPTH_LIMIT,
    SIDE_LIMIT,
    WIDTH_LIMIT,
    need,
    within,
)

TOWER_KINDS = ("none", "clip", "vitamin", "siglip", "efficientnet_lite0")


@dataclass(frozen=True)
class TowerConfig:
    """A vision tower: the teacher's, or the one that the semantic encoder starts from.

    Attributes:
        kind: ``clip`` (ViT), ``vitamin``, ``siglip``, ``efficientnet_lite0``, or ``none``.
        image_size: side in pixels that the tower's positions are made for.
        patch_size: pixels of the tower's input a token covers, per side.
        width: channels of the tower's tokens.
        depth, heads, mlp_width: the transformer's shape (``clip`` and ``siglip``). ``depth`` counts
            the published model's layers; SigLIP's features leave before the last one.
        variant: the timm model's name (``vitamin``).
        projection: width after the visual projection (``clip`` as a teacher); 0 is none.
        input_scale: factor of a bicubic upsampling of the images before the tower.
    """

    kind: str = "none"
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    variant: str = ""
    projection: int = 0
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        need(
            self.kind in TOWER_KINDS,
            f"tower kind must be one of {', '.join(TOWER_KINDS)}, got {self.kind!r}",
        )
        if self.kind == "none":
            return
        sides = {"image_size": self.image_size, "patch_size": self.patch_size}
        within("tower", 1, SIDE_LIMIT, **sides)
        within("tower", 1, WIDTH_LIMIT, width=self.width)
        within("tower", 0, WIDTH_LIMIT, projection=self.projection)
        within("tower", 1 / 64, 64, input_scale=self.input_scale)
        if self.kind in ("clip", "siglip"):
            within("tower", 1, DEPTH_LIMIT, depth=self.depth)
            within("tower", 1, WIDTH_LIMIT, heads=self.heads, mlp_width=self.mlp_width)
            need(
                self.width % self.heads == 0,
                f"tower.width must be a multiple of tower.heads, got {self.width} and {self.heads}",
            )
        if self.kind == "siglip":
            need(self.depth >= 2, f"tower.depth must be 2 or more for siglip, got {self.depth}")
        if self.kind == "vitamin":
            # A plain name: timm would fetch "hf-hub:..." from the network and read "local-dir:...",
            # and a checkpoint's configuration must lead to neither.
            need(
                re.fullmatch(r"vitamin_\w+", self.variant, re.ASCII) is not None,
                "tower.variant must be the name of one of timm's ViTamin models, such as "
                f"vitamin_xlarge_256, for kind 'vitamin', got {self.variant!r}",
            )
        else:
            need(
                self.variant == "",
                f"tower.variant is for kind 'vitamin' alone, got {self.variant!r} with "
                f"{self.kind!r}",
            )
        need(
            self.projection == 0 or self.kind == "clip",
            f"tower.projection is for kind 'clip' alone, got {self.projection} with {self.kind!r}",
        )

    @property
    def enabled(self) -> bool:
        """Whether there is a tower at all."""
        return self.kind != "none"

    @property
    def out_dim(self) -> int:
        """Channels of the tokens that leave the tower."""
        return self.projection or self.width

    def grid(self, size: int) -> int:
        """Tokens a side for an image ``size`` pixels wide, as handed to the tokenizer."""
        return round(size * self.input_scale) // self.patch_size
