"""Stands in for vector-quantize-pytorch's `FSQ` and `ResidualFSQ`, version 1.32."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import scalar

from ._codebook import zeros_for_padding
from ._common import projections, raise_unsupported
from ._residual import Residual
from ._scalar import Layout, computed, without_autocast


class FSQ(nn.Module):
    """vector-quantize-pytorch's `FSQ` (arXiv 2309.15505) on the fused thresholds.

    Args:
        levels: of each channel; 2 only with `preserve_symmetry`.
        dim: channels of the input, those of the codebooks by default.
        num_codebooks: codebooks side by side, each with an index.
        keep_num_codebooks_dim: whether indices have a dimension for one codebook too.
        scale: kept, and of no effect, as in the original.
        allowed_dtypes: what is computed in as it is; all else in float32.
        channel_first: the input is [B, dim, ...] also with 2 or 3 dimensions.
        projection_has_bias: of the projections where `dim` is another.
        return_indices: otherwise indices are None.
        force_quantization_f32: compute in float32 under autocast and for half precision. Without
            it only float32 and float64 are quantized.
        preserve_symmetry: levels from -1 to 1 (arXiv 2411.19842, section 3.2).
        noise_dropout: in training, the share of values that receive noise of [-1/2, 1/2].
        bound_hard_clamp: cut numbers to [-1, 1] in place of tanh.
        orthogonal_rotation: rotate the channels by a fixed random matrix.

    Raises:
        ValueError: options that exclude each other, or out of their range.
        NotImplementedError: a hard clamp without preserve_symmetry; in `forward`, quantization in
            half precision.
    """

    _levels: Tensor
    _basis: Tensor
    _like: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if 2 in levels and not preserve_symmetry:
            raise ValueError(f"levels of 2 need preserve_symmetry=True, got {list(levels)}")
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError(f"noise_dropout={noise_dropout} needs preserve_symmetry=True")
        if not preserve_symmetry:
            raise_unsupported(
                "FSQ",
                "without preserve_symmetry the clamp does not reach the levels",
                bound_hard_clamp=bound_hard_clamp,
            )
        self._bound: scalar.Bound = "tanh"
        if preserve_symmetry:
            self._bound = "clamp" if bound_hard_clamp else "symmetric"
        self.levels = tuple(int(count) for count in levels)
        scalar.check_levels(self.levels, self._bound)
        if return_indices and math.prod(self.levels) >= 1 << 31:
            raise ValueError(
                f"levels must have fewer than 2^31 codes for indices of int32, got "
                f"{list(self.levels)}: give return_indices=False"
            )
        self.layout = Layout(
            "FSQ",
            dim,
            len(self.levels),
            num_codebooks,
            keep_num_codebooks_dim,
            channel_first or None,
        )
        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.bound_hard_clamp = bound_hard_clamp
        self.allowed_dtypes = tuple(allowed_dtypes)
        self.force_quantization_f32 = force_quantization_f32
        self.return_indices = return_indices
        self.codebook_dim = len(self.levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = self.layout.keep
        self.channel_first = channel_first
        self.dim = self.layout.dim
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in, self.project_out = projections(
            self.dim, self.effective_codebook_dim, projection_has_bias
        )
        if return_indices:
            self.codebook_size = math.prod(self.levels)
        for name in ("_levels", "_basis"):
            part = torch.empty(self.codebook_dim, dtype=torch.int32)
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # the module's dtype
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer(
                "orthogonal_rot", torch.empty(self.codebook_dim, self.codebook_dim)
            )
        make = functools.partial(scalar.levels, self.levels, bound=self._bound)
        self._tables = scalar.TableCache(make, True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The rotation anew, and what the levels give. The projections reset themselves."""
        below = torch.tensor([1, *self.levels[:-1]], device=self._levels.device)
        self._levels.copy_(torch.tensor(self.levels))
        self._basis.copy_(below.cumprod(0, dtype=torch.int32))
        if self.orthogonal_rotation:
            nn.init.orthogonal_(self.orthogonal_rot)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, [codebook_size, codebook_dim]; none without return_indices."""
        indices = torch.arange(self.codebook_size, device=self._levels.device)
        return self._codes(indices, self._like.dtype)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel, [..., codebook_dim], of indices [...]."""
        return scalar.unpack_digits(indices, self.levels)

    def _codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        levels = self.indices_to_level_indices(indices)
        kept = dtype if dtype == torch.float64 else torch.float32
        values = self._tables.like(torch.empty((), dtype=kept, device=indices.device)).values[0]
        codes = values.gather(0, levels.reshape(-1, self.codebook_dim)).view(levels.shape)
        return codes.to(dtype)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices [...] int32 of codes [..., codebook_dim].

        Raises:
            ValueError: another number of channels.
        """
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(
                f"zhat must have {self.codebook_dim} channels, got {tuple(zhat.shape)}"
            )
        counts = torch.tensor(self.levels, device=zhat.device)
        if self.preserve_symmetry:
            digits = (zhat + 1) * (counts - 1) / 2
        else:
            digits = (zhat + 1) * (counts // 2)
        return scalar.pack_digits(digits.round(), self.levels).int()

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The output of indices: [B, N, dim] of [B, N], images [B, dim, ...] of [B, ...]."""
        images = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        codes = self._codes(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.T
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if self.has_projections:
            codes = codes.to(next(self.project_out.parameters()).dtype)
        codes = self.project_out(codes)
        return codes.movedim(-1, 1) if images or self.channel_first else codes

    def quantize(self, z: Tensor) -> Tensor:
        """Codes like z [..., codebook_dim], straight through the rounding."""
        return self._quantize(z).quantized

    def _quantize(self, rows: Tensor) -> scalar.QuantizedRows:
        """Codes and indices of rows [..., codebook_dim]."""
        return scalar.quantize_rows(
            rows,
            self._tables.like(rows),
            counts=self.levels if self.return_indices else (),
            stand_in=scalar.stand_in_of(self._bound),
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantizes z.

        Args:
            z: [B, N, dim], or [B, dim, ...] with 4 or more dimensions or channel_first.

        Returns:
            quantized, like z, and indices int32: z without channels, and with a dimension for
            several codebooks; None without return_indices.

        Raises:
            ValueError: another number of channels or dimensions.
            NotImplementedError: z would be quantized in half precision.
        """
        rows = self.project_in(self.layout.rows(z))
        shape, books = rows.shape, (*rows.shape[:2], self.num_codebooks)
        # One codebook's rows are as they should be: a view has its price in a gradient.
        flat = rows if self.num_codebooks == 1 else rows.unflatten(-1, (self.num_codebooks, -1))
        if self.orthogonal_rotation:
            flat = flat @ self.orthogonal_rot
        given = flat.dtype
        flat = computed("FSQ", flat, self.force_quantization_f32, self.allowed_dtypes)
        with without_autocast(flat):
            found = self._quantize(flat)
            codes = found.quantized
            indices = found.indices.int().view(books) if self.return_indices else None
            if self.training and self.noise_dropout:
                noisy = torch.full_like(codes, self.noise_dropout).bernoulli_().bool()
                noise = torch.rand_like(codes) - 0.5
                codes = torch.where(noisy, codes + noise, codes).clamp(-1, 1)
            if self.orthogonal_rotation:
                codes = codes @ self.orthogonal_rot.T
        codes = codes.to(given)
        out = self.project_out(codes if self.num_codebooks == 1 else codes.view(shape))
        return self.layout.restore(out, z), self.layout.restore_indices(indices, z)


class ResidualFSQ(Residual):
    """vector-quantize-pytorch's `ResidualFSQ` on the fused thresholds: all layers in one call.

    Layer k quantizes what the layers before left on a grid L^k times as fine (arXiv 2107.03312,
    algorithm 1).

    Args:
        levels: of each channel.
        num_quantizers: layers.
        dim: channels of the input, those of the levels by default.
        is_channel_first: the input is [B, dim, ...].
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training,
            leave out the layers after one that is drawn.
        soft_clamp_input_value: the input is brought to within it by tanh; with a hard clamp
            1 + 1 / (levels - 1), and no other.
        bound_hard_clamp: as in `FSQ`.
        kwargs: further arguments of `FSQ`.

    Raises:
        ValueError: options that exclude each other, or out of their range.
        NotImplementedError: as `FSQ`.
    """

    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
        super().__init__(
            num_quantizers,
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        if "preserve_symmetry" in kwargs or "channel_first" in kwargs:
            given = sorted({"preserve_symmetry", "channel_first"} & kwargs.keys())
            raise TypeError(f"ResidualFSQ sets {' and '.join(given)} of its layers itself")
        for name, value in {"num_codebooks": 1, "return_indices": True}.items():
            if kwargs.get(name, value) != value:
                raise ValueError(f"{name} of ResidualFSQ must be {value}, got {kwargs[name]}")
        self.levels = levels
        width = len(levels)
        self.dim = width if dim is None else dim
        self.has_projections = self.dim != width
        self.project_in, self.project_out = projections(self.dim, width)
        self.is_channel_first = is_channel_first
        self.layers = nn.ModuleList(
            FSQ(
                levels,
                dim=width,
                preserve_symmetry=True,
                bound_hard_clamp=bound_hard_clamp,
                **kwargs,
            )
            for _ in range(num_quantizers)
        )
        self.codebook_size = self._quantizers()[0].codebook_size
        if bound_hard_clamp:
            if soft_clamp_input_value is not None:
                raise ValueError("soft_clamp_input_value is set by bound_hard_clamp=True")
            soft_clamp_input_value = [1 + 1 / (count - 1) for count in levels]
        if isinstance(soft_clamp_input_value, Tensor):
            soft_clamp_input_value = soft_clamp_input_value.tolist()
        self._soft_clamp = soft_clamp_input_value
        clamp = None
        if soft_clamp_input_value is not None:
            clamp = torch.empty(torch.tensor(soft_clamp_input_value, device="cpu").shape)
        self.register_buffer("scales", torch.empty(num_quantizers, width), persistent=False)
        self.register_buffer("soft_clamp_input_value", clamp, persistent=False)
        first = self._quantizers()[0]
        make = functools.partial(
            scalar.levels, first.levels, bound=first._bound, rounds=num_quantizers
        )
        self._tables = scalar.TableCache(make, True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The layers' scales and the clamp. The layers and the projections reset themselves."""
        counts = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        rounds = torch.arange(self.num_quantizers, device="cpu").unsqueeze(1)
        self.scales.copy_(counts**-rounds)
        if self.soft_clamp_input_value is not None:
            self.soft_clamp_input_value.copy_(torch.tensor(self._soft_clamp, device="cpu"))

    def _quantizers(self) -> list[FSQ]:
        return cast(list[FSQ], list(self.layers))

    @property
    def codebooks(self) -> Tensor:
        """All codes of each layer before its scale, [Q, codebook_size, D]."""
        return torch.stack([layer.implicit_codebook for layer in self._quantizers()])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [Q, ..., D] of indices [..., Q], zeros where an index is -1; see `Residual`."""
        codes = super().get_codes_from_indices(indices)
        return codes * self.scales.view(self.num_quantizers, *[1] * (codes.dim() - 2), -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [..., dim] of indices [..., Q], channels last."""
        return self.project_out(super().get_output_from_indices(indices))

    def _decode(self, layer: nn.Module, index: Tensor) -> Tensor:
        decode = functools.partial(cast(FSQ, layer)._codes, dtype=self.scales.dtype)
        return zeros_for_padding(decode, index)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x, layer by layer what the layers before left.

        Args:
            x: [B, ..., dim], or [B, dim, ...] with is_channel_first.
            return_all_codes: also return the codes of each layer, [Q, B, ..., D].
            rand_quantize_dropout_fixed_seed: decides which layers are dropped.

        Returns:
            quantized, like x, and indices, x without channels and with Q last (with
            is_channel_first after the batch), int32, or int64 where layers are dropped (-1). With
            keep_num_codebooks_dim there is a dimension of 1 before Q.

        Raises:
            ValueError: x has other channels.
            NotImplementedError: x would be quantized in half precision.
        """
        channel = 1 if self.is_channel_first else -1
        if x.dim() < 2 or x.shape[channel] != self.dim:
            raise ValueError(
                f"x must have {self.dim} channels in dimension {channel}, got {tuple(x.shape)}"
            )
        rows = self.project_in(x.movedim(channel, -1))
        if self.soft_clamp_input_value is not None:
            clamp = self.soft_clamp_input_value
            rows = (rows / clamp).tanh() * clamp
        last = self._last_layer(x.device, rand_quantize_dropout_fixed_seed)
        with without_autocast(x):
            quantized, indices = self._all_layers(rows, last)
        out = self.project_out(quantized)
        if self._quantizers()[0].keep_num_codebooks_dim:
            indices = indices.unsqueeze(-2)
        if last + 1 < self.num_quantizers:
            indices = F.pad(indices.long(), (0, self.num_quantizers - 1 - last), value=-1)
        shown = indices.movedim(-1, 1) if self.is_channel_first else indices
        results = (out.movedim(-1, channel), shown)
        return (*results, self.get_codes_from_indices(indices)) if return_all_codes else results

    def _all_layers(self, rows: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """The sum of the codes of layers 0 to `last`, and their indices [..., last + 1]."""
        first = self._quantizers()[0]
        if first.orthogonal_rotation or (first.training and first.noise_dropout):
            return self._one_by_one(rows, last)
        given = torch.promote_types(rows.dtype, self.scales.dtype)
        flat = rows
        if not first.force_quantization_f32:
            flat = flat.to(given)
        flat = computed("FSQ", flat, first.force_quantization_f32, first.allowed_dtypes)
        found = scalar.quantize_rows(
            flat,
            self._tables.like(flat).each(lambda table: table[: last + 1]),
            counts=first.levels,
            stand_in=scalar.stand_in_of(first._bound),
        )
        return found.quantized.to(given), found.indices.int()

    def _one_by_one(self, rows: Tensor, last: int) -> tuple[Tensor, Tensor]:
        quantized, residual, indices = torch.zeros_like(rows), rows, []
        shape = (len(rows), -1, rows.shape[-1])
        for layer, scale in zip(self._quantizers()[: last + 1], self.scales, strict=False):
            codes, index = layer((residual / scale).reshape(shape))
            codes = codes.view(rows.shape) * scale
            residual, quantized = residual - codes.detach(), quantized + codes
            indices.append(index.view(rows.shape[:-1]))
        return quantized, torch.stack(indices, dim=-1)
