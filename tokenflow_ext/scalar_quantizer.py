"""Signs and levels as a module: LFQ, BSQ and FSQ over groups, depths and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, scalar
from .codebook import update_running
from .codes import Entropy, Levels, Signs
from .collectives import all_reduce
from .ops import Size
from .quantizer import CodebookUsage
from .scalar_gradients import StandIn
from .sign_entropy import factorized_entropy, sign_entropies

#: Codes up to which hits are counted code by code.
MOST_COUNTED = 1 << 20


class ScalarOutput(NamedTuple):
    """What `ScalarQuantizer.forward` returns."""

    quantized: Tensor
    """f^ [B, D, H, W] in the dtype of h, with the straight-through gradient."""
    indices: Tensor
    """[B, G, L] int64, scale after scale; a scale's rounds one after the other."""
    commitment_loss: Tensor
    """beta times the mean over scales of mean((sg q - z)^2), a scalar."""
    entropy_loss: Tensor
    """The entropies of `entropy`, weighted, a scalar; 0 without."""
    usage: CodebookUsage | None
    """Hits [G, K]; None where there are more than `MOST_COUNTED` codes."""


def steps_up_to(scales: int, depth: int, upto: int | None, rounds: int | None) -> int:
    """How many steps, `depth` a scale, `decode` sums: see `ScalarQuantizer.decode`.

    Raises:
        ValueError: `upto` or `rounds` out of range.
    """
    for name, value, most in (("upto", upto, scales), ("rounds", rounds, depth)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    return (scales if upto is None else upto) * depth - (0 if rounds is None else depth - rounds)


class ScalarQuantizer(nn.Module):
    """Quantizes every channel of feature maps by itself, group by group an index.

    Args:
        code: what every group's codes are.
        groups: how many groups G of `code.dim` channels; h has `G * code.dim`.
        scales: side of each scale's grid, or (height, width), coarse to fine.
        depth: rounds at every scale: each quantizes what the one before left, on a finer grid (half
            as large signs, levels L times as fine).
        beta: factor of the commitment loss.
        entropy: the loss of the choice of a code, of `Signs`.
        flips: in training, the share of signs that are inverted at random (Infinity's bitwise
            self-correction, arXiv 2412.04431, section 3.4).
        upsampling: how a scale's values come to the size of the features.
        usage_decay: decay of the running hits.

    Attributes:
        usage_ema: running mean of each code's hits in a training step, [G, K].
        window_hits: hits since `usage_window(reset=True)`, [G, K]. Both are None beyond
            `MOST_COUNTED` codes.

    Raises:
        ValueError: an argument out of its range, or a loss or flips of what are not signs.
    """

    usage_ema: Tensor | None
    window_hits: Tensor | None

    def __init__(
        self,
        code: Signs | Levels,
        groups: int = 1,
        scales: Sequence[int | Size] = (16,),
        *,
        depth: int = 1,
        beta: float = 0.25,
        entropy: Entropy | None = None,
        flips: float = 0.0,
        upsampling: Literal["bicubic", "bilinear"] = "bicubic",
        usage_decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.code, self.books, self.depth = code, int(groups), int(depth)
        self.scales = tuple(ops.as_sizes(scales))
        if not self.scales or min(min(s) for s in self.scales) < 1:
            raise ValueError(f"scales must hold one or more positive sides, got {tuple(scales)}")
        for name, value in (("groups", self.books), ("depth", self.depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, share in (("flips", flips), ("usage_decay", usage_decay)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.usage_decay = float(usage_decay)
        if isinstance(code, Levels) and (entropy is not None or flips):
            what = f"entropy={entropy}" if entropy is not None else f"flips={flips}"
            raise ValueError(f"only Signs have an entropy and flips, got {what} with {code}")
        if upsampling not in ("bicubic", "bilinear"):
            raise ValueError(f"upsampling must be 'bicubic' or 'bilinear', got {upsampling!r}")
        self.beta, self.flips, self.entropy = float(beta), float(flips), entropy
        self.upsampling = upsampling
        self.dim = self.books * code.dim
        self.codebook_size = code.size
        self.tokens_per_scale = tuple(depth * h * w for h, w in self.scales)
        self.num_tokens = sum(self.tokens_per_scale)
        self._sizes = [size for size in self.scales for _ in range(depth)]
        self._rounds = list(range(depth)) * len(self.scales)
        self._tables = scalar.TableCache(self._make_tables, not isinstance(code, Signs))
        counted = code.size <= MOST_COUNTED
        hits = torch.zeros(self.books, code.size, dtype=torch.int64) if counted else None
        self.register_buffer("usage_ema", None if hits is None else hits.float())
        self.register_buffer("window_hits", hits, persistent=False)

    def reset_parameters(self) -> None:
        """Statistics: zero. There are no parameters."""
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        sides = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in self.scales)
        return f"{self.code}, groups={self.books}, depth={self.depth}, scales={sides}"

    def tables(self, like: Tensor) -> scalar.Tables:
        """Thresholds and values in the dtype and on the device of a tensor."""
        return self._tables.like(like)

    def _make_tables(self) -> scalar.Tables:
        code = self.code
        if isinstance(code, Signs):
            value = code.dim**-0.5 if code.spherical else 1.0
            return scalar.signs(self.dim, value=value, rounds=self.depth)
        counts = code.counts * self.books
        return scalar.levels(counts, bound=code.bound, rounds=self.depth)

    # ------------------------------------------------------------------ forward

    def forward(self, h: Tensor) -> ScalarOutput:
        """Quantizes features.

        Args:
            h: [B, D, H, W], float32, float64 (CPU), bfloat16 or float16. Half precision is computed
                in float32.

        Raises:
            TypeError, ValueError, RuntimeError: a wrong dtype or shape; the message names the
                argument.
        """
        features = self._inputs(h)
        flips = None
        if self.training and self.flips:
            shape = (len(h), self.num_tokens, self.dim)
            flips = torch.rand(shape, device=h.device) < self.flips
        losses = self.entropy if self.training else None
        factorized = losses is not None and losses.factorized
        found = self._quantize(
            features,
            flips=flips,
            slopes=self._slopes() if factorized else (),
            errors=bool(self.beta),
            keep_rows=losses is not None and not factorized,
        )
        commitment = entropy = found.quantized.new_zeros(())
        if self.beta:
            commitment = self.beta * found.error.mean()
        if losses is not None:
            terms = self._of_channels(found) if factorized else self._of_codes(found.rows)
            sample, codebook = terms
            entropy = losses.weight * (sample - losses.gamma * codebook)
        return ScalarOutput(
            found.quantized.to(h.dtype),
            found.indices,
            commitment,
            entropy,
            self._count(found.indices),
        )

    def _inputs(self, h: Tensor) -> Tensor:
        if not h.is_floating_point():
            raise TypeError(f"h must be a floating-point tensor, got {h.dtype}")
        if h.dim() != 4 or h.shape[1] != self.dim or h.numel() == 0:
            raise ValueError(
                f"h must have shape [B, {self.dim}, H, W] with no side of 0, got {tuple(h.shape)}"
            )
        return h if h.dtype == torch.float64 else h.float()

    def _quantize(self, features: Tensor, **options: Any) -> scalar.Quantized:
        return scalar.quantize(
            features,
            self.tables(features),
            self._sizes,
            counts=self.code.counts,
            little_endian=self._little_endian,
            rounds=self._rounds,
            upsampling=self.upsampling,
            stand_in=self._stand_in,
            **options,
        )

    @property
    def _stand_in(self) -> StandIn:
        """What has the gradient in the place of the values."""
        if isinstance(self.code, Levels):
            return scalar.stand_in_of(self.code.bound)
        return "unit" if self.code.spherical else "same"

    def _per_token(self, of_rounds: Tensor) -> Tensor:
        """[L, ...] of what every round has, [R, ...]."""
        if self.depth == 1:
            return of_rounds.expand(self.num_tokens, *of_rounds.shape[1:])
        parts = zip(self._rounds, self._sizes, strict=True)
        return torch.cat(
            [of_rounds[number].expand(h * w, *of_rounds.shape[1:]) for number, (h, w) in parts]
        )

    def _values(self, digits: Tensor, like: Tensor) -> Tensor:
        """Values [B, L, D] of digits."""
        values = self.tables(like).values
        if self.depth == 1:
            return torch.gather(values[0].expand(len(digits), -1, -1), 1, digits.long())
        return torch.gather(
            self._per_token(values).expand(len(digits), -1, -1, -1), 2, digits.long().unsqueeze(2)
        ).squeeze(2)

    def _sign_values(self) -> list[float]:
        """Magnitude of the signs of every scale's rounds."""
        assert isinstance(self.code, Signs)
        value = self.code.dim**-0.5 if self.code.spherical else 1.0
        return [value * 0.5**number for number in self._rounds]

    def _slopes(self) -> list[float]:
        """Logit of 1 against 0 by a unit of what stands for the values, of every scale's rounds."""
        assert self.entropy is not None
        return [4 * value / self.entropy.temperature for value in self._sign_values()]

    def _of_channels(self, found: scalar.Quantized) -> tuple[Tensor, Tensor]:
        """Means over scales and rounds of both entropies, channel by channel. The groups' choices
        are pooled."""
        chance = found.chance.unflatten(1, (self.books, -1)).mean(dim=1)
        codebook = factorized_entropy(chance) / len(chance)
        return found.entropy.mean() / self.books, codebook

    def _of_codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same of codes, from rows [B, L, D]."""
        assert self.entropy is not None
        parts, dim = rows.split([h * w for h, w in self._sizes], dim=1), self.code.dim
        found = []
        for part, value in zip(parts, self._sign_values(), strict=True):
            z = part.reshape(-1, dim)
            if self._stand_in == "unit":
                z = F.normalize(z, dim=-1)
            found.append(
                sign_entropies(
                    z, temperature=self.entropy.temperature, value=value, eps=self.entropy.eps
                )
            )
        return (
            torch.stack([part.per_sample for part in found]).mean(),
            torch.stack([part.codebook for part in found]).mean(),
        )

    @torch.no_grad()
    def _count(self, indices: Tensor) -> CodebookUsage | None:
        if self.window_hits is None or self.usage_ema is None:
            return None
        first = torch.arange(self.books, device=indices.device).unsqueeze(1) * self.codebook_size
        hits = ops.count_codes(indices + first, self.window_hits.numel()).view_as(self.window_hits)
        if self.training:
            hits = all_reduce(hits)
            self.window_hits.add_(hits)
            update_running(self.usage_ema, None, hits, None, 1 - self.usage_decay)
        return CodebookUsage.from_hits(hits)

    def usage_window(self, reset: bool = True) -> CodebookUsage | None:
        """Usage over the training steps since the last reset (all processes)."""
        if self.window_hits is None:
            return None
        return CodebookUsage.of_window(self.window_hits, reset)

    # ------------------------------------------------------------------ tokens

    @property
    def _little_endian(self) -> bool:
        return not isinstance(self.code, Signs) or self.code.little_endian

    def _pack(self, digits: Tensor) -> Tensor:
        """[B, G, L] of digits [B, L, D]."""
        return scalar.pack_groups(digits, self.code.counts, little_endian=self._little_endian)

    def _unpack(self, indices: Tensor) -> Tensor:
        """Digits [B, L, D] of [B, G, L]."""
        digits = scalar.unpack_digits(indices, self.code.counts, little_endian=self._little_endian)
        return digits.transpose(1, 2).flatten(-2)

    @torch.no_grad()
    def encode(self, h: Tensor) -> Tensor:
        """Token indices [B, G, L] int64 of features [B, D, H, W].

        Raises:
            As `forward`.
        """
        return self._quantize(self._inputs(h)).indices

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """The tokens [B, G, L] whose values are nearest to rows [B, L, D]."""
        values = self._per_token(self.tables(rows).values)  # [L, T + 1, D]
        counts = torch.tensor(self.code.counts * self.books, device=rows.device)
        digits = torch.arange(values.shape[1], device=rows.device)
        missing = digits.unsqueeze(1) >= counts
        distance = (values - rows.unsqueeze(2)).abs().masked_fill(missing, torch.inf)
        return self._pack(distance.argmin(dim=2))

    @torch.no_grad()
    def codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [B, L, D] of the tokens [B, G, L] of all scales."""
        like = torch.empty((), dtype=dtype, device=indices.device)
        return self._values(self._unpack(indices), like)

    @torch.no_grad()
    def decode(
        self,
        indices: Tensor,
        upto: int | None = None,
        size: Size | None = None,
        *,
        rounds: int | None = None,
    ) -> Tensor:
        """`f^ [B, D, *size]` of the token indices [B, G, L] of all scales.

        Args:
            indices: int64.
            upto: how many scales to sum; all by default.
            size: (height, width) of the result; the last scale's grid by default.
            rounds: how many rounds of the last of these scales to sum; all by default.

        Raises:
            ValueError: a wrong shape, `upto`, `rounds` or an index out of range.
        """
        expected = (self.books, self.num_tokens)
        if indices.dim() != 3 or indices.shape[1:] != expected:
            raise ValueError(
                f"indices must have shape [B, {expected[0]}, {expected[1]}], got "
                f"{tuple(indices.shape)}"
            )
        steps = steps_up_to(len(self.scales), self.depth, upto, rounds)
        if indices.device.type == "cpu" and not bool(
            ((indices >= 0) & (indices <= self.codebook_size - 1)).all()
        ):
            low, high = indices.aminmax()
            raise ValueError(
                f"indices must be in [0, {self.codebook_size}), got {int(low)} to {int(high)}"
            )
        maps = self.maps(self.codes(indices), self.scales[-1] if size is None else size)
        return torch.stack(maps[:steps]).sum(0)

    def maps(self, rows: Tensor, size: Size) -> list[Tensor]:
        """What each scale's rounds add to f^, `[B, D, *size]` each, of rows [B, L, D]."""
        maps = []
        parts = rows.split([h * w for h, w in self._sizes], dim=1)
        for part, own in zip(parts, self._sizes, strict=True):
            plane = part.mT.unflatten(2, own)
            if own != tuple(size):
                plane = F.interpolate(plane, size, mode=self.upsampling, align_corners=False)
            maps.append(plane)
        return maps

    @torch.no_grad()
    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """Inputs of scales 2 to S for teacher forcing, [B, sum of their h * w, D]: the sum of the
        scales before, averaged to each (Infinity, arXiv 2412.04431).

        Args:
            indices: tokens of all scales, [B, G, L].
        """
        total, inputs = None, []
        maps = self.maps(self.codes(indices), self.scales[-1])
        for scale, size in enumerate(self.scales[1:], start=1):
            for plane in maps[(scale - 1) * self.depth : scale * self.depth]:
                total = plane if total is None else total + plane
            assert total is not None
            inputs.append(F.interpolate(total, size, mode="area").flatten(2).mT)
        if not inputs:
            return self.codes(indices)[:, :0]
        return torch.cat(inputs, dim=1)
