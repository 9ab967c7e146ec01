"""Stands in for vector-quantize-pytorch's `HierarchicalVQ`, version 1.32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._codebook import shared_seed
from ._common import check_features, lens_to_mask, raise_unsupported, shown
from .vector_quantize import VectorQuantize


class _Phi(nn.Module):
    """x + r (conv(x) - x): a convolution of width 3 mixed in by |resi_ratio| = r."""

    def __init__(self, dim: int, spatial_dims: int, resi_ratio: float) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](dim, dim, 3, padding=1)
        self.resi_ratio = float(abs(resi_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.resi_ratio <= 1e-8 else x.lerp(self.conv(x).to(x.dtype), self.resi_ratio)


class HierarchicalVQ(nn.Module):
    """vector-quantize-pytorch's `HierarchicalVQ` on the fused search; arguments are its own.

    A residual pyramid as VAR's, of sequences, images or volumes, that pools by adaptive averages
    and upsamples linearly; each level's convolution is between them, so levels are searched one by
    one.

    Raises:
        NotImplementedError: an option that is not supported, named with its value.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ) -> None:
        super().__init__()
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other, got both")
        if not 0 <= nested_dropout <= 1 or nested_dropout_min_levels < 1:
            raise ValueError(
                "nested_dropout must be in [0, 1] and nested_dropout_min_levels at least 1, "
                f"got {nested_dropout} and {nested_dropout_min_levels}"
            )
        self.spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        self.scales = tuple(scales)
        self.level_shapes = tuple(self._shape(scale) for scale in scales)
        flat = [self.level_shapes[:-1], self.level_shapes[1:]]
        growing = all(
            a <= b for low, high in zip(*flat, strict=True) for a, b in zip(low, high, strict=True)
        )
        if not self.level_shapes or min(map(min, self.level_shapes)) < 1 or not growing:
            raise ValueError(
                f"scales must be positive sides that do not shrink, got {shown(scales)}"
            )
        self.dim = dim
        self.num_levels = len(self.level_shapes)
        self.codebook_sizes = (
            (codebook_size,) * self.num_levels
            if isinstance(codebook_size, int)
            else tuple(codebook_size)
        )
        if len(self.codebook_sizes) != self.num_levels or (
            shared_codebook and len(set(self.codebook_sizes)) > 1
        ):
            raise ValueError(
                f"codebook_size must be one number, or {self.num_levels} with "
                f"shared_codebook=False, got {shown(codebook_size)}"
            )
        self.channel_first = channel_first
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        options: dict[str, Any] = {
            "dim": dim,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
        }
        self.vq: VectorQuantize | None = None
        self.vqs: nn.ModuleList | None = None
        if shared_codebook:
            self.vq = VectorQuantize(codebook_size=self.codebook_sizes[0], **options)
        else:
            self.vqs = nn.ModuleList(
                VectorQuantize(codebook_size=size, **options) for size in self.codebook_sizes
            )
        self.phi_shared: _Phi | None = None
        self.phi_levels: nn.ModuleList | None = None
        if share_quant_resi == 1:
            self.phi_shared = _Phi(dim, self.spatial_dims, quant_resi)
        else:
            count = min(self.num_levels, share_quant_resi) if share_quant_resi > 0 else None
            self.phi_levels = nn.ModuleList(
                _Phi(dim, self.spatial_dims, quant_resi) for _ in range(count or self.num_levels)
            )

    def forward(
        self,
        x: Tensor,
        indices: Any = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> tuple[Any, ...]:
        """Quantizes x level by level, coarse to fine.

        Args:
            x: [B, dim, ...], or [B, ..., dim] with channel_first=False; one dimension
                of space, two with accept_image_fmap or three with accept_3d_fmap.
            mask: `[B, *space]` bool, False for padding, which counts in no mean; or
            lens: [B], how many tokens of each sequence are not padding.
            sample_codebook_temp: temperature of this step's draws, with stochastic_sample_codes.
            return_cutoff: also return the last level kept by nested dropout, None for all.

        Returns:
            quantized, like x, 0 for padding; a tuple of indices `[B, *level's shape]`, -1 where a
            cell holds padding alone; loss, a scalar.

        Raises:
            NotImplementedError: `indices` are given.
            ValueError: a shape that does not fit.
        """
        raise_unsupported("HierarchicalVQ", "codes are chosen here", indices=indices)
        channel = 1 if self.channel_first else -1
        check_features(x, (self.spatial_dims + 2,), self.dim, channel)
        x = x.movedim(channel, 1)
        mask = self._mask(x, mask, lens)
        residual, total = x, torch.zeros_like(x)
        totals, indices, losses = [], [], []
        for level, shape in enumerate(self.level_shapes):
            pooled, kept = self._pool(residual, shape, mask)
            quantized, index, loss = self._quantizer(level)(
                pooled.flatten(2).mT, mask=kept, sample_codebook_temp=sample_codebook_temp
            )
            upsampled = self._upsample(quantized.mT.unflatten(2, shape), x.shape[2:], level)
            total = total + upsampled
            residual = residual - upsampled
            totals.append(total)
            indices.append(index.unflatten(1, shape))
            losses.append(loss)
        cutoff = self._cutoff(x.device)
        last = self.num_levels - 1 if cutoff is None else cutoff
        total = totals[last] if mask is None else totals[last].where(mask, 0.0)
        out = (total.movedim(1, channel), tuple(indices))
        loss = torch.stack(losses[: last + 1]).mean()
        return (*out, loss, cutoff) if return_cutoff else (*out, loss)

    def get_output_from_indices(
        self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None
    ) -> Tensor:
        """The quantized output of indices `[B, *level's shape]` by level; -1 adds nothing.

        Args:
            full_shape: size of the result, the last level's by default.
        """
        if len(indices) != self.num_levels:
            raise ValueError(f"indices must hold {self.num_levels} levels, got {len(indices)}")
        size = self.level_shapes[-1] if full_shape is None else self._shape(full_shape)
        parts = []
        for level, index in enumerate(indices):
            codes = self._quantizer(level).get_codes_from_indices(index)
            parts.append(self._upsample(codes.movedim(-1, 1), size, level))
        total = reduce(torch.add, parts)
        return total if self.channel_first else total.movedim(1, -1)

    def _shape(self, scale: int | Sequence[int]) -> tuple[int, ...]:
        shape = (scale,) * self.spatial_dims if isinstance(scale, int) else tuple(scale)
        if len(shape) != self.spatial_dims:
            raise ValueError(
                f"a size must be {self.spatial_dims} numbers or one, got {shown(scale)}"
            )
        return shape

    def _mask(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """What is no padding of x [B, dim, *space], bool [B, 1, *space]."""
        if mask is not None and lens is not None:
            raise ValueError("mask and lens exclude each other, got both")
        if lens is not None:
            if self.spatial_dims != 1:
                raise ValueError(
                    f"lens is for sequences, got {self.spatial_dims} dimensions of space"
                )
            mask = lens_to_mask(lens, x.shape[2], x.device)
        if mask is None:
            return None
        space = (len(x), *x.shape[2:])
        if mask.shape != space or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(space)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        return mask.unsqueeze(1).to(x.device)

    def _pool(
        self, x: Tensor, shape: tuple[int, ...], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Means of x over a level's cells, without padding, and which cells [B, N] hold any."""
        pool = getattr(F, f"adaptive_avg_pool{self.spatial_dims}d")
        if mask is None:
            return pool(x, shape), None
        share = pool(mask.to(x.dtype), shape)
        return pool(x.where(mask, 0.0), shape) / share.clamp(min=1e-6), share.flatten(1) > 0

    def _quantizer(self, level: int) -> VectorQuantize:
        if self.vq is not None:
            return self.vq
        assert self.vqs is not None
        return cast(VectorQuantize, self.vqs[level])

    def _upsample(self, maps: Tensor, size: Sequence[int], level: int) -> Tensor:
        if tuple(maps.shape[2:]) != tuple(size):
            mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
            maps = F.interpolate(maps, tuple(size), mode=mode, align_corners=False)
        phi: nn.Module | None = self.phi_shared
        if phi is None:
            assert self.phi_levels is not None
            position = level / max(self.num_levels - 1, 1)
            phi = self.phi_levels[round(position * (len(self.phi_levels) - 1))]
        return phi(maps)

    def _cutoff(self, device: torch.device) -> int | None:
        """The last level kept in this step, the same on every process; None for all."""
        fewest = self.nested_dropout_min_levels
        if not self.training or self.nested_dropout == 0 or fewest >= self.num_levels:
            return None
        chance = random.Random(shared_seed(device))
        if chance.random() >= self.nested_dropout:
            return None
        return chance.randrange(fewest - 1, self.num_levels - 1)
