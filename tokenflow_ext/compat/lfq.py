"""Stands in for vector-quantize-pytorch's `LFQ` and `ResidualLFQ`, version 1.32."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import scalar
from tokenflow_ext.collectives import world_size
from tokenflow_ext.sign_entropy import sign_entropies

from ._codebook import zeros_for_padding
from ._common import projections
from ._residual import Residual
from ._scalar import Layout, computed, without_autocast


class Return(NamedTuple):
    """What `LFQ.forward` returns: quantized, like the input, indices int64 and a scalar loss."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The parts of the loss, before their weights."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosines of the input with learned columns, times a scale."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(dim_in, dim_out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal numbers."""
        self.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0) * self.scale


class LFQ(nn.Module):
    """vector-quantize-pytorch's `LFQ` (arXiv 2310.05737); BSQ (arXiv 2406.07548) where spherical.

    No matrix of rows and codes is formed: a row's entropy is a sum over channels, and the mean
    choice a product of two tables. In the original a row's entropy counts probabilities below 1e-5
    as if their logarithm were log 1e-5. Here it is exact. With inputs of about 0.1 and more, at the
    default temperature, that is within 1e-5 of theirs. Where rows are near 0 and spread over many
    codes ours is larger, by 2e-4 of 2^8 codes and by 4e-3 of 2^14. Of masked rows the original
    takes each row's own choice for the mean one, so that its two entropies cancel. Here they are
    those of the rows that count. In several processes the mean choice is over all of them.

    Args:
        dim: channels of the input, those of the codebooks by default.
        codebook_size: 2^D, by default with D = dim.
        entropy_loss_weight, commitment_loss_weight: of the parts of the loss.
        diversity_gamma: of the codebook's entropy.
        straight_through_activation: what the gradient passes through in training.
        num_codebooks: codebooks side by side, each with an index.
        keep_num_codebooks_dim: whether indices have a dimension for one codebook too.
        codebook_scale: magnitude of the values.
        frac_per_sample_entropy: share of the rows, drawn at random, that the entropies are of.
        has_projections: whether there are projections though `dim` fits.
        projection_has_bias: of the projections.
        soft_clamp_input_value: the input is brought to within it by tanh.
        cosine_sim_project_in, cosine_sim_project_in_scale: cosines as the projection.
        channel_first: whether channels come after the batch; in images alone by default.
        experimental_softplus_entropy_loss, entropy_loss_offset: softplus(loss + offset).
        spherical: rows and codes at unit length.
        force_quantization_f32: compute in float32 under autocast and for all other dtypes. Without
            it only float32 and float64 are quantized, in their own dtype.
        orthogonal_rotation: rotate the channels by a fixed random matrix.

    Raises:
        ValueError: options that exclude each other, or out of their range.
        NotImplementedError: beyond 24 channels, for which there would be more than 2^24 codes in a
            loss; in `forward`, quantization in half precision.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if dim is None and codebook_size is None:
            raise ValueError("dim or codebook_size must be given")
        size = (1 << cast(int, dim)) if codebook_size is None else codebook_size
        if size < 2 or size & (size - 1):
            raise ValueError(f"codebook_size must be a power of 2 from 2, got {size}")
        if not 0 < frac_per_sample_entropy <= 1:
            raise ValueError(
                f"frac_per_sample_entropy must be in (0, 1], got {frac_per_sample_entropy}"
            )
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value must be at least codebook_scale, {codebook_scale}, got "
                f"{soft_clamp_input_value}"
            )
        width = int(math.log2(size))
        if width > 24:
            raise NotImplementedError(
                f"LFQ does not support codebook_size=2**{width}: its loss is over all codes, here "
                "up to 2**24; take several codebooks"
            )
        self.force_quantization_f32 = force_quantization_f32
        self.layout = Layout(
            "LFQ", dim, width, num_codebooks, keep_num_codebooks_dim, channel_first
        )
        self.codebook_size = size
        self.codebook_dim = width
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = self.layout.keep
        self.channel_first = channel_first
        self.dim = self.layout.dim
        widths = width * num_codebooks
        self.has_projections = self.dim != widths if has_projections is None else has_projections
        if not self.has_projections and self.dim != widths:
            raise ValueError(f"dim={self.dim} needs projections to {widths} channels")
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                scale = cosine_sim_project_in_scale
                scale = codebook_scale if scale is None else scale
                self.project_in = CosineSimLinear(self.dim, widths, scale)
            else:
                self.project_in = nn.Linear(self.dim, widths, bias=projection_has_bias)
            self.project_out = nn.Linear(widths, self.dim, bias=projection_has_bias)
        self.activation = straight_through_activation or nn.Identity()
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", torch.empty(width, width))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.register_buffer("mask", torch.empty(width, dtype=torch.int64))
        self.register_buffer("zero", torch.empty(()), persistent=False)
        make = functools.partial(scalar.signs, width, value=self._value)
        self._tables = scalar.TableCache(make, False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The rotation anew, and the constants. The projections reset themselves."""
        self.mask.copy_(2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.zero.zero_()
        if self.orthogonal_rotation:
            nn.init.orthogonal_(self.orthogonal_rot)

    @property
    def _value(self) -> float:
        """Magnitude of a channel of a code."""
        return self.codebook_scale * (self.codebook_dim**-0.5 if self.spherical else 1.0)

    @property
    def dtype(self) -> torch.dtype:
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes before they are normalised, [codebook_size, codebook_dim]."""
        indices = torch.arange(self.codebook_size, device=self.zero.device)
        return self.bits_to_codes((indices.unsqueeze(1) & self.mask) != 0).float()

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Values of bits: the scale, positive or negative."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def _length_one(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) * self.codebook_scale if self.spherical else rows

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The output of indices: [B, N, dim] of [B, N], images [B, dim, ...] of [B, ...]."""
        images = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        transpose = images if self.channel_first is None else self.channel_first
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        codes = self._codes(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.T
        codes = codes.flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        return codes.movedim(-1, 1) if transpose else codes

    def _codes(self, indices: Tensor) -> Tensor:
        """Codes [..., codebook_dim] of indices [...], as they are added."""
        bits = (indices.unsqueeze(-1) & self.mask) != 0
        return self._length_one(self.bits_to_codes(bits).to(self.dtype))

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """Quantizes x.

        Args:
            x: [B, N, dim], or [B, dim, ...] in images.
            inv_temperature: of the choice of a code in the entropies.
            return_loss_breakdown: also return the parts of the loss.
            mask: [B, N] bool, False for rows that the loss leaves out.

        Returns:
            `Return`; its loss is 0 outside training.

        Raises:
            ValueError: x has another number of channels or dimensions.
            NotImplementedError: x would be quantized in half precision.
        """
        rows = self.project_in(self.layout.rows(x))
        if self.soft_clamp_input_value is not None:
            clamp = self.soft_clamp_input_value
            rows = (rows / clamp).tanh() * clamp
        rows = rows.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            rows = rows @ self.orthogonal_rot
        given = rows.dtype
        with without_autocast(rows):
            z = computed("LFQ", self._length_one(rows), self.force_quantization_f32)
            found = scalar.quantize_rows(
                z.detach(),
                self._tables.like(z),
                counts=(2,) * self.codebook_dim,
                little_endian=False,
            )
            indices, codes = found.indices.squeeze(-1), found.quantized
            out, loss, parts = self._trained(z, codes, inv_temperature, mask)
            out = out.to(given)
        if self.orthogonal_rotation:
            out = out @ self.orthogonal_rot.T
        out = self.layout.restore(self.project_out(out.flatten(-2)), x)
        shown = cast(Tensor, self.layout.restore_indices(indices, x))
        result = Return(out, shown, loss)
        return (result, parts) if return_loss_breakdown else result

    def _trained(
        self, z: Tensor, codes: Tensor, inv_temperature: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, LossBreakdown]:
        """Codes with their gradient, the loss and its parts; zeros outside training.

        Args:
            z, codes: [B, N, codebooks, codebook_dim].
        """
        parts = LossBreakdown(self.zero, self.zero, self.zero)
        if not self.training:
            return codes, self.zero, parts
        passed = self.activation(z)
        out = codes
        if torch.is_grad_enabled() and passed.requires_grad:
            out = codes + (passed - passed.detach())  # their value, to the last bit
        parts = self._losses(z, codes, inv_temperature, mask)
        loss = parts.per_sample_entropy - self.diversity_gamma * parts.batch_entropy
        if self.experimental_softplus_entropy_loss:
            loss = F.softplus(loss + self.entropy_loss_offset)
        loss = loss * self.entropy_loss_weight + parts.commitment * self.commitment_loss_weight
        return out, loss, parts

    def _losses(
        self, z: Tensor, codes: Tensor, inv_temperature: float, mask: Tensor | None
    ) -> LossBreakdown:
        commitment = self.zero
        if self.commitment_loss_weight > 0:
            error = (z - codes).square()
            commitment = (error if mask is None else error[mask]).mean()
        rows = z.flatten(0, 1) if mask is None else z[mask]
        if self.frac_per_sample_entropy < 1:
            count = int(len(rows) * self.frac_per_sample_entropy)
            rows = rows[torch.randn(len(rows)).argsort(dim=-1) < count]
        books = [
            sign_entropies(
                book,
                temperature=1 / inv_temperature,
                value=self._value,
                clamp=True,
                average=_over_processes if world_size() > 1 else None,
            )
            for book in rows.unbind(1)
        ]
        sample = torch.stack([book.per_sample for book in books]).mean()
        codebook = torch.stack([book.codebook for book in books]).mean()
        return LossBreakdown(sample, codebook, commitment)


def _over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes, differentiable."""
    return dist_functional.all_reduce(mean, op=dist.ReduceOp.SUM) / world_size()


class ResidualLFQ(Residual):
    """vector-quantize-pytorch's `ResidualLFQ`: an `LFQ` a layer, each with half the scale.

    Args:
        dim: channels of the input.
        num_quantizers: layers.
        codebook_size: 2^D of each layer.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training,
            leave out the layers after one that is drawn.
        soft_clamp_input_value: of the first layer; each further one has half of it.
        kwargs: further arguments of `LFQ`.

    Raises:
        ValueError, NotImplementedError: as `LFQ`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
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
        if codebook_size < 2:
            raise ValueError(f"codebook_size must be a power of 2 from 2, got {codebook_size}")
        width = int(math.log2(codebook_size))
        self.dim = dim
        self.has_projections = width != dim
        self.project_in, self.project_out = projections(dim, width)
        self.layers = nn.ModuleList()
        clamp = soft_clamp_input_value
        for number in range(num_quantizers):
            layer = LFQ(
                dim=width,
                codebook_size=codebook_size,
                codebook_scale=2.0**-number,
                soft_clamp_input_value=clamp,
                **kwargs,
            )
            if layer.has_projections:
                raise ValueError(
                    "layers of ResidualLFQ have no projections and one codebook, got "
                    f"num_codebooks={layer.num_codebooks} and "
                    f"has_projections={kwargs.get('has_projections')}"
                )
            self.layers.append(layer)
            clamp = None if clamp is None else clamp * 0.5
        make = functools.partial(scalar.signs, width, rounds=num_quantizers)
        self._tables = scalar.TableCache(make, False)

    def _quantizers(self) -> list[LFQ]:
        return cast(list[LFQ], list(self.layers))

    @property
    def codebooks(self) -> Tensor:
        """All codes of each layer before they are normalised, [Q, codebook_size, D]."""
        return torch.stack([layer.codebook for layer in self._quantizers()])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [..., dim] of indices [..., Q], channels last."""
        return self.project_out(super().get_output_from_indices(indices))

    def _decode(self, layer: nn.Module, index: Tensor) -> Tensor:
        return zeros_for_padding(lambda i: F.embedding(i, cast(LFQ, layer).codebook), index)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x, layer by layer what the layers before left.

        Args:
            x: [B, N, dim]. Without projections also images [B, dim, ...], as `LFQ` takes them.
            mask: [B, N] bool, False for rows that the losses leave out.
            return_all_codes: also return the codes of each layer, [Q, B, N, D].
            rand_quantize_dropout_fixed_seed: decides which layers are dropped.

        Returns:
            quantized, like x, indices [B, N, Q], -1 for dropped layers, and losses [Q].

        Raises:
            ValueError: x has other channels.
            NotImplementedError: x would be quantized in half precision.
        """
        layout = self._quantizers()[0].layout
        if self.has_projections and (
            layout.channel_first or x.dim() != 3 or x.shape[-1] != self.dim
        ):
            raise ValueError(
                f"x must have shape [B, N, {self.dim}] where ResidualLFQ has projections, and "
                f"channel_first must not be set, got {tuple(x.shape)}"
            )
        rows = self.project_in(x)
        last = self._last_layer(x.device, rand_quantize_dropout_fixed_seed)
        with without_autocast(x):
            quantized, indices, losses = self._all_layers(rows, last, mask)
        results = (self.project_out(quantized), indices, losses)
        return (*results, self.get_codes_from_indices(indices)) if return_all_codes else results

    def _all_layers(
        self, x: Tensor, last: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layers 0 to `last`: quantized, like x, indices [..., Q] and losses [Q].

        They are one call where nothing but the codes before changes what a layer quantizes.
        """
        first = self._quantizers()[0]
        rows = first.layout.rows(x)
        changed = first.spherical or first.orthogonal_rotation
        if changed or first.soft_clamp_input_value is not None or rows.dtype != torch.float32:
            return self._layers(x, last, {"mask": mask})
        found = scalar.quantize_rows(
            rows.detach(),
            self._tables.like(rows).each(lambda table: table[: last + 1]),
            counts=(2,) * first.codebook_dim,
            little_endian=False,
            keep_codes=first.training,
        )
        indices, quantized = found.indices.unsqueeze(2), found.quantized
        losses = self._quantizers()[0].zero.new_zeros(last + 1)
        if first.training:
            parts, z, total = [], rows.unsqueeze(2), torch.zeros_like(rows)
            for layer, code in zip(self._quantizers(), found.codes.unbind(-2), strict=False):
                code = code.reshape(z.shape)
                out, loss, _ = layer._trained(z, code, 100.0, mask)
                parts.append(loss)
                z, total = z - code, total + out.squeeze(2)
            quantized, losses = total, torch.stack(parts)
        shown = [first.layout.restore_indices(index, x) for index in indices.unbind(-1)]
        dropped = self.num_quantizers - 1 - last
        return (
            first.layout.restore(quantized, x),
            self._with_dropped(torch.stack(cast(list[Tensor], shown), dim=-1)),
            F.pad(losses, (0, dropped)),
        )
