"""Stands in for vector-quantize-pytorch's `VectorQuantize`, version 1.32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow_ext.collectives import all_reduce, world_size

from ._codebook import Codebook, Weight, differentiated, go_towards, rotate, unit
from ._common import NEEDS_DISTANCES, OTHER_RULE, lens_to_mask, projections, raise_unsupported


class LossBreakdown(NamedTuple):
    """The parts of the loss, before their weights; codebook_diversity, not supported, stays 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """vector-quantize-pytorch's `VectorQuantize` on the fused search; arguments are its own.

    Supported: codebook_dim (with layernorm_after_project_in), heads over one codebook, EMA and
    learnable_codebook, freeze_codebook, k-means, use_cosine_sim, dead codes, the three layouts,
    commitment and orthogonal losses, the rotation trick and plain straight-through, masks.

    Raises:
        NotImplementedError: an option that is not supported, named with its value.
        ValueError: options that exclude each other.
    """

    zero: Tensor

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
        in_place_codebook_optimizer: Callable[..., Any] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        self._raise_unsupported(
            NEEDS_DISTANCES,
            commitment_use_cross_entropy_loss=commitment_use_cross_entropy_loss
            and commitment_weight > 0,
            codebook_diversity_loss_weight=max(codebook_diversity_loss_weight, 0),
            straight_through=straight_through and not route_gradients_to_input,
        )
        self._raise_unsupported(
            OTHER_RULE,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
        )
        # What would make processes drift apart says so where there is more than one.
        self._unsynced = [
            name
            for name, value in (("sync_kmeans", sync_kmeans), ("sync_codebook", sync_codebook))
            if value is not None and not value
        ]
        self._check_processes()
        directional = directional_reparam
        ema_update = not directional if ema_update is None else ema_update
        learnable_codebook = directional if learnable_codebook is None else learnable_codebook
        rotation_trick = dim > 1 and not directional if rotation_trick is None else rotation_trick
        excluded = {
            "learnable_codebook=True and ema_update=True (the default)": learnable_codebook
            and ema_update,
            "learnable_codebook=True and use_cosine_sim=True": learnable_codebook
            and use_cosine_sim,
            "learnable_codebook=True and straight_through=True": learnable_codebook
            and straight_through,
            "straight_through=True and rotation_trick=True (the default)": straight_through
            and rotation_trick,
            "directional_reparam=True and rotation_trick=True": directional and rotation_trick,
            "directional_reparam=True and straight_through=True": directional and straight_through,
            "directional_reparam=True and threshold_ema_dead_code=0 (the default)": directional
            and threshold_ema_dead_code == 0,
            "accept_image_fmap=True and accept_3d_fmap=True": accept_image_fmap and accept_3d_fmap,
            "orthogonal_reg_active_codes_only=True and separate_codebook_per_head=True": (
                orthogonal_reg_weight > 0
                and orthogonal_reg_active_codes_only
                and separate_codebook_per_head
                and heads > 1
            ),
        }
        for options, both in excluded.items():
            if both:
                raise ValueError(f"{options} exclude each other, got both")
        if not 0 <= sync_update_v <= 1 or (sync_update_v > 0 and not learnable_codebook):
            raise ValueError(
                "sync_update_v must be in [0, 1], and 0 without learnable_codebook=True, "
                f"got {sync_update_v}"
            )
        learnable = learnable_codebook or orthogonal_reg_weight > 0
        if in_place_codebook_optimizer is not None and not learnable:
            raise ValueError("in_place_codebook_optimizer needs learnable_codebook=True, got False")
        counts = {
            "dim": dim,
            "codebook_size": codebook_size,
            "heads": heads,
        }
        if kmeans_init:
            counts["kmeans_iters"] = kmeans_iters
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.dim = dim
        self.heads = heads
        self.codebook_size = codebook_size
        self.commitment_weight = 0.0 if directional else commitment_weight
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional
        self.directional_reparam_variance = directional_reparam_variance
        self.separate_codebook_per_head = separate_codebook_per_head
        self.sync_update_v = sync_update_v
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.freeze_codebook = freeze_codebook
        self.learnable_codebook = learnable_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.has_projections = inner != dim
        self.project_in, self.project_out = projections(dim, inner)
        if self.has_projections and layernorm_after_project_in:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            learnable=learnable,
            use_cosine_sim=use_cosine_sim,
            stochastic=stochastic_sample_codes,
            sample_codebook_temp=sample_codebook_temp,
        )
        self.in_place_codebook_optimizer: torch.optim.Optimizer | None = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(
                self._codebook.parameters()
            )
        self.register_buffer("zero", torch.empty(()), persistent=False)
        self.reset_parameters()
        self.deferred = False  # ResidualVQ moves a shared codebook once, after all layers

    def reset_parameters(self) -> None:
        """The constant 0; the codebook and the projections reset themselves."""
        self.zero.zero_()

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def skipped_rows(self) -> Tensor:
        """Rows that the statistics left out so far because they were not finite, scalar int64."""
        return self._codebook.skipped_rows

    @property
    def codebook(self) -> Tensor:
        """Codes [K, D], or [H, K, D] with separate_codebook_per_head; may be assigned."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if codes.dim() == 3 else codes.unsqueeze(0))
        self._codebook.any_length = True

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of indices in the layout of the input, heads side by side, not projected; zeros
        where an index is -1."""
        return self._to_layout(self._decode(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returned with these indices; zeros where an index is -1."""
        output = self.project_out(self._decode(indices))
        padding = (indices == -1).any(dim=-1) if self.heads > 1 else indices == -1
        return self._to_layout(output.masked_fill(padding.unsqueeze(-1), 0.0))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """One step of the statistics with codes that were chosen elsewhere.

        Args:
            x: features, as `forward` takes them.
            indices: as `forward` returns them; -1 is left out.
            mask: as `forward` takes it.
        """
        inputs = self._from_layout(x)
        mask = self._mask(inputs, mask, None)
        rows = self._rows(self._heads(self.project_in(inputs))).float()
        index = self._rows(indices.unsqueeze(-1)).squeeze(-1)
        if mask is not None:
            index = torch.where(self._kept(mask), index, -1)
        self._codebook.update(rows, index, padded=True)

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """Moves dead codes to random rows of projected features x [B, N, heads * D]."""
        self._codebook.expire_codes_(self._rows(self._heads(x)).float())

    def update_in_place_optimizer(self) -> None:
        """A step of `in_place_codebook_optimizer`, on the mean gradient of all processes."""
        if self.in_place_codebook_optimizer is None:
            return
        for parameter in self._codebook.parameters():
            if parameter.grad is not None:
                all_reduce(parameter.grad).div_(world_size())
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

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
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantizes x.

        Args:
            x: [B, N, dim], [B, dim], [B, dim, N] (channel_last=False), [B, dim, H, W] or
                [B, dim, D, H, W], by the constructor's layout.
            mask: [B, N] bool, False for padding; or
            lens: [B], how many tokens of each sequence are not padding.
            sample_codebook_temp: temperature of this step's draw, with stochastic_sample_codes.
            freeze_codebook: leave statistics and codes alone in this step.
            return_loss_breakdown: also return a `LossBreakdown`.
            ema_update_weight: factor of each code's step, [K] or [H, K], or a function of the
                step's sums [H, K, D] and counts [H, K] that returns it.
            accum_ema_update: keep the step's sums for the next step.
            ema_update: whether this step averages the codes; as constructed by default.

        Returns:
            quantized, like x; indices, x without channels (and by head, last, with several), -1
            for padding; loss, a scalar, 0 outside training.

        Raises:
            NotImplementedError: one of the other arguments is given.
            ValueError: a shape that does not fit.
        """
        self._raise_unsupported(
            NEEDS_DISTANCES,
            indices=indices,
            topk=topk,
            codebook_transform_fn=codebook_transform_fn,
        )
        inputs = self._from_layout(x)
        mask = self._mask(inputs, mask, lens)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        book = self._codebook

        x = self._heads(self.project_in(inputs))
        rows = self._rows(x.detach()).float()
        kept = None if mask is None else self._kept(mask)
        updates = self.training and not freeze
        if self.training:
            self._check_processes()
        counted = book.init_embed_(rows, None if kept is None else kept.expand(rows.shape[:2]))
        index = book.search(rows, sample_codebook_temp)
        codes, in_place = book.lookup(index), self.zero
        if updates:
            if self.in_place_codebook_optimizer is not None:
                in_place = self._in_place_gradient(rows, index, kept)
            book.update(
                rows,
                index if kept is None else torch.where(kept, index, -1),
                ema_update=ema_update,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
                padded=kept is not None,
                deferred=self.deferred,
                counted=counted,
            )
            if self.in_place_codebook_optimizer is not None:
                if not self.manual_in_place_optimizer_update:
                    self.update_in_place_optimizer()
                index = book.search(rows, sample_codebook_temp)
                codes = book.lookup(index)
        quantized = self._unrows(codes, x.shape).to(inputs.dtype)
        index = self._unrows(index.unsqueeze(-1), (*x.shape[:-1], 1)).squeeze(-1)
        commitment = orthogonal = self.zero
        if self.training:
            if self.commitment_weight > 0:
                target = quantized if self.learnable_codebook and not freeze else quantized.detach()
                if mask is None:
                    commitment = F.mse_loss(target, x)
                else:  # padded batches are compared before normalisation, as theirs are
                    compared = inputs if inputs.shape == x.shape else x
                    commitment = F.mse_loss(target[mask], compared[mask])
            if self.orthogonal_reg_weight > 0:
                orthogonal = self._orthogonal_loss(index)
            if self.route_gradients_to_input and differentiated(x):
                if self.rotation_trick:
                    quantized = rotate(x, quantized)
                elif self.directional_reparam:
                    quantized = go_towards(x, quantized, self.directional_reparam_variance)
                else:
                    quantized = x + (quantized - x).detach()
            if self.sync_update_v > 0:
                quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        if mask is not None:
            index = index.masked_fill(~(mask.unsqueeze(-1) if self.heads > 1 else mask), -1)
        loss = commitment * self.commitment_weight + orthogonal * self.orthogonal_reg_weight
        if self.training and not loss.requires_grad and not torch.compiler.is_compiling():
            # backward() may be called on it whatever flows into it
            loss = loss + torch.zeros_like(loss, requires_grad=True)

        if self.heads > 1:
            quantized = quantized.flatten(-2)
        quantized = self.project_out(quantized)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else inputs
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        out = (self._to_layout(quantized), index, loss)
        breakdown = LossBreakdown(commitment, self.zero, orthogonal, in_place)
        return (*out, breakdown) if return_loss_breakdown else out

    def _raise_unsupported(self, reason: str, **options: Any) -> None:
        raise_unsupported(type(self).__name__, reason, **options)

    def _check_processes(self) -> None:
        if self._unsynced and world_size() > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not support {self._unsynced[0]}=False in "
                f"{world_size()} processes: their codebooks would drift apart"
            )

    # ------------------------------------------------------------------ layouts
    #
    # x as it is given -> [B, ..., dim] -> project_in -> [B, ..., D], heads before D where there
    # are several -> rows [H, N, D] of the H codebooks; and back.

    def _to_layout(self, x: Tensor) -> Tensor:
        first = self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
        return x.movedim(-1, 1) if first and x.dim() > 2 else x

    def _from_layout(self, x: Tensor) -> Tensor:
        first = self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
        dims = (4,) if self.accept_image_fmap else (5,) if self.accept_3d_fmap else (2, 3)
        inputs = x.movedim(1, -1) if first and x.dim() > 2 else x
        if x.dim() not in dims or inputs.shape[-1] != self.dim:
            raise ValueError(
                f"x must have {' or '.join(map(str, dims))} dimensions and {self.dim} channels "
                f"{'second' if first else 'last'}, got {tuple(x.shape)}"
            )
        return inputs

    def _heads(self, x: Tensor) -> Tensor:
        if self.heads > 1:
            x = x.unflatten(-1, (self.heads, -1))
        return unit(x) if self.use_cosine_sim else x

    @property
    def _apart(self) -> bool:
        return self._codebook.num_codebooks > 1

    def _rows(self, x: Tensor) -> Tensor:
        if self._apart:
            return x.movedim(-2, 0).flatten(1, -2)
        return x.flatten(0, -2).unsqueeze(0)

    def _unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Rows [H, N, C] of x of a shape [B, ..., D], as [B, ..., C]."""
        if self._apart:
            return rows.unflatten(1, shape[:-2]).movedim(0, -2)
        return rows.view(*shape[:-1], rows.shape[-1])

    def _kept(self, mask: Tensor) -> Tensor:
        """The mask [B, N] of a codebook's rows, [N]."""
        if self.heads > 1 and not self._apart:
            mask = mask.unsqueeze(-1).expand(-1, -1, self.heads)
        return mask.flatten()

    def _decode(self, indices: Tensor) -> Tensor:
        """Codes [..., heads * D] of indices [...], or [..., heads]."""
        if self.heads > 1 and indices.shape[-1] != self.heads:
            raise ValueError(
                f"indices must have {self.heads} heads last, got {tuple(indices.shape)}"
            )
        if self._apart:
            codes = self._codebook.decode(indices.movedim(-1, 0)).movedim(0, -2)
        else:
            codes = self._codebook.decode(indices.unsqueeze(0))[0]
        return codes.flatten(-2) if self.heads > 1 else codes

    def _mask(self, inputs: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is not None and lens is not None:
            raise ValueError("mask and lens exclude each other, got both")
        if mask is None and lens is None:
            return None
        if self.accept_image_fmap or self.accept_3d_fmap or inputs.dim() != 3:
            raise ValueError(f"mask and lens are for sequences [B, N, C], got {inputs.dim()}-d x")
        if lens is not None:
            mask = lens_to_mask(lens, inputs.shape[1], inputs.device)
        assert mask is not None
        if mask.shape != inputs.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(inputs.shape[:2])}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        return mask

    # ------------------------------------------------------------------ parts of a step

    def _in_place_gradient(self, rows: Tensor, index: Tensor, kept: Tensor | None) -> Tensor:
        """Mean squared distance of the finite rows to their codes, sent back to the codes."""
        used = rows.isfinite().all(dim=-1)
        if kept is not None:
            used = used & kept
        with torch.enable_grad():
            codes = self._codebook.lookup(index)
            error = torch.where(used.unsqueeze(-1), codes - rows, 0.0).square().sum()
            loss = error / (used.sum() * rows.shape[-1]).clamp(min=1)
            loss.backward()
        return loss.detach()

    def _orthogonal_loss(self, indices: Tensor) -> Tensor:
        """Mean squared cosine of two codes (arXiv 2112.00384, eq. 2), less that with itself.

        The sum over pairs of codes is the squared norm of their D x D Gram matrix.
        """
        codes = self._codebook.embed
        if self.orthogonal_reg_active_codes_only:
            codes = codes[:, torch.unique(indices)]
        if self.orthogonal_reg_max_codes and codes.shape[1] > self.orthogonal_reg_max_codes:
            order = torch.randperm(codes.shape[1], device=codes.device)
            codes = codes[:, order[: self.orthogonal_reg_max_codes]]
        # A copy: the next use of the codebook moves the codes that this graph holds.
        codes = unit(codes.clone())
        books, count = codes.shape[:2]
        return (codes.mT @ codes).square().sum() / (books * count**2) - 1 / count
