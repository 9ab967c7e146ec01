"""Stands in for vector-quantize-pytorch's `HierarchicalVQ`, version 1.32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.compat._codebook import shared_seed
from tokenflow_ext.compat._common import refuse
from tokenflow_ext.compat.vector_quantize import VectorQuantize


class _Phi(nn.Module):
    """x + r (conv(x) - x): a convolution of width 3 mixed in by |resi_ratio| = r."""

    def __init__(self, dim: int, spatial_dims: int, resi_ratio: float) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](dim, dim, 3, padding=1)
        self.resi_ratio = float(abs(resi_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.resi_ratio <= 1e-8 else x.lerp(self.conv(x), self.resi_ratio)


class HierarchicalVQ(nn.Module):
    """vector-quantize-pytorch's `HierarchicalVQ` on the fused search; arguments are its own.

    A residual pyramid as VAR's, of sequences, images or volumes, that pools by adaptive averages
    and upsamples linearly; each level's convolution is between them, so levels are searched one by
    one. Masks are not served.

    Raises:
        NotImplementedError: an option that is not served, named with its value.
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
            raise ValueError(f"scales must be positive sides that do not shrink, got {scales}")
        self.dim = dim
        self.num_levels = len(self.level_shapes)
        one_size = isinstance(codebook_size, int)
        self.codebook_sizes = (
            (codebook_size,) * self.num_levels if one_size else tuple(codebook_size)
        )
        if len(self.codebook_sizes) != self.num_levels or (
            shared_codebook and len(set(self.codebook_sizes)) > 1
        ):
            raise ValueError(
                f"codebook_size must be one number, or {self.num_levels} with "
                f"shared_codebook=False, got {codebook_size}"
            )
        self.channel_first = channel_first
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        options = {
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
            return_cutoff: also return the last level kept by nested dropout, None for all.

        Returns:
            quantized, like x; a tuple of indices [B, *level's shape]; loss, a scalar.

        Raises:
            NotImplementedError: one of the other arguments is given.
            ValueError: a shape that does not fit.
        """
        refuse(
            "HierarchicalVQ.forward",
            "padding is not carried through the pyramid, nor are codes given",
            indices=indices,
            mask=mask,
            lens=lens,
            sample_codebook_temp=sample_codebook_temp,
        )
        channel = 1 if self.channel_first else -1
        if x.dim() != self.spatial_dims + 2 or x.shape[channel] != self.dim or x.numel() == 0:
            raise ValueError(
                f"x must have {self.spatial_dims + 2} dimensions, none of size 0, and {self.dim} "
                f"channels in dimension {channel}, got {tuple(x.shape)}"
            )
        x = x.movedim(channel, 1)
        pool = getattr(F, f"adaptive_avg_pool{self.spatial_dims}d")
        residual, total = x, torch.zeros_like(x)
        totals, indices, losses = [], [], []
        for level, shape in enumerate(self.level_shapes):
            rows = pool(residual, shape).flatten(2).mT
            quantized, index, loss = self._quantizer(level)(rows)
            upsampled = self._upsample(quantized.mT.unflatten(2, shape), x.shape[2:], level)
            total = total + upsampled
            residual = residual - upsampled
            totals.append(total)
            indices.append(index.unflatten(1, shape))
            losses.append(loss)
        cutoff = self._cutoff(x.device)
        kept = self.num_levels if cutoff is None else cutoff + 1
        out = (totals[kept - 1].movedim(1, channel), tuple(indices))
        loss = torch.stack(losses[:kept]).mean()
        return (*out, loss, cutoff) if return_cutoff else (*out, loss)

    def get_output_from_indices(
        self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None
    ) -> Tensor:
        """The quantized output of indices [B, *level's shape] by level; -1 adds nothing.

        Args:
            full_shape: size of the result, the last level's by default.
        """
        if len(indices) != self.num_levels:
            raise ValueError(f"indices must hold {self.num_levels} levels, got {len(indices)}")
        size = self.level_shapes[-1] if full_shape is None else self._shape(full_shape)
        total: Tensor | float = 0.0
        for level, index in enumerate(indices):
            codes = F.embedding(index.clamp(min=0), self._quantizer(level).codebook)
            codes = (codes * (index >= 0).unsqueeze(-1)).movedim(-1, 1)
            total = total + self._upsample(codes, size, level)
        return total if self.channel_first else total.movedim(1, -1)

    def _shape(self, scale: int | Sequence[int]) -> tuple[int, ...]:
        shape = (scale,) * self.spatial_dims if isinstance(scale, int) else tuple(scale)
        if len(shape) != self.spatial_dims:
            raise ValueError(f"a size must be {self.spatial_dims} numbers or one, got {scale}")
        return shape

    def _quantizer(self, level: int) -> VectorQuantize:
        return self.vqs[level] if self.vq is None else self.vq

    def _upsample(self, maps: Tensor, size: Sequence[int], level: int) -> Tensor:
        if tuple(maps.shape[2:]) != tuple(size):
            mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
            maps = F.interpolate(maps, tuple(size), mode=mode, align_corners=False)
        phi = self.phi_shared
        if phi is None:
            place = level / max(self.num_levels - 1, 1)
            phi = self.phi_levels[round(place * (len(self.phi_levels) - 1))]
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
