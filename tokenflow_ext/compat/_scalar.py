"""What the stand-ins for FSQ and LFQ share: layouts of inputs, and a rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layout:
    """How inputs [B, N, dim] and images [B, dim, ...] become rows, and back.

    Args:
        owner: the class, for messages.
        dim: channels of the input; those of the codebooks by default.
        codebook_dim: channels of a codebook.
        num_codebooks: codebooks side by side.
        keep: whether indices have a dimension for codebooks; where there are several, by default.
        channel_first: whether channels come after the batch; None: in images alone.

    Raises:
        ValueError: a number below 1, or several codebooks without their dimension.
    """

    def __init__(
        self,
        owner: str,
        dim: int | None,
        codebook_dim: int,
        num_codebooks: int,
        keep: bool | None,
        channel_first: bool | None,
    ) -> None:
        for name, value in (("num_codebooks", num_codebooks), ("dim", 1 if dim is None else dim)):
            if value < 1:
                raise ValueError(f"{name} of {owner} must be at least 1, got {value}")
        self.keep = num_codebooks > 1 if keep is None else keep
        if num_codebooks > 1 and not self.keep:
            raise ValueError(
                f"keep_num_codebooks_dim=False of {owner} is for one codebook, got {num_codebooks}"
            )
        self.dim = codebook_dim * num_codebooks if dim is None else dim
        self.channel_first = channel_first

    def is_image(self, x: Tensor) -> bool:
        """Whether the channels of x come after the batch."""
        return x.dim() >= 4 if self.channel_first is None else self.channel_first

    def rows(self, x: Tensor) -> Tensor:
        """x as [B, N, dim].

        Raises:
            ValueError: other channels, or fewer than 3 dimensions.
        """
        channel = 1 if self.is_image(x) else -1
        if x.dim() < 3 or x.shape[channel] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x must be floating-point with at least 3 dimensions and {self.dim} channels in "
                f"dimension {channel}, got {x.dtype} {tuple(x.shape)}"
            )
        return x.movedim(channel, -1).flatten(1, -2) if channel == 1 else x

    def restore(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows [B, N, dim] like x."""
        if not self.is_image(x):
            return rows
        return rows.unflatten(1, x.shape[2:]).movedim(-1, 1)

    def restore_indices(self, indices: Tensor | None, x: Tensor) -> Tensor | None:
        """Indices [B, N, codebooks] like x without its channels."""
        if indices is None:
            return None
        if self.is_image(x):
            indices = indices.unflatten(1, x.shape[2:])
        return indices if self.keep else indices.squeeze(-1)


def orthogonal(width: int) -> Tensor:
    """A random orthogonal matrix."""
    return nn.init.orthogonal_(torch.empty(width, width))
