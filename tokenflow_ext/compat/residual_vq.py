"""Stands in for vector-quantize-pytorch's `ResidualVQ`, version 1.32."""

from __future__ import annotations

import random
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext import ops

from ._codebook import go_towards, shared_seed
from ._common import NEEDS_DISTANCES, raise_unsupported, shown
from .vector_quantize import VectorQuantize

MOST_SCALES = 64  # kMaxScales of csrc/common/geometry.h


class ResidualVQ(nn.Module):
    """vector-quantize-pytorch's `ResidualVQ` (arXiv 2107.03312, algorithm 1) on the fused search.

    Further keyword arguments are those of `VectorQuantize`. With a shared codebook and outside
    training, all layers are one call of the fused pyramid.

    Raises:
        NotImplementedError: an option that is not supported, named with its value.
        ValueError: options that exclude each other.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if diveq:  # the gradient goes through the sum of the layers' codes alone
            vq_kwargs |= {
                "ema_update": False,
                "learnable_codebook": True,
                "route_gradients_to_input": False,
                "commitment_weight": 0.0,
            }
            quant_grad_frac = 1.0
        raise_unsupported(
            "ResidualVQ",
            NEEDS_DISTANCES,
            implicit_neural_codebook=implicit_neural_codebook,
            beam_size=_beams(beam_size),
            eval_beam_size=_beams(eval_beam_size),
        )
        raise_unsupported("ResidualVQ", "one head", heads=heads if heads != 1 else None)
        for name, supported in (("channel_last", True), ("accept_3d_fmap", False)):
            if vq_kwargs.pop(name, supported) != supported:
                raise NotImplementedError(
                    f"ResidualVQ does not support {name}={not supported}: it takes [B, N, C], or "
                    "images with accept_image_fmap"
                )
        if shared_codebook:
            raise_unsupported(
                "ResidualVQ",
                "with shared_codebook=True nothing would step it",
                in_place_codebook_optimizer=vq_kwargs.get("in_place_codebook_optimizer"),
            )
        sizes = (
            tuple(codebook_size)
            if isinstance(codebook_size, (tuple, list))
            else (codebook_size,) * (num_quantizers or 0)
        )
        if not sizes or len(sizes) != (num_quantizers or len(sizes)):
            raise ValueError(
                "num_quantizers must be at least 1 and agree with codebook_size, "
                f"got num_quantizers={num_quantizers}, codebook_size={shown(codebook_size)}"
            )
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"shared_codebook needs one codebook_size, got {shown(codebook_size)}")
        if not 0 <= quantize_dropout_cutoff_index < len(sizes) and quantize_dropout:
            raise ValueError(
                f"quantize_dropout_cutoff_index must be 0 to {len(sizes) - 1}, "
                f"got {quantize_dropout_cutoff_index}"
            )
        self.dim = dim
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.num_quantizers = len(sizes)
        self.codebook_sizes = sizes
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.accept_image_fmap = accept_image_fmap
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, self.codebook_dim)
            self.project_out = nn.Linear(self.codebook_dim, dim)
        self.layers = nn.ModuleList(
            VectorQuantize(
                self.codebook_dim,
                size,
                accept_image_fmap=accept_image_fmap,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **vq_kwargs,
            )
            for size in sizes
        )
        if shared_codebook:
            for layer in self._quantizers():
                layer._codebook = self._quantizers()[0]._codebook
                layer.deferred = True

    def _quantizers(self) -> list[VectorQuantize]:
        return cast(list[VectorQuantize], list(self.layers))

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """Codes of each layer: [Q, K, D], or Q of them where sizes differ."""
        codebooks = tuple(layer._codebook.embed[0] for layer in self._quantizers())
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [Q, ..., D] of indices [..., Q]; zeros where an index is -1.

        With quantize_dropout fewer than Q indices may be given; the rest count as -1.
        """
        given = indices.shape[-1]
        if given > self.num_quantizers or (
            given < self.num_quantizers and not self.quantize_dropout
        ):
            raise ValueError(
                f"indices must have {self.num_quantizers} in the last dimension (fewer only with "
                f"quantize_dropout), got {tuple(indices.shape)}"
            )
        indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        codes = [
            layer._codebook.decode(index.unsqueeze(0))[0]
            for layer, index in zip(self._quantizers(), indices.unbind(-1), strict=True)
        ]
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized output [..., dim] of indices [..., Q], channels last for images too; zeros
        where all indices are -1."""
        output = self.project_out(self.get_codes_from_indices(indices).sum(dim=0))
        return output.masked_fill((indices == -1).all(dim=-1, keepdim=True), 0.0)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x, layer by layer what the layers before left.

        Args:
            x: [B, N, dim], or [B, dim, H, W] with accept_image_fmap.
            mask: [B, N] bool, False for padding.
            return_all_codes: also return the codes of each layer, [Q, B, N, D].
            freeze_codebook: leave statistics and codes alone in this step.
            rand_quantize_dropout_fixed_seed: decides which layers are dropped.

        Returns:
            quantized, like x; indices [B, N, Q] or [B, H, W, Q], -1 for dropped layers and padding;
            losses [Q].
        """
        raise_unsupported(
            "ResidualVQ", NEEDS_DISTANCES, indices=indices, beam_size=_beams(beam_size)
        )
        channel = 1 if self.accept_image_fmap else -1
        dims = (4,) if self.accept_image_fmap else (2, 3)
        if x.dim() not in dims or x.shape[channel] != self.dim:
            raise ValueError(
                f"x must have {' or '.join(map(str, dims))} dimensions and {self.dim} channels in "
                f"dimension {channel}, got {tuple(x.shape)}"
            )
        inputs = x.movedim(channel, -1)
        x = self.project_in(inputs)
        if mask is None and len(x) > 0 and self._fusable():
            quantized, index, losses = self._pyramid(x)
        else:
            last = self._last_layer(x.device, rand_quantize_dropout_fixed_seed)
            options = {
                "mask": mask,
                "freeze_codebook": freeze_codebook or None,
                "sample_codebook_temp": sample_codebook_temp,
            }
            quantized, index, losses = self._layers(x.movedim(-1, channel), last, options)
            quantized = quantized.movedim(channel, -1)
        if self.diveq:
            quantized = go_towards(x, quantized)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else inputs
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        out = (quantized.movedim(-1, channel), index, losses)
        return (*out, self.get_codes_from_indices(index)) if return_all_codes else out

    def _last_layer(self, device: torch.device, seed: int | None) -> int:
        """The last layer that takes part, the same on every process."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers - 1
        chance = random.Random(shared_seed(device) if seed is None else seed)
        last = chance.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return -(-(last + 1) // multiple) * multiple - 1

    def _layers(
        self, x: Tensor, last: int, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layers 0 to `last`, one after the other, on x as they take it."""
        residual, quantized = x, torch.zeros_like(x)
        indices: list[Tensor] = []
        losses: list[Tensor] = []
        rows: list[Tensor] = []
        for number, layer in enumerate(self._quantizers()):
            if number > last:
                indices.append(torch.full_like(indices[0], -1))
                losses.append(torch.zeros_like(losses[0]))
                continue
            rows.append(residual.detach())
            codes, index, loss = layer(residual, **options)
            quantized = quantized + codes
            indices.append(index)
            losses.append(loss)
            passed = self.quant_grad_frac
            residual = residual - (passed * codes + (1 - passed) * codes.detach())
        first = self._quantizers()[0]
        if (
            self.training
            and first.deferred
            and not (options["freeze_codebook"] or first.freeze_codebook)
        ):
            if first.ema_update:
                first._codebook.update_ema()
            mask, channel = options["mask"], 1 if self.accept_image_fmap else -1
            every = torch.stack([part.movedim(channel, -1) for part in rows], dim=-2)
            kept = None if mask is None else mask.unsqueeze(-1).expand(every.shape[:-1])
            first._codebook.expire_codes_(
                every.float().unsqueeze(0), None if kept is None else kept.reshape(1, -1)
            )
        return quantized, torch.stack(indices, dim=-1), torch.stack(losses)

    def _fusable(self) -> bool:
        book = self._quantizers()[0]._codebook
        if self.training or not self.shared_codebook:
            return False
        learns = torch.is_grad_enabled() and book.embed.requires_grad
        started = not book.kmeans_init or bool(book.initted)
        products = book.use_cosine_sim and book.any_length
        return not learns and not products and started and self.num_quantizers <= MOST_SCALES

    @torch.no_grad()
    def _pyramid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All layers as a pyramid whose scales all have the size of the input, N x 1."""
        book = self._quantizers()[0]._codebook
        rows = x.detach().float().flatten(0, -2)
        h = rows.view(-1, 1, 1, rows.shape[-1]).permute(0, 3, 1, 2)
        out = ops.multiscale_quantize(
            h,
            book.codes[0],
            [rows.shape[-1]],
            [(1, 1)] * self.num_quantizers,
            l2_norm=book.use_cosine_sim,
        )
        index = out.indices.view(*x.shape[:-1], self.num_quantizers)
        losses = torch.zeros(self.num_quantizers, device=x.device)
        return out.quantized.view(x.shape).to(x.dtype), index, losses


def _beams(size: int | None) -> int | None:
    """Of a number of beams what makes a difference: one beam is none."""
    return None if size is None or size <= 1 else size
