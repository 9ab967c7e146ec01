"""What the stand-ins share: unsupported options, checks of input, projections, the dtype they
compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NEEDS_DISTANCES = "it needs the distance of every row to every code, which is never formed here"
OTHER_RULE = (
    "of the rules that move a codebook, EMA and the gradient (learnable_codebook=True) are "
    "supported"
)


def shown(value: Any) -> str:
    """A value in a message: numbers, words and short lists of them as they are, all else by
    kind."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return repr(value) if len(value) <= 16 else f"<{len(value)} numbers>"
    return f"<{getattr(value, '__qualname__', type(value).__name__)}>"


def raise_unsupported(owner: str, reason: str, **options: Any) -> None:
    """Raises NotImplementedError for the first option that is neither None, False, 0 nor empty."""
    for name, value in options.items():
        unset = value is None or (isinstance(value, (bool, int, float, dict)) and not value)
        if not unset:
            raise NotImplementedError(f"{owner} does not support {name}={shown(value)}: {reason}")


def check_features(x: Tensor, dims: tuple[int, ...], channels: int, channel: int) -> None:
    """Raises ValueError unless x has one of the numbers of dimensions and these channels."""
    if x.dim() not in dims or x.shape[channel] != channels:
        raise ValueError(
            f"x must have {' or '.join(map(str, dims))} dimensions and {channels} channels in "
            f"dimension {channel}, got {tuple(x.shape)}"
        )


def computable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the kernels compute in: float64 as it is, all else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def lens_to_mask(lens: Tensor, length: int, device: torch.device) -> Tensor:
    """[B, length] bool, True for the first `lens` [B] positions of each sequence."""
    return torch.arange(length, device=device) < torch.as_tensor(lens).to(device).unsqueeze(1)


def projections(dim: int, width: int, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """Linear layers from `dim` channels to `width` and back; none where the two are the same."""
    if dim == width:
        return nn.Identity(), nn.Identity()
    return nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias)
