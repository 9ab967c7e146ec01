"""Stands in for vector-quantize-pytorch's `VectorQuantize`, version 1.32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.compat._codebook import Codebook, rotate, unit
from tokenflow_ext.compat._common import NEEDS_DISTANCES, OTHER_RULE, refuse

DRIFT = "the codebooks of the processes would drift apart"


class LossBreakdown(NamedTuple):
    """The parts of the loss, before their weights; two of them are not served and stay 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """vector-quantize-pytorch's `VectorQuantize` on the fused search; arguments are its own.

    Served: codebook_dim (with layernorm_after_project_in), heads over one codebook, EMA and
    learnable_codebook, freeze_codebook, k-means, use_cosine_sim, dead codes, the three layouts,
    commitment and orthogonal losses, the rotation trick and plain straight-through, masks.

    Raises:
        NotImplementedError: an option that is not served, named with its value.
        ValueError: options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        refuse(
            owner,
            NEEDS_DISTANCES,
            commitment_use_cross_entropy_loss=commitment_use_cross_entropy_loss,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            stochastic_sample_codes=stochastic_sample_codes,
            straight_through=straight_through,
        )
        refuse(
            owner,
            OTHER_RULE,
            directional_reparam=directional_reparam,
            vq_bridge=vq_bridge,
            manual_ema_update=manual_ema_update,
            in_place_codebook_optimizer=in_place_codebook_optimizer,
            manual_in_place_optimizer_update=manual_in_place_optimizer_update,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            sync_update_v=sync_update_v,
        )
        refuse(
            owner,
            "heads share one codebook",
            separate_codebook_per_head=separate_codebook_per_head,
        )
        for name, value in (("sync_kmeans", sync_kmeans), ("sync_codebook", sync_codebook)):
            if value is False:
                raise NotImplementedError(f"{owner} does not serve {name}=False: {DRIFT}")
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = bool(learnable_codebook)
        if learnable_codebook and (ema_update or use_cosine_sim):
            raise ValueError(
                "learnable_codebook=True excludes ema_update=True (the default) and "
                f"use_cosine_sim=True, got ema_update={ema_update}, use_cosine_sim={use_cosine_sim}"
            )
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other, got both")
        counts = {
            "dim": dim,
            "codebook_size": codebook_size,
            "heads": heads,
            "kmeans_iters": kmeans_iters,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.dim = dim
        self.heads = heads
        self.codebook_size = codebook_size
        self.commitment_weight = commitment_weight
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.freeze_codebook = freeze_codebook
        self.learnable_codebook = learnable_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            ema_update=ema_update,
            learnable=learnable_codebook or orthogonal_reg_weight > 0,
            use_cosine_sim=use_cosine_sim,
        )
        self.defers_average = False  # ResidualVQ averages a shared codebook once, after all layers

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """Codes [K, D]; may be assigned."""
        return self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes.unsqueeze(0))

    @property
    def _channels_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of indices in the layout of the input, heads side by side, not projected."""
        codes = F.embedding(indices, self.codebook)
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self._channels_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returned with these indices.

        Raises:
            NotImplementedError: a projection with channels first (there it has no defined result).
        """
        if self.has_projections and self._channels_first:
            raise NotImplementedError(
                "get_output_from_indices does not serve a projection (codebook_dim) with channels "
                "first: use project_out on get_codes_from_indices with the channels moved last"
            )
        return self.project_out(self.get_codes_from_indices(indices))

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x.

        Args:
            x: [B, N, dim], [B, dim], [B, dim, N] (channel_last=False), [B, dim, H, W] or
                [B, dim, D, H, W], by the constructor's layout.
            mask: [B, N] bool, False for padding; or
            lens: [B], how many tokens of each sequence are not padding.
            freeze_codebook: leave statistics and codes alone in this step.
            return_loss_breakdown: also return a `LossBreakdown`.

        Returns:
            quantized, like x; indices, x without channels (and by head, last, with several), -1
            for padding; loss, a scalar, 0 outside training.

        Raises:
            NotImplementedError: one of the other arguments is given.
            ValueError: a shape that does not fit.
        """
        refuse(
            "VectorQuantize.forward",
            NEEDS_DISTANCES,
            indices=indices,
            topk=topk,
            sample_codebook_temp=sample_codebook_temp,
        )
        refuse(
            "VectorQuantize.forward",
            OTHER_RULE,
            codebook_transform_fn=codebook_transform_fn,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
        moved = self._channels_first and x.dim() > 2
        inputs = x.movedim(1, -1) if moved else x
        self._check_shape(x, inputs)
        mask = self._mask(inputs, mask, lens)

        x = self.project_in(inputs)
        if self.heads > 1:
            x = x.unflatten(-1, (self.heads, -1))
        if self.use_cosine_sim:
            x = unit(x)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        codes, index = self._quantize(x, mask, freeze)
        quantized = codes.to(x.dtype)

        zero = torch.zeros((), device=x.device)
        commitment = orthogonal = zero
        if self.training:
            if self.commitment_weight > 0:
                target = quantized if self.learnable_codebook and not freeze else quantized.detach()
                if mask is None:
                    commitment = F.mse_loss(target, x)
                else:  # padded batches are compared before normalisation, as theirs are
                    rows = inputs if inputs.shape == x.shape else x
                    commitment = F.mse_loss(target[mask], rows[mask])
            if self.orthogonal_reg_weight > 0:
                orthogonal = self._orthogonal_loss(index)
            if x.requires_grad and self.route_gradients_to_input:
                if self.rotation_trick:
                    quantized = rotate(x, quantized)
                else:
                    quantized = x + (quantized - x).detach()
        loss = commitment * self.commitment_weight + orthogonal * self.orthogonal_reg_weight
        if self.training and not loss.requires_grad:
            loss.requires_grad_()  # backward() may be called on it whatever flows into it

        if self.heads > 1:
            quantized = quantized.flatten(-2)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else inputs
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        if moved:
            quantized = quantized.movedim(-1, 1)
        if not return_loss_breakdown:
            return quantized, index, loss
        return quantized, index, loss, LossBreakdown(commitment, zero, orthogonal, zero)

    def _check_shape(self, x: Tensor, inputs: Tensor) -> None:
        dims = (4,) if self.accept_image_fmap else (5,) if self.accept_3d_fmap else (2, 3)
        if x.dim() not in dims or inputs.shape[-1] != self.dim or x.numel() == 0:
            raise ValueError(
                f"x must have {' or '.join(map(str, dims))} dimensions, none of size 0, and "
                f"{self.dim} channels {'second' if inputs is not x else 'last'}, "
                f"got {tuple(x.shape)}"
            )

    def _mask(self, inputs: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("mask and lens exclude each other, got both")
        if self.accept_image_fmap or self.accept_3d_fmap or inputs.dim() != 3:
            raise ValueError(f"mask and lens are for sequences [B, N, C], got {inputs.dim()}-d x")
        if self.heads > 1:
            raise NotImplementedError(f"mask and lens are not served with heads={self.heads}")
        if lens is not None:
            mask = torch.arange(inputs.shape[1], device=inputs.device) < lens.unsqueeze(1)
        if mask.shape != inputs.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(inputs.shape[:2])}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        return mask

    def _quantize(self, x: Tensor, mask: Tensor | None, freeze: bool) -> tuple[Tensor, Tensor]:
        """Codes [..., D] float32 and indices [...] of x [..., D]; one step of the statistics."""
        book = self._codebook
        rows = x.detach().flatten(0, -2).float()
        kept = None if mask is None else mask.flatten()
        book.init_once(rows if kept is None else rows[kept])
        flat = book.search(rows)
        codes = F.embedding(flat, book.codes)
        if kept is not None:
            flat = torch.where(kept, flat, -1)
        if self.training and not freeze and (book.ema_update or book.threshold_ema_dead_code > 0):
            book.track(rows, flat)
            if not self.defers_average:
                if book.ema_update:
                    book.average()
                if book.threshold_ema_dead_code > 0:
                    book.expire(rows, kept)
        return codes.view(x.shape), flat.view(x.shape[:-1])

    def _orthogonal_loss(self, indices: Tensor) -> Tensor:
        """Mean squared cosine of two codes (arXiv 2112.00384, eq. 2), less that with itself.

        The sum over pairs of codes is the squared norm of their D x D Gram matrix.
        """
        codes = self.codebook
        if self.orthogonal_reg_active_codes_only:
            codes = codes[torch.unique(indices[indices >= 0])]
        if self.orthogonal_reg_max_codes and len(codes) > self.orthogonal_reg_max_codes:
            order = torch.randperm(len(codes), device=codes.device)
            codes = codes[order[: self.orthogonal_reg_max_codes]]
        codes = unit(codes)
        return (codes.T @ codes).square().sum() / len(codes) ** 2 - 1 / len(codes)
