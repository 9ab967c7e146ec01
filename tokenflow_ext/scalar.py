"""Scalar quantization: every channel by itself, without a table of codes.

Signs (LFQ, arXiv 2310.05737; BSQ, arXiv 2406.07548) and levels (FSQ, arXiv 2309.15505), along the
residual pyramid in one call. `quantize` is the pyramid with its losses and gradient; `signs` and
`levels` make the tables that it quantizes with; `pack_digits` and `unpack_digits` go between digits
and token indices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .ops import Size, flatten_sizes, with_gradient
from .scalar_gradients import STAND_INS, Quantize, Rows, StandIn, in_place_of_values

Bound = Literal["tanh", "symmetric", "clamp"]
BOUNDS: tuple[Bound, ...] = ("tanh", "symmetric", "clamp")
#: Widening of FSQ's range, so that the outermost levels are reached.
_FSQ_EPS = 1e-3


class Tables(NamedTuple):
    """What channels are quantized with: a number's digit is how many thresholds it exceeds."""

    thresholds: Tensor
    """[R, T, D], ascending; a channel with fewer is filled with infinities."""
    values: Tensor
    """[R, T + 1, D]: the value of each digit."""
    curves: Tensor | None = None
    """[R, 4, D], of levels: inner, shift, outer and offset of what a number is before it is
    rounded, outer * t(inner * z + shift) + offset, t being tanh or the cut to [-1, 1]."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Tables:
        """What a function makes of each of them."""
        curves = None if self.curves is None else function(self.curves)
        return Tables(function(self.thresholds), function(self.values), curves)


class Quantized(NamedTuple):
    """What `quantize` returns. z stands in the place of the values: see there."""

    quantized: Tensor
    """f^, the sum over scales of upsampled values, [B, D, H, W], with the gradient of that of z."""
    indices: Tensor
    """[B, G, L] int64, scale after scale."""
    rows: Tensor
    """What each scale was quantized from, [B, L, D], differentiable; empty unless it was asked for
    or a gradient is."""
    error: Tensor
    """[S]: mean of (value - z)^2 of each scale, with the gradient of z; empty without `errors`."""
    entropy: Tensor
    """[S]: mean over tokens of the entropy of a token's signs; empty without `slopes`."""
    chance: Tensor
    """[S, D]: mean probability of each sign; empty without `slopes`."""


def signs(dim: int, *, value: float = 1.0, rounds: int = 1) -> Tables:
    """Tables of signs: 1 (`value`) above 0, otherwise 0 (`-value`).

    Args:
        dim: channels D.
        value: magnitude in the first round; each further round has half of it.
        rounds: depths of a residual that have tables of their own, R.
    """
    size = value * 0.5 ** torch.arange(rounds, dtype=torch.float64, device="cpu")
    values = torch.stack([-size, size], dim=1)[..., None].expand(-1, -1, dim)
    return Tables(torch.zeros(rounds, 1, dim, dtype=torch.float64, device="cpu"), values)


def levels(counts: Sequence[int], *, bound: Bound = "tanh", rounds: int = 1) -> Tables:
    """Tables of FSQ's levels: values within [-1, 1], evenly spaced, of numbers bounded first.

    Args:
        counts: levels of each channel, at least 2.
        bound: "tanh": FSQ's own, an asymmetric range where the number is even; "symmetric":
            2 / (L - 1) floor((L - 1) (tanh z + 1) / 2 + 1 / 2) - 1 (arXiv 2411.19842, 3.2), also
            for 2 levels; "clamp": the same with the number cut to [-1, 1] in place of tanh.
        rounds: depths of a residual; round k quantizes on a grid L^k times as fine.

    Raises:
        ValueError: a number of levels below 2 or beyond 2^15, or an unknown bound.
    """
    check_levels(counts, bound)
    most, infinity = max(counts), torch.inf
    thresholds = torch.full((most - 1, len(counts)), infinity, dtype=torch.float64, device="cpu")
    values = torch.zeros(most, len(counts), dtype=torch.float64, device="cpu")
    curves = [_curve(count, bound) for count in counts]
    inner, shift, outer, offset = torch.tensor(curves, dtype=torch.float64, device="cpu").T
    for channel, count in enumerate(counts):
        below, at = _level_grid(count, bound)
        thresholds[: count - 1, channel] = below
        values[:count, channel] = at
    depths = torch.arange(rounds, device="cpu").unsqueeze(1)
    finer = torch.tensor(counts, dtype=torch.float64, device="cpu") ** -depths
    by_round = [inner / finer, shift.expand_as(finer), outer * finer, offset * finer]
    return Tables(
        thresholds * finer.unsqueeze(1), values * finer.unsqueeze(1), torch.stack(by_round, dim=1)
    )


def stand_in_of(bound: Bound) -> StandIn:
    """What stands in the place of the values of levels: see `quantize`."""
    return "clamp" if bound == "clamp" else "tanh"


