"""What the stand-ins share: refusing options, and the dtype they compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEEDS_DISTANCES = "it needs the distance of every row to every code, which is never formed here"
OTHER_RULE = (
    "of the rules that move a codebook, EMA and the gradient (learnable_codebook=True) are served"
)


def refuse(owner: str, reason: str, **options: Any) -> None:
    """Raises NotImplementedError for the first option that is neither None, False, 0 nor empty."""
    for name, value in options.items():
        unset = value is None or (isinstance(value, (bool, int, float, dict)) and not value)
        if not unset:
            raise NotImplementedError(f"{owner} does not serve {name}={value!r}: {reason}")


def computable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the kernels compute in: float64 as it is, all else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
