"""What `ResidualVQ` and `ResidualSimVQ` share: their layers in turn, dropped layers, decoding."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._codebook import shared_seed


class Residual(nn.Module):
    """Layers that each quantize what the layers before left (arXiv 2107.03312, algorithm 1).

    A subclass makes `layers` and says how one is decoded. A layer returns codes like its input,
    their indices and a loss.

    Attributes:
        quant_grad_frac: share of a layer's gradient that goes to the layers before it.
        codes_channel_first: whether decoded codes have the channels after the batch.

    Raises:
        ValueError: quantize_dropout_cutoff_index is not the number of a layer, or
            quantize_dropout_multiple_of is below 1.
    """

    layers: nn.ModuleList
    quant_grad_frac = 0.0
    codes_channel_first = False

    def __init__(
        self,
        num_quantizers: int,
        quantize_dropout: bool,
        quantize_dropout_cutoff_index: int,
        quantize_dropout_multiple_of: int,
    ) -> None:
        super().__init__()
        if quantize_dropout and not 0 <= quantize_dropout_cutoff_index < num_quantizers:
            raise ValueError(
                f"quantize_dropout_cutoff_index must be 0 to {num_quantizers - 1}, "
                f"got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout and quantize_dropout_multiple_of < 1:
            raise ValueError(
                "quantize_dropout_multiple_of must be at least 1, "
                f"got {quantize_dropout_multiple_of}"
            )
        self.num_quantizers = num_quantizers
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of each layer, zeros where an index is -1.

        With quantize_dropout fewer than Q indices may be given. The rest count as -1.

        Args:
            indices: [..., Q] int64.

        Returns:
            [Q, ..., D], for `ResidualSimVQ` with channel_first [Q, B, D, ...].

        Raises:
            ValueError: the last dimension of indices is not Q.
        """
        given = indices.shape[-1]
        if given > self.num_quantizers or (
            given < self.num_quantizers and not self.quantize_dropout
        ):
            raise ValueError(
                f"indices must have {self.num_quantizers} in the last dimension (fewer only with "
                f"quantize_dropout), got {tuple(indices.shape)}"
            )
        by_layer = zip(self.layers, self._with_dropped(indices).unbind(-1), strict=True)
        codes = torch.stack([self._decode(layer, index) for layer, index in by_layer])
        return codes.movedim(-1, 2) if self.codes_channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum over layers of the codes of indices [..., Q], in the layout of one layer's."""
        return self.get_codes_from_indices(indices).sum(dim=0)

    def _decode(self, layer: nn.Module, index: Tensor) -> Tensor:
        """A layer's codes [..., D] of its indices [...], zeros where one is -1."""
        raise NotImplementedError

    def _with_dropped(self, indices: Tensor) -> Tensor:
        """Indices [..., Q] of the indices [..., at most Q] of the first layers."""
        return F.pad(indices, (0, self.num_quantizers - indices.shape[-1]), value=-1)

    def _last_layer(self, device: torch.device, seed: int | None) -> int:
        """The last layer that takes part, the same on every process."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers - 1
        chance = random.Random(shared_seed(device) if seed is None else seed)
        last = chance.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers) - 1

    def _layers(
        self,
        x: Tensor,
        last: int,
        options: dict[str, Any] | None = None,
        rows: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layers 0 to `last`, one after the other, on x as they take it.

        Args:
            options: arguments of every layer.
            rows: takes the input of each layer, where given.

        Returns:
            quantized, like x, indices [..., Q], -1 for the layers after `last`, and losses [Q].
        """
        residual, quantized = x, torch.zeros_like(x)
        indices: list[Tensor] = []
        losses: list[Tensor] = []
        for _, layer in zip(range(last + 1), self.layers, strict=False):
            if rows is not None:
                rows.append(residual.detach())
            codes, index, loss = layer(residual, **(options or {}))
            quantized = quantized + codes
            indices.append(index)
            losses.append(loss)
            passed = self.quant_grad_frac
            explained = codes.detach()
            if passed > 0:
                explained = passed * codes + (1 - passed) * explained
            residual = residual - explained
        dropped = self.num_quantizers - len(losses)
        return (
            quantized,
            self._with_dropped(torch.stack(indices, dim=-1)),
            F.pad(torch.stack(losses), (0, dropped)),
        )