def check_levels(counts: Sequence[int], bound: str) -> None:
    """Whether there are such levels.

    Raises:
        ValueError: see `levels`.
    """
    if not counts or not all(2 <= count <= 1 << 15 for count in counts):
        raise ValueError(
            f"levels must hold one or more numbers from 2 to 32768, got {list(counts)}"
        )
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
    if bound == "tanh" and 2 in counts:
        raise ValueError(f"2 levels need another bound than 'tanh', got {list(counts)}")


def _level_grid(count: int, bound: Bound) -> tuple[Tensor, Tensor]:
    """Thresholds [L - 1], of which a number belongs to the level above, and values [L]."""
    number = torch.arange(count, dtype=torch.float64, device="cpu")
    if bound == "tanh":
        half = (count - 1) * (1 + _FSQ_EPS) / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        shift = _shift(count)
        middle = count // 2
        # round(tanh(z + shift) half - offset) is at least n where z is at least this.
        inner = (number[1:] - middle - 0.5 + offset) / half
        return inner.clamp(-1, 1).atanh() - shift, (number - middle) / middle
    inner = (2 * number[1:] - 1) / (count - 1) - 1
    return (inner.atanh() if bound == "symmetric" else inner), 2 * number / (count - 1) - 1


def _curve(count: int, bound: Bound) -> tuple[float, float, float, float]:
    """Inner, shift, outer and offset of a channel of the first round: see `Tables`."""
    if bound != "tanh":
        return 1.0, 0.0, 1.0, 0.0
    half, offset = (count - 1) * (1 + _FSQ_EPS) / 2, 0.5 if count % 2 == 0 else 0.0
    middle = count // 2
    return 1.0, _shift(count), half / middle, -offset / middle


def _shift(count: int) -> float:
    """What FSQ adds to a number before tanh, so that 0 stays at a level where L is even."""
    return math.atanh((0.5 if count % 2 == 0 else 0.0) / ((count - 1) * (1 + _FSQ_EPS) / 2))


def bounded(z: Tensor, counts: Sequence[int], bound: Bound) -> Tensor:
    """The values of levels before rounding: z [..., D] brought to their range, differentiable."""
    curves = torch.tensor([_curve(count, bound) for count in counts], dtype=z.dtype)
    stand_in = STAND_INS.index(stand_in_of(bound))
    return in_place_of_values(z, curves.T.to(z.device), len(counts), stand_in)


def as_computed(tables: Tables, dtype: torch.dtype, *, inclusive: bool) -> Tables:
    """Tables in the dtype of features, which is what they are compared in.

    Args:
        tables: in float64.
        dtype: float32 or float64.
        inclusive: a number equal to a threshold exceeds it: each is lowered by one place.
    """
    thresholds = tables.thresholds.to(dtype)
    if inclusive:
        # Rounding may have moved it either way: below lies the last number that does not reach it.
        down = torch.full_like(thresholds, -torch.inf)
        reached = (thresholds.double() >= tables.thresholds) & thresholds.isfinite()
        thresholds = torch.where(reached, thresholds.nextafter(down), thresholds)
    return tables._replace(thresholds=thresholds).each(lambda table: table.to(dtype).contiguous())


