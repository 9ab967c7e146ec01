"""RoPE (arXiv 2104.09864) and its scaled forms, under the names of transformers'
``rope_parameters``.

In float64: angles of far positions are off by some 1e-4 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tokenflow_ext.models.serialization.config import ConfigError, from_plain

_ORIGINAL = "original_max_position_embeddings"
# What each kind needs, and what it takes besides.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (_ORIGINAL,),
        (
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "proportional": ((), ("factor",)),
}


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles; ``rope_theta`` is the backbone's own field.

    Attributes:
        rope_type: ``default``, ``linear``, ``dynamic`` (NTK), ``yarn`` (arXiv 2309.00071),
            ``longrope`` (arXiv 2402.13753), ``llama3``, or ``proportional``.
        partial_rotary_factor: share of a head's channels that turn, the first ones. With
            ``proportional`` it is the share of the frequencies that are not 0, over all channels.
        factor, ...: as transformers has them; None where they are not given.
    """

    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        kind = self.rope_type
        if kind not in _KINDS:
            raise ConfigError(f"rope.rope_type must be one of {', '.join(_KINDS)}, got {kind!r}")
        needed, taken = _KINDS[kind]
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in ("rope_type", "partial_rotary_factor"):
                continue
            if name in needed and value is None:
                raise ConfigError(f"rope.{name} must be given for rope_type {kind!r}")
            if value is not None and name not in needed + taken:
                raise ConfigError(f"rope.{name} is no parameter of rope_type {kind!r}, got {value}")
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (math.isfinite(number) and number >= 0):
                    raise ConfigError(f"rope.{name} must be finite, 0 or more, got {value}")
        for name in ("factor", _ORIGINAL):
            if getattr(self, name) == 0:
                raise ConfigError(f"rope.{name} must be positive, got {getattr(self, name)}")
        for name in ("short_factor", "long_factor"):
            if 0 in (getattr(self, name) or ()):
                raise ConfigError(f"rope.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(
                f"rope.partial_rotary_factor must be in (0, 1], got {self.partial_rotary_factor}"
            )
        low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
        if kind == "llama3" and not 0 < low < high:
            raise ConfigError(
                "rope.high_freq_factor must be greater than low_freq_factor and both positive, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def _needed(self, name: str) -> Any:
        """A parameter that the kind needs, and so has."""
        value = getattr(self, name)
        assert value is not None, name
        return value

    def check(self, head_dim: int) -> None:
        """That heads of this width can be turned so.

        Raises:
            ConfigError: naming what does not fit.
        """
        turned = self.turned(head_dim)
        if turned < 2 or turned % 2 or (self.rope_type == "dynamic" and turned < 4):
            raise ConfigError(
                f"rope.partial_rotary_factor {self.partial_rotary_factor} turns {turned} of a "
                f"head's {head_dim} channels: it must be an even number"
                + (", 4 or more" if self.rope_type == "dynamic" else "")
            )
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if values is not None and len(values) != turned // 2:
                raise ConfigError(
                    f"rope.{name} must have {turned // 2} numbers, one for each pair of channels, "
                    f"got {len(values)}"
                )

    def turned(self, head_dim: int) -> int:
        """Channels of a head that turn."""
        if self.rope_type == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def reach(self, max_positions: int) -> int:
        """The longest sequence: ``max_position_embeddings`` is the unscaled model's in the kinds
        that have no length of the unscaled model besides."""
        scaled = self.rope_type in ("linear", "dynamic")
        return int(max_positions * max(self._needed("factor"), 1.0)) if scaled else max_positions

    def frequencies(
        self,
        theta: float,
        head_dim: int,
        max_positions: int,
        length: int,
        device: torch.device | None = None,
    ) -> tuple[Tensor, float]:
        """Angles from a position to the next, and what cos and sin are multiplied by.

        Args:
            theta: the base.
            max_positions: ``max_position_embeddings``.
            length: of the sequence; ``dynamic`` and ``longrope`` depend on it.

        Returns:
            ([turned / 2] float64, factor).
        """

        def even(end: int) -> Tensor:
            return torch.arange(0, end, 2, dtype=torch.float64, device=device)

        turned = self.turned(head_dim)
        if self.rope_type == "dynamic":
            factor = self._needed("factor")
            times = factor * max(length, max_positions) / max_positions - (factor - 1)
            theta = theta * times ** (turned / (turned - 2))
        if self.rope_type == "proportional":
            some = int(self.partial_rotary_factor * head_dim // 2)
            own = theta ** -(even(2 * some) / head_dim) / (self.factor or 1.0)
            return torch.nn.functional.pad(own, (0, head_dim // 2 - some)), 1.0
        own = theta ** -(even(turned) / turned)
        if self.rope_type == "linear":
            return own / self._needed("factor"), 1.0
        if self.rope_type == "yarn":
            return self._yarn(own, theta, max_positions)
        if self.rope_type == "longrope":
            original = self._needed("original_max_position_embeddings")
            by = self.long_factor if length > original else self.short_factor
            scale = self.factor or max_positions / original
            factor = 1.0
            if scale > 1:
                factor = math.sqrt(1 + math.log(scale) / math.log(original))
            if self.attention_factor is not None:
                factor = self.attention_factor
            return own / torch.tensor(by, dtype=torch.float64, device=device), factor
        if self.rope_type == "llama3":
            return self._llama3(own), 1.0
        return own, 1.0

    def _yarn(self, own: Tensor, theta: float, max_positions: int) -> tuple[Tensor, float]:
        original, turned = self._needed("original_max_position_embeddings"), 2 * len(own)
        scale = self.factor or max_positions / original

        def channel(rotations: float) -> float:
            """Which pair of channels turns so often over the unscaled model's length."""
            of_length = original / (rotations * 2 * math.pi)
            return turned * math.log(of_length) / (2 * math.log(theta))

        low, high = channel(self.beta_fast or 32), channel(self.beta_slow or 1)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, turned - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(len(own), dtype=torch.float64, device=own.device)
        interpolated = ((pair - low) / (high - low)).clamp(0, 1)

        def magnitude(times: float) -> float:
            return 0.1 * times * math.log(scale) + 1.0 if scale > 1 else 1.0

        factor = magnitude(1.0)
        if self.mscale and self.mscale_all_dim:
            factor = magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        if self.attention_factor is not None:
            factor = self.attention_factor
        return own * (interpolated / scale + 1 - interpolated), factor

    def _llama3(self, own: Tensor) -> Tensor:
        """Long waves are scaled, short ones left alone, those between in between."""
        rotations = own * self._needed("original_max_position_embeddings") / (2 * math.pi)
        low, high = self._needed("low_freq_factor"), self._needed("high_freq_factor")
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return own * (kept + (1 - kept) / self._needed("factor"))

    @classmethod
    def from_transformers(cls, parameters: Mapping[str, Any]) -> RopeConfig:
        """From ``rope_parameters`` without their ``rope_theta``, or from a ``rope_scaling``.

        Raises:
            ConfigError: a kind or an entry that is not supported, or a value of the wrong type.
        """
        values = {name: value for name, value in parameters.items() if value is not None}
        older = values.pop("type", None)
        values.setdefault("rope_type", older or "default")
        return from_plain(cls, values, "rope")

    def to_transformers(self) -> dict[str, Any]:
        """The inverse of :meth:`from_transformers`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.partial_rotary_factor == 1.0:
            del values["partial_rotary_factor"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }
