"""What the stand-ins for FSQ and LFQ share: layouts of inputs, and the dtype they compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Layout:
    """How inputs [B, N, dim] and images [B, dim, ...] become rows, and back.

    With channel_first an input may also be [B, dim].

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
            ValueError: other channels, or too few dimensions.
        """
        channel, least = (1 if self.is_image(x) else -1), (2 if self.channel_first else 3)
        if x.dim() < least or x.shape[channel] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x must be floating-point with at least {least} dimensions and {self.dim} "
                f"channels in dimension {channel}, got {x.dtype} {tuple(x.shape)}"
            )
        if x.dim() == 2:
            return x.unsqueeze(1)
        x = x.movedim(1, -1) if channel == 1 else x
        return x.flatten(1, -2) if x.dim() > 3 else x

    def restore(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows [B, N, dim] like x."""
        image = self.is_image(x)
        space = self._space(x, image)
        if rows.shape[:-1] != space:
            rows = rows.reshape(*space, rows.shape[-1])
        return rows.movedim(-1, 1) if image else rows

    def restore_indices(self, indices: Tensor | None, x: Tensor) -> Tensor | None:
        """Indices [B, N, codebooks] like x without its channels."""
        if indices is None:
            return None
        space = self._space(x, self.is_image(x))
        return indices.reshape(*space, *indices.shape[2:]) if self.keep else indices.reshape(space)

    @staticmethod
    def _space(x: Tensor, image: bool) -> tuple[int, ...]:
        """The shape of x without its channels."""
        return (x.shape[0], *x.shape[2:]) if image else tuple(x.shape[:-1])


def computed(
    owner: str, rows: Tensor, force: bool, allowed: tuple[torch.dtype, ...] = (torch.float32,)
) -> Tensor:
    """Rows in the dtype that they are quantized in: float32 where forced, but for dtypes allowed.

    Raises:
        NotImplementedError: that is half precision.
    """
    if force and rows.dtype not in allowed:
        return rows.float()
    if rows.dtype not in (torch.float32, torch.float64):
        name, value = "force_quantization_f32", f"{force}"
        if force:
            name, value = "allowed_dtypes", str(allowed)
        raise NotImplementedError(
            f"{owner} does not support {name}={value} for {rows.dtype}: it quantizes in float32 "
            "and float64"
        )
    return rows


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of a tensor."""
    device = "cpu" if tensor.is_meta else tensor.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # far quicker
    return torch.autocast(device, enabled=False)