class TableCache:
    """Tables of scalar codes by dtype and device, made where they are first asked for.

    Args:
        make: the tables in float64.
        inclusive: see `as_computed`.
    """

    def __init__(self, make: Callable[[], Tables], inclusive: bool) -> None:
        self._make, self._inclusive = make, inclusive
        self._made: dict[tuple[torch.dtype, torch.device], Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which are made anew."""
        return {**self.__dict__, "_made": {}}

    def like(self, tensor: Tensor) -> Tables:
        """The tables in the dtype and on the device of a tensor."""
        key = (tensor.dtype, tensor.device)
        if key not in self._made:
            with torch.inference_mode(False):
                tables = as_computed(self._make(), tensor.dtype, inclusive=self._inclusive)
            self._made[key] = tables.each(lambda table: table.to(tensor.device))
        return self._made[key]


def quantize(
    h: Tensor,
    tables: Tables,
    sizes: Sequence[Size],
    *,
    counts: Sequence[int],
    little_endian: bool = True,
    rounds: Sequence[int] | None = None,
    flips: Tensor | None = None,
    upsampling: Literal["bicubic", "bilinear"] = "bicubic",
    stand_in: StandIn = "same",
    slopes: Sequence[float] = (),
    errors: bool = False,
    keep_rows: bool = False,
) -> Quantized:
    """The residual loop with scalar codes: each scale's means are quantized, upsampled, subtracted.

    Values have no gradient: z stands in their place for it, and in the losses. All is computed in
    one pass along the scales, and the gradient in another.

    Args:
        h: [B, D, H, W] float32 or float64.
        tables: in the dtype of h and on its device.
        sizes: (height, width) of every scale, S of them.
        counts: values of each channel of a group; D is a multiple of their number.
        little_endian: see `pack_digits`.
        rounds: which round of the tables each scale takes; the first by default.
        flips: [B, L, D] bool, where the digits of tables of two values are inverted.
        upsampling: how values come to the size of h.
        stand_in: z of a scale's means: "same": themselves; "unit": each group at unit length;
            "tanh" or "clamp": by the curves of the tables.
        slopes: of each scale, the logit of a sign's 1 against its 0 by a unit of z: whose entropies
            are wanted.
        errors: whether those of the values are wanted.
        keep_rows: whether the rows are wanted; with a gradient they are kept anyway.

    Raises:
        ValueError: indices beyond 63 bits.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    return Quantized(
        *with_gradient(Quantize)(
            h,
            tables.thresholds,
            tables.values,
            tables.curves if stand_in in ("tanh", "clamp") else None,
            flips,
            flatten_sizes(sizes),
            [0] * len(sizes) if rounds is None else list(rounds),
            upsampling == "bilinear",
            _places(tuple(counts), little_endian),
            STAND_INS.index(stand_in),
            list(slopes),
            errors,
            keep_rows or (torch.is_grad_enabled() and h.requires_grad),
        )
    )


class QuantizedRows(NamedTuple):
    """What `quantize_rows` returns."""

    quantized: Tensor
    """The sum of every round's codes, [..., D], with the gradient of what stands in their place."""
    indices: Tensor
    """[..., R] int64; empty without counts."""
    codes: Tensor
    """[..., R, D], without a gradient; empty unless they are kept."""


def quantize_rows(
    rows: Tensor,
    tables: Tables,
    *,
    counts: Sequence[int] = (),
    little_endian: bool = True,
    stand_in: StandIn = "same",
    keep_codes: bool = False,
) -> QuantizedRows:
    """Codes of rows without a grid: every round of the tables quantizes what is left.

    Args:
        rows: [..., D] float32 or float64; there may be none.
        tables: in their dtype and on their device.
        counts: values of each channel, D of them, for indices.
        little_endian: see `pack_digits`.
        stand_in: what has the gradient in the place of each round's codes, see `quantize`.
        keep_codes: whether each round's codes are wanted.

    Raises:
        ValueError: indices beyond 63 bits.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    return QuantizedRows(
        *with_gradient(Rows)(
            rows,
            tables.thresholds,
            tables.values,
            tables.curves if stand_in in ("tanh", "clamp") else None,
            _places(tuple(counts), little_endian) if counts else [],
            STAND_INS.index(stand_in),
            keep_codes,
        )
    )


def pack_digits(digits: Tensor, counts: Sequence[int], *, little_endian: bool = True) -> Tensor:
    """Token indices [...] int64 of digits [..., D]: numbers with a digit a channel.

    Args:
        digits: whole numbers, of any dtype.
        counts: values of each channel; their product at most 2^63.
        little_endian: the first channel counts units (FSQ, Open-MAGVIT2), else the last one does
            (vector-quantize-pytorch's LFQ, Infinity).

    Raises:
        ValueError: indices beyond 63 bits, or another number of channels.
    """
    if digits.shape[-1] != len(counts):
        raise ValueError(
            f"digits must have {len(counts)} in the last dimension, got {tuple(digits.shape)}"
        )
    flat = digits.reshape(1, -1, len(counts))
    return pack_groups(flat, counts, little_endian=little_endian).view(digits.shape[:-1])


def pack_groups(digits: Tensor, counts: Sequence[int], *, little_endian: bool = True) -> Tensor:
    """Token indices [B, G, L] int64 of digits [B, L, G * D], D channels a group.

    Args, errors: as for `pack_digits`.
    """
    places = _places(tuple(counts), little_endian)
    return torch.ops.tokenflow_ext.pack_digits(digits.to(torch.int16), places)


def unpack_digits(indices: Tensor, counts: Sequence[int], *, little_endian: bool = True) -> Tensor:
    """Digits [..., D] int64 of token indices [...], the inverse of `pack_digits`."""
    places = torch.tensor(_places(tuple(counts), little_endian), device=indices.device)
    sizes = torch.tensor(counts, device=indices.device)
    return indices.unsqueeze(-1).div(places, rounding_mode="floor") % sizes


@functools.lru_cache(maxsize=256)
def _places(counts: tuple[int, ...], little_endian: bool) -> list[int]:
    """What a digit of each channel counts. One list for all callers: none changes it."""
    order = counts if little_endian else counts[::-1]
    places = [1]
    for count in order:
        places.append(places[-1] * count)
    if places.pop() > 1 << 63:
        raise ValueError(
            f"{len(order)} channels of up to {max(order)} values make indices beyond 63 bits: use "
            "the digits"
        )
    return places if little_endian else places[::-1]
