"""The multi-scale residual quantizer as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .codebook import (
    kmeans,
    reduce_counts,
    reset_running,
    running_means,
    sum_by_code,
    update_running,
)
from .collectives import all_reduce, sample_rows
from .ops import Size


class CodebookUsage(NamedTuple):
    """How a batch of tokens is spread over the codebook."""

    hits: Tensor
    """How often each code was chosen, [K] int64 (over all processes in training)."""
    share: Tensor
    """Share of the codes chosen at least once, scalar in [0, 1]."""
    perplexity: Tensor
    """exp of the entropy of the choice, scalar in [1, K]."""

    @classmethod
    def from_hits(cls, hits: Tensor) -> CodebookUsage:
        """Share and perplexity of hits [K], or [G] of each of hits [G, K]."""
        p = hits / hits.sum(-1, keepdim=True).clamp(min=1)
        return cls(hits, (hits > 0).float().mean(-1), torch.special.entr(p).sum(-1).exp())

    @classmethod
    def of_window(cls, hits: Tensor, reset: bool) -> CodebookUsage:
        """Of the hits so far; `reset` sets them to zero."""
        usage = cls.from_hits(hits.clone())
        if reset:
            hits.zero_()
        return usage


class QuantizerOutput(NamedTuple):
    """What `MultiScaleQuantizer.forward` returns."""

    quantized: Tensor
    """f^ [B, D, H, W] in the dtype of h, with the straight-through gradient."""
    indices: Tensor
    """[B, L] int64, scale after scale; -1 for the tokens of a scale dropped in training.
    [B, G, L] where each of G groups has an index of its own."""
    vq_loss: Tensor
    """Scalar that moves the codes: mean over scales (and groups) of mean((q - sg z)^2)."""
    commitment_loss: Tensor
    """Scalar that moves h: beta times mean over scales (and groups) of mean((sg q - z)^2)."""
    usage: CodebookUsage


class MultiScaleQuantizer(nn.Module):
    """Quantizes feature maps to a pyramid of residual tokens from joint codebooks.

    Method: arXiv 2412.03069, section 3.1. Several codebooks (`dims`: semantic and pixel, or any
    number) share one index; a code is chosen by the weighted sum of the groups' squared distances;
    each scale quantizes what the coarser ones left. `scales=(H,)` is plain vector quantization.
    With `index="own"` each group has an index of its own instead (product quantization), all in one
    call: what is said of indices [B, L] below is then [B, G, L], and statistics are [G, K].

    Args:
        codebook_size: number of codes K.
        dims: channels of each codebook group; h has their sum.
        scales: side of each scale's grid, or (height, width), coarse to fine. Features of any
            height and width are supported: they are pooled to each grid and codes upsampled back.
        weights: weight of each group's distance, 1 by default (the paper's w_dis is the second).
            Of no meaning, and refused, with `index="own"`.
        beta: factor of the commitment loss.
        l2_norm: scale features and codes to unit length in each group.
        codebook_update: "gradient" (by the vq loss) or "ema" (running means of the rows assigned
            to each code, normalised with l2_norm; the vq loss is then 0).
        usage_decay: decay of the running hits, and of "ema".
        scale_drop: in training, the probability of leaving out one scale, never the first.
        atomic_codebook_gradient: on CUDA, sum the codebooks' gradient by float32 atomics in their
            order of arrival. That saves the sort of the tokens by code, but the gradient is not the
            same bit for bit in every run, and tokens of one code wait for each other. Of no effect
            on the CPU, with "ema", and under `torch.use_deterministic_algorithms(True)`: there the
            gradient is always the reproducible one.
        index: "shared": one index for all groups; "own": one for each of groups of equal width.
        metric: "l2": the code at the smallest distance; "dot": of the largest inner product.

    Attributes:
        codebooks: one parameter [K, dims[g]] for each group g.
        codes_per_group, num_codes: K of each index, and their sum.
        books: how many indices a token has: 1, or the number of groups with `index="own"`.
        usage_ema: running mean of each code's hits in a training step, [K], over all processes.
        window_hits: hits since `usage_window(reset=True)`, [K].
        skipped_rows: how many rows the statistics have left out since `reset_parameters`, scalar
            int64 over all processes: those of images whose features hold a NaN or an infinity (an
            overflow in half precision, say), and rows that are not finite themselves. They move
            no code and no count.

    Raises:
        ValueError, TypeError: an argument out of its range, named in the message.
    """

    usage_ema: Tensor
    window_hits: Tensor
    skipped_rows: Tensor
    codebook_sums: Tensor | None

    def __init__(
        self,
        codebook_size: int,
        dims: Sequence[int] = (32, 8),
        scales: Sequence[int | Size] = (1, 2, 4, 6, 8, 10, 12, 14),
        *,
        weights: Sequence[float] | None = None,
        beta: float = 0.25,
        l2_norm: bool = True,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        usage_decay: float = 0.99,
        scale_drop: float = 0.1,
        atomic_codebook_gradient: bool = False,
        index: Literal["shared", "own"] = "shared",
        metric: ops.Metric = "l2",
    ) -> None:
        super().__init__()
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
        self.codebook_size = int(codebook_size)
        self.dims = tuple(int(d) for d in dims)
        if not self.dims or min(self.dims) < 1:
            raise ValueError(f"dims must hold one or more positive widths, got {tuple(dims)}")
        self.dim = sum(self.dims)
        self.scales = tuple(ops.as_sizes(scales))
        if not self.scales or min(min(s) for s in self.scales) < 1:
            raise ValueError(f"scales must hold one or more positive sides, got {tuple(scales)}")
        if index not in ("shared", "own"):
            raise ValueError(f"index must be 'shared' or 'own', got {index!r}")
        own = self._own = index == "own"
        if own and (len(set(self.dims)) > 1 or weights is not None):
            what = f"dims={self.dims}" if weights is None else f"weights={weights}"
            raise ValueError(f"index='own' needs dims of one width and no weights, got {what}")
        ops.metric_number(metric)
        self.books = len(self.dims) if own else 1
        self.codes_per_group = (self.codebook_size,) * self.books
        self.num_codes = self.codebook_size * self.books
        self.metric = metric
        self.weights = tuple(float(w) for w in (weights or [1.0] * len(self.dims)))
        if len(self.weights) != len(self.dims) or not all(0 <= w < 1e30 for w in self.weights):
            raise ValueError(
                f"weights must hold {len(self.dims)} finite numbers >= 0, got {weights}"
            )
        if codebook_update not in ("gradient", "ema"):
            raise ValueError(
                f"codebook_update must be 'gradient' or 'ema', got {codebook_update!r}"
            )
        for name, value in (("usage_decay", usage_decay), ("scale_drop", scale_drop)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.beta = float(beta)
        self.l2_norm = bool(l2_norm)
        self.codebook_update = codebook_update
        self.usage_decay = float(usage_decay)
        self.scale_drop = float(scale_drop)
        self.atomic_codebook_gradient = bool(atomic_codebook_gradient)
        self.tokens_per_scale = tuple(h * w for h, w in self.scales)
        self.num_tokens = sum(self.tokens_per_scale)

        learned = codebook_update == "gradient"
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.empty(self.codebook_size, d), requires_grad=learned)
            for d in self.dims
        )
        codes = (self.books,) * own + (self.codebook_size,)
        self.register_buffer("usage_ema", torch.empty(codes))
        for name, shape in (("window_hits", codes), ("skipped_rows", ())):
            self.register_buffer(name, torch.empty(shape, dtype=torch.int64), persistent=False)
        ema = codebook_update == "ema"
        sums = torch.empty(*codes, self.dim // self.books) if ema else None
        self.register_buffer("codebook_sums", sums)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Codes: random unit rows with l2_norm, otherwise uniform in [-1/K, 1/K] (as VQGAN). All
        statistics: zero. So it also fills what `to_empty` has made of a module on "meta"."""
        with torch.no_grad():
            for buffer in self.buffers(recurse=False):
                buffer.zero_()
            for codebook in self.codebooks:
                if self.l2_norm:
                    codebook.copy_(F.normalize(torch.randn_like(codebook), dim=-1))
                else:
                    codebook.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)

    def extra_repr(self) -> str:
        sides = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in self.scales)
        shown = f"codebook_size={self.codebook_size}, dims={self.dims}, scales={sides}"
        return shown + ", index=own" * self._own + ", metric=dot" * (self.metric == "dot")

    @property
    def has_own_indices(self) -> bool:
        """Whether indices and statistics have a dimension for the groups."""
        return self._own

    @property
    def _book_dims(self) -> tuple[int, ...]:
        """The groups of one index, as the operators take them."""
        return self.dims[:1] if self._own else self.dims

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiScaleQuantizer:
        """Moves as every module does, but running statistics keep their precision under half()."""
        before = dict(self.named_buffers(recurse=False))
        # Every move of a module, and of one that it is a part of, comes by here; torch has no
        # public place for this.
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    # ------------------------------------------------------------------ forward

    def forward(self, h: Tensor, *, check: bool = False) -> QuantizerOutput:
        """Quantizes features.

        Args:
            h: [B, D, H, W], float32, float64 (CPU), bfloat16 or float16. Half precision, and
                anything under autocast, is computed in float32.
            check: on CUDA, look for a NaN in the codebooks first, which waits for the device; on
                the CPU that is always done.

        Raises:
            TypeError, ValueError, RuntimeError: a wrong dtype, shape or device, an empty batch, or
                a codebook that is not finite; the message names the argument.
        """
        features, codebook = self._inputs(h, check)
        if self.codebook_update == "ema" and self.training:
            codebook = codebook.detach().clone()  # the update below must not change what is saved
        dropped = self._draw_dropped_scale(h.device)
        result = self._quantize(features, codebook, dropped)
        vq_loss, commitment_loss = self._losses(result, dropped)
        hits = result.hits
        if self.training:
            hits = self._update_state(features, codebook, result)
        return QuantizerOutput(
            result.quantized.to(h.dtype),
            result.indices,
            vq_loss,
            commitment_loss,
            CodebookUsage.from_hits(hits),
        )

    # The pyramid itself; `tokenflow_ext.var` puts another one in its place.

    def _quantize(
        self, features: Tensor, codebook: Tensor, dropped: Tensor | None = None
    ) -> ops.QuantizeResult:
        return ops.multiscale_quantize(
            features,
            codebook,
            self._book_dims,
            self.scales,
            None if self._own else self.weights,
            self.l2_norm,
            dropped,
            self.atomic_codebook_gradient,
            self.metric,
        )

    def _sum_codes(self, indices: Tensor, codebook: Tensor, upto: int, size: Size) -> Tensor:
        """f^ [B, D, *size] of the tokens of the first `upto` scales."""
        return ops.multiscale_decode(
            indices, codebook, self._book_dims, self.scales[:upto], size, self.l2_norm
        )

    def _rows(self, features: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        """What the scales searched with, [B, L, D], or [B, G, L, D / G] where indices are own."""
        return ops.multiscale_rows(
            features, codebook, indices, self._book_dims, self.scales, self.l2_norm
        )

    def _inputs(self, h: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        """Features and joint codebook in the dtype of computation."""
        if not h.is_floating_point():
            raise TypeError(f"h must be a floating-point tensor, got {h.dtype}")
        if h.dim() != 4 or h.shape[1] != self.dim or h.numel() == 0:
            raise ValueError(
                f"h must have shape [B, {self.dim}, H, W] with no side of 0, got {tuple(h.shape)}"
            )
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        return h.to(dtype), self.joint_codebook(dtype, check=check)

    def joint_codebook(self, dtype: torch.dtype = torch.float32, *, check: bool = False) -> Tensor:
        """The groups side by side, [K, D], as the operators take them; [G, K, D / G] where each has
        an index of its own.

        Raises:
            ValueError: with `check`, where a codebook holds a NaN or an infinity.
        """
        groups = [codebook.to(dtype) for codebook in self._tables()]
        if check:
            for number, group in enumerate(groups):
                if not bool(torch.isfinite(group).all()):
                    raise ValueError(
                        f"codebooks[{number}] must be finite, got a NaN or an infinity"
                    )
        if self._own:
            return torch.stack(groups)
        return groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)

    def _tables(self) -> list[Tensor]:
        """The codes of each group, [K, dims[g]], before they are normalised."""
        return list(self.codebooks)

    def _draw_dropped_scale(self, device: torch.device) -> Tensor | None:
        """The scale to leave out, or -1: on the device, so that nothing waits for it."""
        if not self.training or self.scale_drop == 0 or len(self.scales) == 1:
            return None
        scale = torch.randint(1, len(self.scales), (), device=device)
        return torch.where(torch.rand((), device=device) < self.scale_drop, scale, -1)

    def _losses(self, result: ops.QuantizeResult, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means over the scales that took part; a dropped scale's error is 0."""
        scales = len(self.scales) - (0 if dropped is None else (dropped >= 0).to(torch.int64))
        count = scales * self.books
        vq_loss = result.code_error.sum() / count
        if self.codebook_update == "ema":
            vq_loss = torch.zeros_like(vq_loss)
        return vq_loss, self.beta * (result.row_error.sum() / count)

    @torch.no_grad()
    def _update_state(
        self, features: Tensor, codebook: Tensor, result: ops.QuantizeResult
    ) -> Tensor:
        """Running statistics after a training step; returns the hits over all processes."""
        searched = result.indices >= 0
        finite = features.isfinite().flatten(1).all(dim=1)
        finite = finite.view(-1, *[1] * (result.indices.dim() - 1))
        rows = None
        if self.codebook_update == "ema":
            rows = self._rows(features.detach(), codebook, result.indices)
            finite = finite & rows.isfinite().all(dim=-1)
        tokens = self.code_numbers(torch.where(finite, result.indices, -1))
        codes = self.num_codes
        hits, skipped = reduce_counts(
            ops.count_codes(tokens, codes), (searched & (tokens < 0)).sum()
        )
        hits = hits.view_as(self.usage_ema)
        self.skipped_rows.add_(skipped)
        # A step without a row is no step.
        stepped = hits.any()
        rate = stepped * (1 - self.usage_decay)
        self.window_hits.add_(hits)
        sums = None
        if rows is not None:
            sums, _ = sum_by_code(rows.flatten(0, -2), tokens.flatten(), codes)
            sums = all_reduce(sums).view_as(cast(Tensor, self.codebook_sums))
        update_running(self.usage_ema, self.codebook_sums, hits, sums, rate)
        if self.codebook_sums is not None:
            # A code that was never hit, or not for so long that its mean is noise, stays.
            means = running_means(self.usage_ema, self.codebook_sums)
            self._set_codes(means, stepped & (self.usage_ema > 1e-5))
        return hits

    def code_numbers(self, indices: Tensor) -> Tensor:
        """Indices [B, G, L] as numbers among the codes of all groups, -1 where they are; a shared
        index is such a number."""
        if not self._own:
            return indices
        first = torch.arange(self.books, device=indices.device) * self.codebook_size
        return torch.where(indices < 0, indices, indices + first.unsqueeze(1))

    # ------------------------------------------------------------------ tokens

    @torch.no_grad()
    def encode(self, h: Tensor, *, check: bool = False) -> Tensor:
        """Token indices [B, L] int64 of features [B, D, H, W]; all scales, no statistics.

        Raises:
            As `forward`.
        """
        features, codebook = self._inputs(h, check)
        return self._quantize(features, codebook).indices

    @torch.no_grad()
    def decode(
        self,
        indices: Tensor,
        upto: int | None = None,
        size: Size | None = None,
        *,
        check: bool = False,
    ) -> Tensor:
        """`f^ [B, D, *size]` of token indices.

        Args:
            indices: [B, L] int64 of all scales, or the first scales' tokens alone.
            upto: how many scales to sum; all that `indices` holds by default.
            size: (height, width) of the result; the last scale's grid by default.
            check: on CUDA, check the range of the indices, which waits for the device; without it
                an index out of range adds nothing. On the CPU that is always checked.

        Raises:
            TypeError, ValueError, RuntimeError: a wrong dtype or shape, `upto` out of range, an
                index out of [0, K).
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64, got {indices.dtype}")
        self._check_indices(indices)
        held, tokens = self._scales_in(indices.shape[-1])
        if upto is None:
            upto = held
        if not 1 <= upto <= held:
            raise ValueError(f"upto must be 1 to {held} for {tokens} tokens, got {upto}")
        indices = indices[..., : sum(self.tokens_per_scale[:upto])]
        if check and not bool(((indices >= 0) & (indices < self.codebook_size)).all()):
            low, high = indices.aminmax()
            raise ValueError(
                f"indices must be in [0, {self.codebook_size}), got {int(low)} to {int(high)}"
            )
        size = self.scales[-1] if size is None else size
        return self._sum_codes(indices, self.joint_codebook(check=check), upto, size)

    def _check_indices(self, indices: Tensor, tokens: int | None = None, where: str = "") -> None:
        """Whether indices have the shape of tokens, of so many, said to be `where`."""
        groups = (self.books,) * self._own
        shape = tuple(indices.shape)
        fits = indices.dim() == 2 + self._own and shape[1:-1] == groups and shape[0] > 0
        if not fits or tokens not in (None, shape[-1]):
            length = "L" if tokens is None else tokens
            expected = ", ".join(map(str, ("B", *groups, length)))
            where = where or ", B > 0"
            raise ValueError(f"indices must have shape [{expected}]{where}, got {shape}")

    @torch.no_grad()
    def decode_rows(self, rows: Tensor, size: Size | None = None) -> Tensor:
        """`f^ [B, D, *size]` of rows in the place of all scales' codes, such as means over several.

        Args:
            rows: [B, L, D], in floating point.
            size: as for `decode`.

        Raises:
            ValueError: another shape.
        """
        expected = (sum(self.tokens_per_scale), self.dim)
        if rows.dim() != 3 or rows.shape[1:] != expected:
            raise ValueError(
                f"rows must have shape [B, {expected[0]}, {expected[1]}], got {tuple(rows.shape)}"
            )
        size = self.scales[-1] if size is None else size
        parts = enumerate(rows.split(self.tokens_per_scale, dim=1))
        return torch.stack([self._at_size(part, scale, size) for scale, part in parts]).sum(0)

    def _scales_in(self, tokens: int) -> tuple[int, int]:
        """How many whole scales a number of tokens holds."""
        total = 0
        for count, step in enumerate(self.tokens_per_scale, start=1):
            total += step
            if total == tokens:
                return count, tokens
        raise ValueError(
            f"indices must hold the tokens of the first scales "
            f"({', '.join(map(str, self.tokens_per_scale))}) or of all, got {tokens}"
        )

    def split(self, indices: Tensor) -> list[Tensor]:
        """Token indices [B, L] cut by scale: [B, h * w] each."""
        held, _ = self._scales_in(indices.shape[-1])
        return list(indices.split(self.tokens_per_scale[:held], dim=-1))

    @torch.no_grad()
    def codes(self, indices: Tensor) -> Tensor:
        """Codebook rows [..., D] of indices [...], normalised as the quantizer uses them. With
        indices of their own, [..., L, D] of [..., G, L].

        Raises:
            IndexError: an index out of [0, K) (on the CPU).
        """
        parts = indices.unbind(-2) if self._own else [indices] * len(self.dims)
        groups = zip(parts, self._tables(), strict=True)
        rows = torch.cat([F.embedding(part, group) for part, group in groups], dim=-1)
        return self._normalize(rows)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """The code at the smallest distance of each row, [B, G, L] of [B, L, D], whatever the scale
        and the metric; G is 1 with a shared index."""
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        flat, weights = rows.to(dtype).flatten(0, 1), None if self._own else self.weights
        flat = torch.stack(self._by_book(flat)) if self._own else flat
        codebook = self.joint_codebook(dtype)
        found = ops.nearest_code(flat, codebook, self._book_dims, weights, self.l2_norm)
        return found.view(self.books, *rows.shape[:2]).transpose(0, 1)

    # What a next-scale predictor sees: `accumulate` carries f^ from scale to scale, `scale_input`
    # gives the map that a scale's input is made of.

    @torch.no_grad()
    def accumulate(self, f_hat: Tensor | None, indices: Tensor, scale: int) -> Tensor:
        """f^ with one more scale (arXiv 2412.03069, section 3.3), to be carried to the next.

        The scale's codes are added at the scale's own size, and the sum is resized bicubically to
        the next scale's.

        Args:
            f_hat: what the last call returned, [B, D, h, w] at this scale's size; None for scale 0.
            indices: this scale's tokens [B, h * w], or rows in the place of their codes, such as
                means over several codes, floating point [B, h * w, D].
            scale: which scale, from 0.

        Returns:
            [B, D, h', w'] at the next scale's size; at the last scale the sum itself.

        Raises:
            ValueError: `scale` out of range, or a shape that does not fit it.
        """
        self._check_scale(scale, 0)
        total = self._add_scale(f_hat, indices, scale)
        return total if scale + 1 == len(self.scales) else self._carry(total, scale + 1)

    @torch.no_grad()
    def scale_input(self, f_hat: Tensor, scale: int, indices: Tensor | None = None) -> Tensor:
        """What the input of a scale is made of, [B, D, h, w] at the scale's size.

        Args:
            f_hat: what `accumulate` returned for the scale before.
            scale: which scale, from 1: the first has no input.
            indices: tokens [B, h * w] of the scale itself, where it refines what it has drawn. They
                are added.

        Raises:
            ValueError: `scale` out of range, or a shape that does not fit it.
        """
        self._check_scale(scale, 1)
        if indices is None:
            self._check_f_hat(f_hat, scale)
            return self._view(f_hat, scale)
        return self._view(self._add_scale(f_hat, indices, scale), scale)

    def _check_scale(self, scale: int, first: int) -> None:
        if not first <= scale < len(self.scales):
            raise ValueError(f"scale must be {first} to {len(self.scales) - 1}, got {scale}")

    def _check_f_hat(self, f_hat: Tensor, scale: int, batch: int | None = None) -> None:
        size = (self.dim, *self._carried_size(scale))
        if f_hat.dim() != 4 or f_hat.shape[1:] != size or batch not in (None, len(f_hat)):
            expected = ", ".join(map(str, ("B" if batch is None else batch, *size)))
            raise ValueError(f"f_hat must have shape ({expected}), got {tuple(f_hat.shape)}")

    def _add_scale(self, f_hat: Tensor | None, indices: Tensor, scale: int) -> Tensor:
        count, rows = self.tokens_per_scale[scale], indices
        if indices.is_floating_point():
            if indices.dim() != 3 or indices.shape[1:] != (count, self.dim):
                raise ValueError(
                    f"rows must have shape [B, {count}, {self.dim}] at scale {scale}, got "
                    f"{tuple(indices.shape)}"
                )
        else:
            self._check_indices(indices, count, f" at scale {scale}")
            rows = self._codes_to_add(indices)
        if f_hat is None:
            return self._added(rows, scale)
        self._check_f_hat(f_hat, scale, len(indices))
        return f_hat + self._added(rows, scale)

    def _at_size(self, rows: Tensor, scale: int, size: Size) -> Tensor:
        """What a scale's codes [B, h * w, D] add to the f^ of all, [B, D, *size]."""
        maps = rows.unflatten(1, self.scales[scale]).permute(0, 3, 1, 2)
        if tuple(size) == self.scales[scale]:
            return maps
        return F.interpolate(maps, tuple(size), mode="bicubic", align_corners=False)

    # The five that differ from pyramid to pyramid; `tokenflow_ext.var` has others.

    def _carried_size(self, scale: int) -> Size:
        """Size of the f^ that comes to a scale."""
        return self.scales[scale]

    def _codes_to_add(self, indices: Tensor) -> Tensor:
        """Codes [B, h * w, D] of a scale's tokens [B, h * w]."""
        return self.codes(indices)

    def _added(self, rows: Tensor, scale: int) -> Tensor:
        """What a scale's codes [B, h * w, D] add to the f^ that came to it."""
        return self._at_size(rows, scale, self._carried_size(scale))

    def _carry(self, f_hat: Tensor, scale: int) -> Tensor:
        """The f^ that comes to a scale, of that left by the scale before."""
        return F.interpolate(f_hat, self.scales[scale], mode="bicubic", align_corners=False)

    def _view(self, f_hat: Tensor, scale: int) -> Tensor:
        """f^ that came to a scale, at the scale's size."""
        return f_hat

    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """Inputs of scales 2 to S for teacher forcing, [B, L - h_1 * w_1, D].

        Args:
            indices: tokens of all scales, [B, L].
        """
        f_hat, inputs = None, []
        for scale, tokens in enumerate(self.split(indices)[:-1]):
            f_hat = self.accumulate(f_hat, tokens, scale)
            inputs.append(self.scale_input(f_hat, scale + 1).flatten(2).mT)
        if not inputs:
            return self.codes(indices)[:, :0]
        return torch.cat(inputs, dim=1)

    # ------------------------------------------------------------------ codebook care

    @torch.no_grad()
    def rows(self, h: Tensor) -> Tensor:
        """The rows that the scales of h search with, [B * L, D]: features for the two below."""
        features, codebook = self._inputs(h, False)
        rows = self._rows(features, codebook, self.encode(features))
        if self._own:
            rows = rows.transpose(1, 2).flatten(2)
        return rows.flatten(0, 1)

    def usage_window(self, reset: bool = True) -> CodebookUsage:
        """Usage over the training steps since the last reset (all processes)."""
        return CodebookUsage.of_window(self.window_hits, reset)

    @torch.no_grad()
    def init_kmeans(self, features: Tensor, iterations: int = 10) -> None:
        """Sets the codebooks to k-means centres of features; the same on every process.

        Every process calls it, with features of its own, not necessarily as many. A centre that
        loses all its rows moves to a random feature.

        Args:
            features: [N, D], N > 0, such as `rows(h)` returns. Rows with a NaN or an infinity are
                left out and counted in `skipped_rows`.
            iterations: how many assignments and means.

        Raises:
            ValueError: a wrong shape, or a process without a finite row (on every process).
        """
        centres = [
            self._centres(book, iterations) for book in self._by_book(self._features(features))
        ]
        self._copy_codes(torch.stack(centres) if self._own else centres[0], None)
        self._reset_statistics(torch.ones_like(self.usage_ema, dtype=torch.bool), 0.0)

    def _centres(self, features: Tensor, iterations: int) -> Tensor:
        """k-means of the rows of one index, [K, D]: the codes nearest to them by the distance."""
        dims = self._book_dims
        weights = None if self._own else self.weights

        def sample() -> Tensor:
            return sample_rows(features, self.codebook_size)

        def stored(rows: Tensor) -> Tensor:
            """As the codebooks hold them, in their dtype."""
            rows = self._normalize(rows, dims)
            return rows.to(self.codebooks[0].dtype).to(rows.dtype)

        def assign(centres: Tensor) -> Tensor:
            return ops.nearest_code(features, centres, dims, weights, self.l2_norm)

        centres, _ = kmeans(
            self._normalize(features, dims),
            stored(sample()),
            iterations,
            assign=assign,
            normalize=stored,
            spare=sample,
        )
        return centres

    def _by_book(self, rows: Tensor) -> list[Tensor]:
        """Rows [N, D] cut by index."""
        if not self._own:
            return [rows]
        return [part.contiguous() for part in rows.chunk(self.books, dim=-1)]

    @torch.no_grad()
    def restart_dead_codes(self, features: Tensor, threshold: float = 0.05) -> int:
        """Moves codes that are hardly used to random features; the same on every process.

        Code, running hits and running sums are reset together, the hits to the mean, so that a
        restarted code has time to find its rows. Every process calls it.

        Args:
            features: as for `init_kmeans`.
            threshold: a code is dead where its running hits are below this share of the mean.

        Returns:
            How many codes were moved (waits for the device).

        Raises:
            As `init_kmeans`.
        """
        features = self._features(features)
        mean = self.usage_ema.mean(dim=-1, keepdim=True)
        dead = self.usage_ema < threshold * mean
        rows = sample_rows(features, self.codebook_size)
        self._set_codes(torch.stack(self._by_book(rows)) if self._own else rows, dead)
        self._reset_statistics(dead, mean)
        return int(dead.sum())

    def _features(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] != self.dim or features.shape[0] == 0:
            raise ValueError(
                f"features must have shape [N, {self.dim}], N > 0, got {tuple(features.shape)}"
            )
        features = features.detach().to(self.codebooks[0].device, torch.float32)
        finite = features.isfinite().all(dim=1)
        counts = torch.stack([(~finite).sum(), (~finite.any()).long()])
        skipped, without = all_reduce(counts).tolist()
        if without:
            raise ValueError(
                f"features must hold a finite row on every process, {without} of them had none"
            )
        self.skipped_rows.add_(skipped)
        return features[finite] if skipped else features

    def _normalize(self, rows: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        return ops.normalize_groups(rows, self.dims if dims is None else dims, self.l2_norm)

    def _set_codes(self, rows: Tensor, where: Tensor | None) -> None:
        """codebooks[where] = rows[where], normalised with l2_norm; rows and where as
        `joint_codebook` and `usage_ema` are."""
        self._copy_codes(self._normalize(rows, self._book_dims), where)

    def _copy_codes(self, rows: Tensor, where: Tensor | None) -> None:
        groups = rows.unbind() if self._own else rows.split(self.dims, dim=-1)
        for number, (codebook, group) in enumerate(zip(self.codebooks, groups, strict=True)):
            group = group.to(codebook.dtype)
            if where is not None:
                moved = where[number] if self._own else where
                group = torch.where(moved.unsqueeze(1), group, codebook)
            codebook.copy_(group)

    def _reset_statistics(self, where: Tensor, hits: Tensor | float) -> None:
        codes = self._normalize(self.joint_codebook(), self._book_dims)
        reset_running(where, codes, hits, self.usage_ema, self.codebook_sums)
