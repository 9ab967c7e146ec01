"""The type of a model's arithmetic, as ``--dtype`` names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.understanding.names import DTYPES


def find_dtype(asked: str) -> torch.dtype:
    """The type that an option asks for.

    Args:
        asked: one of ``DTYPES``.

    Raises:
        ConfigError: another word.
    """
    if asked not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(asked)}")
    found = getattr(torch, asked)
    assert isinstance(found, torch.dtype)
    return found


@contextmanager
def arithmetic(device: torch.device, dtype: str) -> Iterator[None]:
    """In the block, networks with weights in float32 compute in ``dtype`` (torch's autocast). The
    tokenizer's search for codes is in float32 all the same.

    Raises:
        ConfigError: see :func:`find_dtype`.
    """
    kind = find_dtype(dtype)
    half = kind != torch.float32
    with torch.autocast(device.type, kind if half else None, enabled=half):
        yield
