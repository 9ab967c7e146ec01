"""Stands in for vector-quantize-pytorch's `SimVQ` and `ResidualSimVQ`, version 1.32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._codebook import nearest, rotate, zeros_for_padding
from ._common import computable, raise_unsupported
from ._residual import Residual


def _as_drawn(codebook: Tensor) -> Tensor:
    return codebook


class SimVQ(nn.Module):
    """vector-quantize-pytorch's `SimVQ` (arXiv 2411.02038) on the fused search.

    The codes are frozen. A transform of them, the same for all, is what is searched and learned,
    so that every code moves in every step.

    Args:
        dim: channels D of the input.
        codebook_size: number K of codes.
        codebook_transform: module from frozen codes [K, frozen_codebook_dim] to codes [K, D], by
            default a linear map without bias.
        init_fn: from the frozen codes, drawn from a normal distribution, to those used instead.
        channel_first: the input is [B, D, ...], otherwise [B, ..., D].
        rotation_trick: gradient to the input by the rotation to its code, otherwise
            straight-through.
        input_to_quantize_commit_loss_weight: weight of the loss that moves the input to its code.
        commitment_weight: weight of the whole loss.
        frozen_codebook_dim: channels of the frozen codes, dim by default.

    Raises:
        ValueError: a number below 1, or an `init_fn` that returns another shape.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _as_drawn,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        counts = {"dim": dim, "codebook_size": codebook_size, "frozen_codebook_dim": width}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        self._init_fn = init_fn
        self.register_buffer("frozen_codebook", torch.empty(codebook_size, width))
        self.reset_parameters()
        if codebook_transform is None:
            codebook_transform = nn.Linear(width, dim, bias=False)
        self.code_transform = codebook_transform

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Frozen codes anew. The transform resets itself."""
        shape = self.frozen_codebook.shape
        codes = self._init_fn(torch.randn_like(self.frozen_codebook) * shape[1] ** -0.5)
        if not isinstance(codes, Tensor) or codes.shape != shape:
            found = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"init_fn must return a tensor of shape {tuple(shape)}, got {found}")
        self.frozen_codebook.copy_(codes)

    @property
    def codebook(self) -> Tensor:
        """The codes that are searched, [K, D]: the frozen ones, transformed."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes of indices [B, ...] in the layout of the input, zeros where an index is -1."""
        codes = zeros_for_padding(
            lambda index: self.code_transform(F.embedding(index, self.frozen_codebook)), indices
        )
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x.

        Args:
            x: [B, ..., D], or [B, D, ...] with channel_first.

        Returns:
            quantized, like x, indices, x without channels, int64, and the loss, a scalar.

        Raises:
            ValueError: x has other channels than the codes or no floating-point numbers, or the
                transform returns other than K codes.
        """
        codebook, channel = self.codebook, 1 if self.channel_first else -1
        if codebook.dim() != 2 or len(codebook) != self.codebook_size:
            raise ValueError(
                f"codebook_transform must return {self.codebook_size} codes [K, D], "
                f"got {tuple(codebook.shape)}"
            )
        channels = codebook.shape[1]
        if x.dim() < 2 or x.shape[channel] != channels or not x.is_floating_point():
            raise ValueError(
                f"x must be floating-point with at least 2 dimensions and {channels} channels in "
                f"dimension {channel}, got {x.dtype} {tuple(x.shape)}"
            )
        dtype = torch.promote_types(computable(x).dtype, codebook.dtype)
        codebook, rows = codebook.to(dtype), x.movedim(channel, -1).to(dtype)
        index = nearest(rows.detach().flatten(0, -2), codebook.detach()).view(rows.shape[:-1])
        codes = F.embedding(index, codebook)
        loss = F.mse_loss(codes, rows.detach())
        loss = loss + self.input_to_quantize_commit_loss_weight * F.mse_loss(rows, codes.detach())
        quantized = rotate(rows, codes) if self.rotation_trick else rows + (codes - rows).detach()
        return quantized.to(x.dtype).movedim(-1, channel), index, loss * self.commitment_weight


class ResidualSimVQ(Residual):
    """vector-quantize-pytorch's `ResidualSimVQ` on the fused search: a `SimVQ` a layer.

    Each layer quantizes what the layers before left (arXiv 2107.03312, algorithm 1).

    Args:
        dim: channels D of the input.
        num_quantizers: number Q of layers.
        codebook_size: number K of codes of each layer.
        heads: 1, no other number is supported.
        quantize_dropout: in training, leave out all layers after one that is drawn.
        quantize_dropout_cutoff_index: the first layer that may be drawn.
        quantize_dropout_multiple_of: keep a multiple of this many layers.
        channel_first: the input is [B, D, ...], otherwise [B, ..., D].
        rotation_trick: as in `SimVQ`.
        sim_vq_kwargs: further arguments of `SimVQ`. A `codebook_transform` is shared by all layers.

    Raises:
        NotImplementedError: several heads.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        raise_unsupported("ResidualSimVQ", "one head", heads=heads if heads != 1 else None)
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
        super().__init__(
            num_quantizers,
            quantize_dropout,
            quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of,
        )
        self.channel_first = channel_first
        self.codes_channel_first = channel_first
        self.layers = nn.ModuleList(
            SimVQ(
                dim,
                codebook_size,
                channel_first=channel_first,
                rotation_trick=rotation_trick,
                **sim_vq_kwargs,
            )
            for _ in range(num_quantizers)
        )

    def _quantizers(self) -> list[SimVQ]:
        return cast(list[SimVQ], list(self.layers))

    @property
    def codebook_size(self) -> int:
        return self._quantizers()[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        return self._quantizers()[0].codebook.shape[-1]

    @property
    def codebooks(self) -> Tensor:
        """The codes that each layer searches, [Q, K, D]."""
        return torch.stack([layer.codebook for layer in self._quantizers()])

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x, layer by layer what the layers before left.

        Args:
            x: [B, ..., D], or [B, D, ...] with channel_first.
            return_all_codes: also return the codes of each layer, `[Q, *x.shape]`.
            rand_quantize_dropout_fixed_seed: decides which layers are dropped.

        Returns:
            quantized, like x, indices, x without channels and with Q last, -1 for dropped layers,
            and losses [Q].

        Raises:
            ValueError: x has other channels than the codes.
        """
        out = self._layers(x, self._last_layer(x.device, rand_quantize_dropout_fixed_seed))
        return (*out, self.get_codes_from_indices(out[1])) if return_all_codes else out

    def _decode(self, layer: nn.Module, index: Tensor) -> Tensor:
        codebook = cast(SimVQ, layer).codebook
        return zeros_for_padding(partial(F.embedding, weight=codebook), index)
