"""Arguments of samplers, checked and as the operators take them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_INTEGERS: tuple[torch.dtype, ...] = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_FLOATS: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def integer(value: Any, name: str) -> int:
    """A Python, NumPy or symbolic integer."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name} must be an integer, got {value!r} of {type(value).__name__}")


def bits(value: Any, name: str) -> int:
    """The lowest 64 bits of an integer, signed: seeds and offsets are taken modulo 2^64."""
    return (integer(value, name) + 2**63) % 2**64 - 2**63


def count(value: Any, name: str) -> int:
    value = integer(value, name)
    if value >= 2**31:
        raise ValueError(f"{name} must be at most 2**31 - 1, got {value}")
    return max(value, 0)


def number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r} of {type(value).__name__}")
    return float(value)


def row_argument(
    value: Any,
    name: str,
    convert: Callable[[Any, str], Any],
    shape: torch.Size,
    device: torch.device,
    of: str = "logits",
) -> tuple[Any, Tensor | None]:
    """An argument as the operator takes it: a number, or a tensor of one or of one a row."""
    if not isinstance(value, Tensor):
        return convert(value, name), None
    default: float = 0.0
    dtype = torch.float64
    kinds: tuple[torch.dtype, ...] = (*_FLOATS, *_INTEGERS)
    if convert is not number:
        default, dtype, kinds = 0, torch.int64, _INTEGERS
    if value.dtype not in kinds:
        what = "numbers" if convert is number else "integers"
        raise ValueError(f"{name} must hold {what}, got {value.dtype}")
    # As everywhere in torch, a single number may lie on the CPU.
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {value.device}")
    value = value.detach().to(device=device, dtype=dtype)
    if value.dim() == 0:
        return default, value
    try:
        return default, value.expand(shape).reshape(-1).contiguous()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be one number or one for each row of {of} {list(shape)}, "
            f"got shape {list(value.shape)}"
        ) from error


def check_source(seed: Any, generator: Any) -> None:
    """One source of random numbers."""
    if generator is None:
        return
    if seed is not None:
        raise ValueError("seed and generator exclude each other: a generator draws the seed")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; a number drawn "
            "from another is a seed"
        )


def vocab_slice(vocab: Any, codes: int) -> tuple[int, int]:
    try:
        start, stop = (integer(bound, "vocab") for bound in vocab)
        if 0 <= start < stop <= codes:
            return start, stop
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"vocab must be a slice (start, stop) of {codes} codes that is not empty, got {vocab}"
    )
