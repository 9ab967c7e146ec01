"""Scalar quantization: every channel by itself, without a table of codes.

Signs (LFQ, arXiv 2310.05737; BSQ, arXiv 2406.07548) and levels (FSQ, arXiv 2309.15505), along the
residual pyramid in one call. `quantize` is the pyramid and `straight_through` its gradient; `signs`
and `levels` make the tables that it quantizes with; `sign_entropies` are the entropies of LFQ's
choice of a code, without the matrix of codes; `pack_digits` and `unpack_digits` go between digits
and token indices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops import Size, check_devices, flatten_sizes, num_tokens

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


class Quantized(NamedTuple):
    """What `quantize` returns."""

    quantized: Tensor
    """f^, the sum over scales of upsampled values, [B, D, H, W], without a gradient."""
    digits: Tensor
    """[B, L, D] int16, scale after scale."""
    rows: Tensor
    """What each scale was quantized from, [B, L, D], differentiable in h."""


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
    for channel, count in enumerate(counts):
        below, at = _level_grid(count, bound)
        thresholds[: count - 1, channel] = below
        values[:count, channel] = at
    depths = torch.arange(rounds, device="cpu").unsqueeze(1)
    finer = torch.tensor(counts, dtype=torch.float64, device="cpu") ** -depths
    return Tables(thresholds * finer.unsqueeze(1), values * finer.unsqueeze(1))


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


def _shift(count: int) -> float:
    """What FSQ adds to a number before tanh, so that 0 stays at a level where L is even."""
    return math.atanh((0.5 if count % 2 == 0 else 0.0) / ((count - 1) * (1 + _FSQ_EPS) / 2))


@functools.lru_cache(maxsize=256)
def _level_constants(
    counts: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of FSQ's bound by channel: half its range, shift, offset, and the middle level."""
    with torch.inference_mode(False):
        return tuple(  # type: ignore[return-value]
            torch.tensor(part, dtype=dtype, device=device)
            for part in (
                [(count - 1) * (1 + _FSQ_EPS) / 2 for count in counts],
                [_shift(count) for count in counts],
                [0.5 if count % 2 == 0 else 0.0 for count in counts],
                [count // 2 for count in counts],
            )
        )


def bounded(z: Tensor, counts: Sequence[int], bound: Bound) -> Tensor:
    """The values of levels before rounding: z [..., D] brought to their range, differentiable."""
    if bound == "clamp":
        return z.clamp(-1, 1)
    if bound == "symmetric":
        return z.tanh()
    half, shift, offset, middle = _level_constants(tuple(counts), z.dtype, z.device)
    return ((z + shift).tanh() * half - offset) / middle


def through_levels(z: Tensor, codes: Tensor, counts: Sequence[int], bound: Bound) -> Tensor:
    """Codes [..., D] of numbers z, with the gradient that `bounded` has at z."""
    if not (torch.is_grad_enabled() and z.requires_grad):
        return codes
    if torch.compiler.is_compiling():
        value = bounded(z, counts, bound)
        return codes + (value - value.detach())
    return _ThroughLevels.apply(z, codes, tuple(counts), bound)


class _ThroughLevels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, codes: Tensor, counts: tuple[int, ...], bound: Bound
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.counts, ctx.bound = counts, bound
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return _times(slope(z, ctx.counts, ctx.bound), grad), None, None, None


def _times(factor: Tensor, grad: Tensor) -> Tensor:
    """Their product, in the place of the factor where nothing else needs it."""
    return factor * grad if torch.is_grad_enabled() else factor.mul_(grad)


def slope(z: Tensor, counts: tuple[int, ...], bound: Bound) -> Tensor:
    """The derivative of `bounded` at z [..., D], a new tensor, differentiable."""
    if bound == "clamp":
        return (z.abs() <= 1).to(z.dtype)
    if bound == "symmetric":
        return _tanh_slope(z, 4.0)
    lines = side_by_side(z.numel() // len(counts), len(counts))
    half, shift, _, middle = _level_constants(counts * lines, z.dtype, z.device)
    wide = z.reshape(-1, len(half)) + shift
    return _tanh_slope(wide, 4 * half / middle, in_place=True).view(z.shape)


def _tanh_slope(z: Tensor, factor: Tensor | float, *, in_place: bool = False) -> Tensor:
    """A quarter of the factor times 1 - tanh(z)^2.

    It is s (1 - s) of s = sigmoid(-2 |z|), which is quicker, and exact far from 0.

    Args:
        in_place: z is not needed any more, and is overwritten where no gradient is wanted.
    """
    if torch.is_grad_enabled():
        small = (z.abs() * -2).sigmoid()
        return small * (1 - small) * factor
    small = (z.abs_() if in_place else z.abs()).mul_(-2).sigmoid_()
    return small.addcmul_(small, small, value=-1).mul_(factor)


def side_by_side(rows: int, dim: int) -> int:
    """How many of so many rows of `dim` channels are taken as one where inner loops are short.

    A divisor of the number of rows, with up to 160 channels together.
    """
    if rows == 0 or torch.compiler.is_compiling():
        return 1
    return max(lines for lines in range(1, max(1, 160 // dim) + 1) if rows % lines == 0)


def through_rounds(z: Tensor, codes: Tensor, counts: Sequence[int], bound: Bound) -> Tensor:
    """The sum of a residual's codes, with the gradient that `bounded` has in every round.

    Args:
        z: [N, D].
        codes: [N, R, D], of tables that `levels` made for R rounds; without a gradient.

    Returns:
        [N, D]; round k, of codes 1 / L^k as large, has the gradient of L^-k bounded(L^k z_k), where
        z_k is what the rounds before left.
    """
    quantized = codes.sum(1)
    if not (torch.is_grad_enabled() and z.requires_grad):
        return quantized
    if torch.compiler.is_compiling():
        value = z * _slopes(z.detach(), codes, tuple(counts), bound)
        return quantized + (value - value.detach())
    return _ThroughRounds.apply(z, quantized, codes, tuple(counts), bound)


def _slopes(z: Tensor, codes: Tensor, counts: tuple[int, ...], bound: Bound) -> Tensor:
    """The sum of the slopes of every round, like z."""
    total, rest = slope(z, counts, bound), z
    finer = torch.tensor(counts, dtype=z.dtype, device=z.device)
    for number in range(1, codes.shape[1]):
        rest = rest - codes[:, number - 1]
        total = total + slope(rest * finer**number, counts, bound)
    return total


class _ThroughRounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        quantized: Tensor,
        codes: Tensor,
        counts: tuple[int, ...],
        bound: Bound,
    ) -> Tensor:
        ctx.save_for_backward(z, codes)
        ctx.counts, ctx.bound = counts, bound
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, codes = ctx.saved_tensors
        return _times(_slopes(z, codes, ctx.counts, ctx.bound), grad), None, None, None, None


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
    return Tables(thresholds.contiguous(), tables.values.to(dtype).contiguous())


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
            self._made[key] = Tables(*(table.to(tensor.device) for table in tables))
        return self._made[key]


def quantize(
    h: Tensor,
    tables: Tables,
    sizes: Sequence[Size],
    *,
    rounds: Sequence[int] | None = None,
    flips: Tensor | None = None,
    upsampling: Literal["bicubic", "bilinear"] = "bicubic",
) -> Quantized:
    """The residual loop with scalar codes: each scale's means are quantized, upsampled, subtracted.

    Args:
        h: [B, D, H, W] float32 or float64.
        tables: in the dtype of h and on its device.
        sizes: (height, width) of every scale.
        rounds: which round of the tables each scale takes; the first by default.
        flips: [B, L, D] bool, where the digits of tables of two values are inverted.
        upsampling: how values come to the size of h.

    Returns:
        `Quantized`; `straight_through` gives its sum a gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    flat = flatten_sizes(sizes)
    rounds = [0] * len(sizes) if rounds is None else list(rounds)
    return Quantized(
        *torch.ops.tokenflow_ext.scalar_quantize(
            h, *tables, flips, flat, rounds, upsampling == "bilinear"
        )
    )


def quantize_rows(rows: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Codes and digits of rows without a grid: every round of the tables quantizes what is left.

    Args:
        rows: [N, D] float32 or float64; N may be 0.
        tables: in their dtype and on their device.

    Returns:
        Codes [N, R, D], without a gradient, and digits [N, R, D] int16.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    return torch.ops.tokenflow_ext.scalar_rows(rows.detach(), *tables)


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
    places = _places(counts, little_endian)
    return torch.ops.tokenflow_ext.pack_digits(digits.to(torch.int16), places)


def unpack_digits(indices: Tensor, counts: Sequence[int], *, little_endian: bool = True) -> Tensor:
    """Digits [..., D] int64 of token indices [...], the inverse of `pack_digits`."""
    places = torch.tensor(_places(counts, little_endian), device=indices.device)
    sizes = torch.tensor(counts, device=indices.device)
    return indices.unsqueeze(-1).div(places, rounding_mode="floor") % sizes


def _places(counts: Sequence[int], little_endian: bool) -> list[int]:
    """What a digit of each channel counts."""
    order = list(counts) if little_endian else list(counts)[::-1]
    places = [1]
    for count in order:
        places.append(places[-1] * count)
    if places.pop() > 1 << 63:
        raise ValueError(
            f"{len(order)} channels of up to {max(order)} values make indices beyond 63 bits: use "
            "the digits"
        )
    return places if little_endian else places[::-1]


class SignEntropies(NamedTuple):
    """Entropies of the choice softmax(2 <z, code> / temperature) over all 2^D codes of signs."""

    per_sample: Tensor
    """Mean over rows of the entropy of a row's choice, scalar."""
    codebook: Tensor
    """Entropy of the mean choice, scalar."""


def sign_entropies(
    z: Tensor,
    *,
    temperature: float = 0.01,
    value: float = 1.0,
    eps: float = 1e-5,
    clamp: bool = False,
    factorized: bool = False,
    average: Callable[[Tensor], Tensor] | None = None,
) -> SignEntropies:
    """The two entropies of LFQ's loss (arXiv 2310.05737, eq. 5) of rows z [N, D], differentiable.

    The choice is a product over channels, so a row's entropy is a sum over channels. The mean
    choice of N rows is not; its 2^D probabilities are the products of two tables of 2^(D / 2), a
    matrix product, so that no matrix of N x 2^D exists.

    Args:
        z: float32 or float64.
        temperature: of the softmax.
        value: magnitude of the codes' channels.
        eps: what the logarithm of the mean choice keeps away from 0: added to the probability, or
            its least with `clamp` (vector-quantize-pytorch).
        clamp: see `eps`.
        factorized: the codebook's entropy as the sum of the channels' (BSQ, arXiv 2406.07548,
            eq. 9): an upper bound of it, for any D.
        average: what is done to the mean choice before its entropy, such as a mean over processes.

    Raises:
        ValueError: more than 24 channels without `factorized`.
    """
    if factorized:
        per_sample, bits = choice_of_signs(z.unsqueeze(0), [4 * value / temperature], [len(z)])
        both = torch.stack([bits, 1 - bits])
        return SignEntropies(per_sample[0], torch.special.entr(both).sum())
    logits = 4 * value / temperature * z  # of 1 against 0, a channel
    bits = logits.sigmoid()
    # H(sigmoid(x)) = softplus(x) - x sigmoid(x), without a logarithm of 0.
    per_sample = (F.softplus(logits) - logits * bits).sum(-1).mean()
    if z.shape[-1] > 24:
        raise ValueError(
            f"2^{z.shape[-1]} codes are too many to list: use factorized=True beyond 24 channels"
        )
    half = z.shape[-1] // 2
    chances = torch.stack([bits, (-logits).sigmoid()], dim=-1)  # not 1 - bits, which cancels
    upper, lower = _joint(chances[:, :half]), _joint(chances[:, half:])
    mean = (upper.T @ lower).flatten() / len(z)
    if average is not None:
        mean = average(mean)
    log = mean.clamp(min=eps).log() if clamp else (mean + eps).log()
    return SignEntropies(per_sample, -(mean * log).sum())


def choice_of_signs(
    z: Tensor, slopes: Sequence[float], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What the entropies of several parts of z are made of, with z alone kept for the gradient.

    Args:
        z: [B, L, D], the parts one after the other along L.
        slopes: logit of 1 against 0 by a unit of z, of each part.
        counts: how many of L each part has.

    Returns:
        The mean entropy of a row's choice [P], and the mean probability of 1, [P, D], of each part.
    """
    return _ChoiceOfSigns.apply(z, tuple(slopes), tuple(counts))


class _ChoiceOfSigns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, slopes: tuple[float, ...], counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z)
        ctx.slopes, ctx.counts = slopes, counts
        entropies, means = [], []
        for part, slope in zip(z.split(counts, dim=1), slopes, strict=True):
            logits = part * slope
            bits = logits.sigmoid()
            means.append(bits.mean(dim=(0, 1)))
            # H(sigmoid(x)) = softplus(x) - x sigmoid(x), without a logarithm of 0.
            entropy = F.softplus(logits).sub_(bits.mul_(logits)).sum()
            entropies.append(entropy / (part.shape[0] * part.shape[1]))
        return torch.stack(entropies), torch.stack(means)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_entropy: Tensor, by_mean: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        grad = torch.empty_like(z)
        parts = zip(
            z.split(ctx.counts, dim=1), grad.split(ctx.counts, dim=1), ctx.slopes, strict=True
        )
        for number, (part, out, slope) in enumerate(parts):
            # H' = -x s', and the mean's is s', with s' = s (1 - s).
            torch.mul(part, -slope * by_entropy[number], out=out)
            out.add_(by_mean[number])
            bits = (part * slope).sigmoid_()
            out.mul_(bits).mul_(bits.neg_().add_(1))
            out.mul_(slope / (part.shape[0] * part.shape[1]))
        return grad, None, None


def _joint(chances: Tensor) -> Tensor:
    """Probabilities [N, 2^D] of all combinations of chances [N, D, 2]."""
    joint = chances.new_ones(len(chances), 1)
    for channel in range(chances.shape[1]):
        joint = (joint.unsqueeze(-1) * chances[:, channel].unsqueeze(1)).flatten(1)
    return joint


def straight_through(
    quantized: Tensor,
    z: Tensor,
    sizes: Sequence[Size],
    *,
    upsampling: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """The sum of values [B, D, H, W], with the gradient as if z [B, L, D] stood in their place.

    What comes back goes through the transpose of every scale's upsampling to z.
    """
    if not (torch.is_grad_enabled() and z.requires_grad):
        return quantized
    return _StraightThrough.apply(quantized, z, flatten_sizes(sizes), upsampling == "bilinear")


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(quantized: Tensor, z: Tensor, flat_sizes: list[int], bilinear: bool) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sizes, ctx.bilinear = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, upsample_transpose(grad, ctx.sizes, ctx.bilinear), None, None


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.sizes, ctx.size = inputs[4], tuple(inputs[0].shape[2:])
    ctx.mark_non_differentiable(*output[:2])


def _quantize_backward(ctx: Any, _quantized: None, _digits: None, grad: Tensor) -> Any:
    return pool_transpose(grad, ctx.sizes, ctx.size), *[None] * 6


def upsample_transpose(plane: Tensor, flat_sizes: Sequence[int], bilinear: bool) -> Tensor:
    """The transpose of every scale's upsampling, applied to [B, D, H, W]: [B, L, D]."""
    return torch.ops.tokenflow_ext.upsample_transpose(plane, flat_sizes, bilinear)


def pool_transpose(rows: Tensor, flat_sizes: Sequence[int], size: Size) -> Tensor:
    """The transpose of pooling to every scale, applied to [B, L, D]: `[B, D, *size]`, the sum."""
    return torch.ops.tokenflow_ext.pool_transpose(rows, flat_sizes, *size)


def _split(rows: Tensor, flat_sizes: Sequence[int]) -> list[tuple[Tensor, Size]]:
    """Each scale's maps [B, D, h, w] of rows [B, L, D], and its size."""
    sizes = list(zip(flat_sizes[::2], flat_sizes[1::2], strict=True))
    parts = rows.split([height * width for height, width in sizes], dim=1)
    return [(part.mT.unflatten(2, size), size) for part, size in zip(parts, sizes, strict=True)]


# Both are linear: the gradient of a transpose is the operation itself, here in plain PyTorch.


def _setup_upsample_transpose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plane, ctx.sizes, ctx.bilinear = inputs
    ctx.size = tuple(plane.shape[2:])


def _upsample(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
    mode = "bilinear" if ctx.bilinear else "bicubic"
    maps = [
        F.interpolate(part, ctx.size, mode=mode, align_corners=False)
        for part, _ in _split(grad_rows, ctx.sizes)
    ]
    return torch.stack(maps).sum(0), None, None


def _setup_pool_transpose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = inputs[1]


def _pool(ctx: Any, grad_plane: Tensor) -> tuple[Tensor, None, None, None]:
    sizes = zip(ctx.sizes[::2], ctx.sizes[1::2], strict=True)
    rows = [F.interpolate(grad_plane, size, mode="area").flatten(2).mT for size in sizes]
    return torch.cat(rows, dim=1), None, None, None


torch.library.register_autograd(
    "tokenflow_ext::scalar_quantize", _quantize_backward, setup_context=_setup_quantize
)
torch.library.register_autograd(
    "tokenflow_ext::upsample_transpose", _upsample, setup_context=_setup_upsample_transpose
)
torch.library.register_autograd(
    "tokenflow_ext::pool_transpose", _pool, setup_context=_setup_pool_transpose
)


@torch.library.register_fake("tokenflow_ext::scalar_quantize")
def _(
    h: Tensor,
    thresholds: Tensor,
    values: Tensor,
    flips: Tensor | None,
    sizes: list[int],
    rounds: list[int],
    bilinear: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("h", h=h, thresholds=thresholds, values=values, flips=flips)
    rows = (h.shape[0], num_tokens(sizes), h.shape[1])
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        h.new_empty(rows, dtype=torch.int16),
        h.new_empty(rows),
    )


@torch.library.register_fake("tokenflow_ext::scalar_rows")
def _(rows: Tensor, thresholds: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    check_devices("rows", rows=rows, thresholds=thresholds, values=values)
    shape = (rows.shape[0], thresholds.shape[0], rows.shape[1])
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int16)


@torch.library.register_fake("tokenflow_ext::pack_digits")
def _(digits: Tensor, places: list[int]) -> Tensor:
    batch, tokens, channels = digits.shape
    return digits.new_empty((batch, channels // len(places), tokens), dtype=torch.int64)


@torch.library.register_fake("tokenflow_ext::upsample_transpose")
def _(plane: Tensor, sizes: list[int], bilinear: bool) -> Tensor:
    return plane.new_empty((plane.shape[0], num_tokens(sizes), plane.shape[1]))


@torch.library.register_fake("tokenflow_ext::pool_transpose")
def _(rows: Tensor, sizes: list[int], height: int, width: int) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[2], height, width))


for _name in (
    "scalar_quantize",
    "scalar_rows",
    "pack_digits",
    "upsample_transpose",
    "pool_transpose",
):
    ops.register_vmap(_name)
