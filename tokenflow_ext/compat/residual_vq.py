"""Stands in for vector-quantize-pytorch's `ResidualVQ` and `GroupedResidualVQ`, version 1.32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenflow_ext import ops

from ._codebook import draw_seed, go_towards, shared_seed
from ._common import NEEDS_DISTANCES, check_features, projections, raise_unsupported, shown
from ._residual import Residual
from .vector_quantize import VectorQuantize

MOST_SCALES = 64  # kMaxScales of csrc/common/geometry.h


class ResidualVQ(Residual):
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
        super().__init__(
            len(sizes),
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.dim = dim
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_sizes = sizes
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.accept_image_fmap = accept_image_fmap
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.has_projections = self.codebook_dim != dim
        self.project_in, self.project_out = projections(dim, self.codebook_dim)
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

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized output [..., dim] of indices [..., Q], channels last for images too; zeros
        where all indices are -1."""
        output = self.project_out(super().get_output_from_indices(indices))
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
        check_features(x, dims, self.dim, channel)
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
            rows: list[Tensor] | None = [] if self._moves_after(freeze_codebook) else None
            quantized, index, losses = self._layers(x.movedim(-1, channel), last, options, rows)
            quantized = quantized.movedim(channel, -1)
            if rows is not None:
                self._move(rows, mask)
        if self.diveq:
            quantized = go_towards(x, quantized)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else inputs
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        out = (quantized.movedim(-1, channel), index, losses)
        return (*out, self.get_codes_from_indices(index)) if return_all_codes else out

    def _decode(self, layer: nn.Module, index: Tensor) -> Tensor:
        return cast(VectorQuantize, layer)._codebook.decode(index.unsqueeze(0))[0]

    def _moves_after(self, freeze_codebook: bool) -> bool:
        """Whether this step moves a shared codebook, once, after all layers."""
        first = self._quantizers()[0]
        return self.training and first.deferred and not (freeze_codebook or first.freeze_codebook)

    def _move(self, rows: list[Tensor], mask: Tensor | None) -> None:
        """Moves the shared codebook by what the layers took, each like x, and by their codes."""
        first = self._quantizers()[0]
        if first.ema_update:
            first._codebook.update_ema()
        channel = 1 if self.accept_image_fmap else -1
        every = torch.stack([part.movedim(channel, -1) for part in rows], dim=-2)
        kept = None if mask is None else mask.unsqueeze(-1).expand(every.shape[:-1])
        first._codebook.expire_codes_(
            every.float().unsqueeze(0), None if kept is None else kept.reshape(1, -1)
        )

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


class GroupedResidualVQ(nn.Module):
    """vector-quantize-pytorch's `GroupedResidualVQ` on the fused search: a `ResidualVQ` a group.

    The channels are split into groups, each quantized by a `ResidualVQ` of its own (HiFi-Codec,
    arXiv 2305.02765). In a step the groups drop the same layers.

    Args:
        dim: channels of all groups together.
        groups: number G of groups, a divisor of dim.
        accept_image_fmap: take images [B, dim, H, W].
        kwargs: those of `ResidualVQ`.

    Raises:
        NotImplementedError: an option that is not supported, named with its value.
        ValueError: options that exclude each other.
    """

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide dim, got groups={groups}, dim={dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs)
            for _ in range(groups)
        )

    def _by_group(self) -> list[ResidualVQ]:
        return cast(list[ResidualVQ], list(self.rvqs))

    @property
    def split_dim(self) -> int:
        """The dimension of x that holds the channels."""
        return 1 if self.accept_image_fmap else -1

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """Codes of each group's layers: [G, Q, K, D], or G times Q of them where sizes differ."""
        codebooks = [rvq.codebooks for rvq in self._by_group()]
        if isinstance(codebooks[0], Tensor):
            return torch.stack(cast(list[Tensor], codebooks))
        return tuple(cast(list[tuple[Tensor, ...]], codebooks))

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Codes [G, Q, ..., D] of indices [G, ..., Q], zeros where an index is -1."""
        by_group = zip(self._by_group(), self._indices(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in by_group])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The quantized output [..., dim] of indices [G, ..., Q], channels last for images too."""
        by_group = zip(self._by_group(), self._indices(indices), strict=True)
        return torch.cat([rvq.get_output_from_indices(index) for rvq, index in by_group], dim=-1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Quantizes x, each group of channels by itself.

        Args:
            x: [B, N, dim], or [B, dim, H, W] with accept_image_fmap.
            return_all_codes: also return a tuple of the codes of each group, [Q, B, N, D].
            sample_codebook_temp: temperature of this step's draws, with stochastic_sample_codes.
            freeze_codebook: leave statistics and codes alone in this step.
            mask: [B, N] bool, False for padding.

        Returns:
            quantized, like x, indices [G, B, N, Q] or [G, B, H, W, Q], -1 for dropped layers and
            padding, and losses [G, Q].

        Raises:
            NotImplementedError: `indices` are given.
            ValueError: a shape that does not fit.
        """
        given = None if indices is None or len(indices) == 0 else indices
        raise_unsupported("GroupedResidualVQ", NEEDS_DISTANCES, indices=given)
        check_features(x, (4,) if self.accept_image_fmap else (2, 3), self.dim, self.split_dim)
        seed = self._seed(x.device)
        by_group = zip(self._by_group(), x.chunk(self.groups, dim=self.split_dim), strict=True)
        results = [
            rvq(
                part,
                mask=mask,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part in by_group
        ]
        quantized, index, losses, *codes = zip(*results, strict=True)
        out = (torch.cat(quantized, dim=self.split_dim), torch.stack(index), torch.stack(losses))
        return (*out, *codes)

    def _seed(self, device: torch.device) -> int | None:
        """What decides the last layer of every group in this step, the same on every process."""
        if not self.training:
            return None
        if self._by_group()[0].quantize_dropout:
            return shared_seed(device)
        # Theirs draw it in every step. What is drawn after it is then the same.
        draw_seed(device)
        return None

    def _indices(self, indices: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """Indices by group."""
        if len(indices) != self.groups:
            raise ValueError(f"indices must hold {self.groups} groups first, got {len(indices)}")
        return indices.unbind() if isinstance(indices, Tensor) else indices


def _beams(size: int | None) -> int | None:
    """Of a number of beams what makes a difference: one beam is none."""
    return None if size is None or size <= 1 else size
