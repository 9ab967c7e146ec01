"""The shape of a VAR transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenflow_ext.models.serialization.config import (
    CODES_LIMIT,
    DEPTH_LIMIT,
    GRID_LIMIT,
    SCALES_LIMIT,
    WIDTH_LIMIT,
    from_plain,
    need,
    to_plain,
    within,
)
from tokenflow_ext.models.serialization.files import shown

if TYPE_CHECKING:
    from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer

_SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PRESETS: dict[str, dict[str, Any]] = {
    **{f"d{depth}": {"depth": depth, "scales": _SCALES_256} for depth in (16, 20, 24, 30)},
    "d36": {"depth": 36, "scales": _SCALES_512, "shared_adaln": True},
}
"""The released models: depths 16 to 30 for 256 pixels, 36 for 512."""


@dataclass(frozen=True)
class VarConfig:
    """Everything that decides a :class:`~tokenflow_ext.models.VAR`'s shape.

    Attributes:
        depth: blocks.
        width: channels; 0 is 64 times the depth.
        heads: of the attention; 0 is the depth.
        mlp_ratio: hidden channels of the MLP by ``width``.
        classes: conditions; one more is that of no class.
        class_names: theirs, in order; empty where they have numbers alone.
        codebook_size: image tokens, the codes of the image tokenizer.
        feature_dim: channels of the image tokenizer's codes.
        scales: sides of the image tokenizer's scales; the first is 1.
        shared_adaln: one linear layer gives the adaptive norms of all blocks, and each block adds
            six rows of its own.
        l2_attention: queries and keys have unit length, and each head a scale of its own.
        class_drop: share of the classes that training replaces by no class.
        drop_path: share of the last block's branches that training drops, linearly growing from 0
            at the first; below 0 it is depth / 240, the released models'.
        norm_eps: of every norm.
    """

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    classes: int = 1000
    class_names: tuple[str, ...] = ()
    codebook_size: int = 4096
    feature_dim: int = 32
    scales: tuple[int, ...] = _SCALES_256
    shared_adaln: bool = False
    l2_attention: bool = True
    class_drop: float = 0.1
    drop_path: float = -1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        within("var", 1, DEPTH_LIMIT, depth=self.depth)
        within("var", 0, WIDTH_LIMIT, width=self.width, heads=self.heads)
        within("var", 1e-3, 1e3, mlp_ratio=self.mlp_ratio)
        within("var", 1, CODES_LIMIT, classes=self.classes, codebook_size=self.codebook_size)
        within("var", 1, WIDTH_LIMIT, feature_dim=self.feature_dim)
        within("var", 0, 1, class_drop=self.class_drop, norm_eps=self.norm_eps)
        need(
            len(self.class_names) in (0, self.classes)
            and len(set(self.class_names)) == len(self.class_names),
            f"var.class_names must be {self.classes} different names or none, got "
            f"{len(set(self.class_names))}",
        )
        need(self.drop_path < 1, f"var.drop_path must be below 1, got {shown(self.drop_path)}")
        need(
            0 < len(self.scales) <= SCALES_LIMIT
            and self.scales[0] == 1
            and all(0 < side <= GRID_LIMIT for side in self.scales),
            "var.scales must be positive sides and begin with 1 (the class predicts the first "
            f"scale), got {shown(self.scales)}",
        )
        need(
            self.channels % self.attention_heads == 0,
            f"var.width must be a multiple of var.heads, got {self.channels} and "
            f"{self.attention_heads}",
        )

    @property
    def channels(self) -> int:
        """The width that is meant."""
        return self.width or 64 * self.depth

    @property
    def attention_heads(self) -> int:
        """The heads that are meant."""
        return self.heads or self.depth

    def drop_path_of(self, block: int) -> float:
        """The share of a block's branches that training drops."""
        last = 0.1 * self.depth / 24 if self.drop_path < 0 else self.drop_path
        return last * block / max(1, self.depth - 1)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return sum(side * side for side in self.scales)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VarConfig:
        """A released model's shape.

        Args:
            name: one of :data:`PRESETS`.
            changes: fields with other values.

        Raises:
            ConfigError: another name.
        """
        need(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}, got {shown(name)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def for_tokenizer(cls, tokenizer: TokenFlowTokenizer, **changes: Any) -> VarConfig:
        """The shape that fits an image tokenizer.

        Args:
            changes: the other fields.
        """
        tokenizer.config.need_one_index("VAR")
        quantizer = tokenizer.config.quantizer
        return cls(
            codebook_size=quantizer.codebook_size,
            feature_dim=sum(tokenizer.config.dims),
            scales=quantizer.scales,
            **changes,
        )

    def class_numbers(self, names: Sequence[str]) -> list[int]:
        """Classes by their names; where no class has that name, a whole number is itself one.

        Raises:
            ValueError: no such class.
        """
        known = {name: number for number, name in enumerate(self.class_names)}
        numbers = []
        for name in names:
            plain = name not in known and name.isascii() and name.isdigit()
            number = int(name) if plain else known.get(name, -1)
            if not 0 <= number < self.classes:
                some = ", ".join(map(repr, self.class_names[:8]))
                raise ValueError(
                    f"there is no class {shown(name)} among the {self.classes}"
                    + (
                        f" ({some}{', ...' * (self.classes > 8)})"
                        if some
                        else ", which are numbers"
                    )
                )
            numbers.append(number)
        return numbers

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON or YAML."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VarConfig:
        """Inverse of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type, named by its path.
        """
        return from_plain(cls, values)
