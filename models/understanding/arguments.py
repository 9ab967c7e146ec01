"""What transformers hands to a part of a model, or to its configuration, besides its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from tokenflow_ext.models.serialization.config import need
from tokenflow_ext.models.serialization.files import shown


def without(options: dict[str, Any], whose: str, **expected: Any) -> dict[str, Any]:
    """Options without the values that a saved configuration repeats.

    Raises:
        ConfigError: another value than is expected; saying whose that is.
    """
    left = dict(options)
    for name, value in expected.items():
        found = left.pop(name, value)
        need(found == value, f"{name} must be {value}, {whose}, got {shown(found)}")
    return left


def check_options(options: Mapping[str, Any]) -> None:
    """That arguments of a part are those that LLaVA hands on to all of its parts.

    Raises:
        TypeError: naming the first that is not.
    """
    if unknown := sorted(options.keys() - _of_other_parts()):
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")


@functools.cache
def _of_other_parts() -> frozenset[str]:
    """Arguments of a language model that transformers' LLaVA passes to its vision model too."""
    from transformers.utils import TransformersKwargs  # type: ignore[attr-defined]

    return frozenset(TransformersKwargs.__annotations__) | {"cache_position", "use_cache"}
