"""How the tokens of an image are drawn: the settings of multi-step sampling, and their presets."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Config = TypeVar("Config", bound="SamplingConfig")

PRESETS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "three": ((1200, 100, 1), (0.8, 0.8, 0.0)),
    "two": ((1200, 1), (0.8, 0.0)),
    "one": ((600,), (0.6,)),
}
"""(top_k, top_p) by the number of steps (arXiv 2412.03069, section 4.1 and Table 6). Three are the
best of the paper, one draws every scale once."""


@dataclass
class SamplingConfig:
    """Settings of multi-step sampling (arXiv 2412.03069, section 3.3).

    Every scale but the first is drawn in several steps. `top_k` and `top_p` have a number for each.

    Raises:
        ValueError: the settings do not name as many steps, or none.
    """

    top_k: tuple[int, ...] = (1200, 100, 1)
    """Of each step; <= 0 is off, 1 is the argmax."""
    top_p: tuple[float, ...] = (0.8, 0.8, 0.0)
    """Of each step; <= 0 is off."""
    min_p: float | tuple[float, ...] = 0.0
    """Of each step, or one number for all; <= 0 is off."""
    guidance: float = 7.5
    """cfg of the paper, reached at the last scale."""
    temperature: float = 1.0
    """What logits are divided by, after guidance."""

    def __post_init__(self) -> None:
        if len(self.top_k) != len(self.top_p) or not self.top_k:
            raise ValueError(
                "top_k and top_p must name as many steps, at least one, got "
                f"{reprlib.repr(self.top_k)} and {reprlib.repr(self.top_p)}"
            )
        if isinstance(self.min_p, Sequence) and len(self.min_p) != len(self.top_k):
            raise ValueError(
                f"min_p must be one number or one for each of {len(self.top_k)} steps, got "
                f"{reprlib.repr(self.min_p)}"
            )

    @classmethod
    def preset(cls: type[Config], name: str, **settings: Any) -> Config:
        """The settings of `PRESETS`, with others beside them.

        Raises:
            ValueError: no preset of that name.
            TypeError: a setting that there is not, or that the preset has.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        top_k, top_p = PRESETS[name]
        return cls(top_k=top_k, top_p=top_p, **settings)

    def replace(self: Config, **settings: Any) -> Config:
        """A copy with other settings.

        Raises:
            TypeError: a setting that there is not.
        """
        return dataclasses.replace(self, **settings)
