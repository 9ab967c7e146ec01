"""What configurations have in common: errors, bounds, and their plain form for files."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any

from tokenflow_ext.errors import CheckpointError as CheckpointError
from tokenflow_ext.errors import ConfigError as ConfigError

from .files import shown

# Sizes far beyond any model's: a configuration with larger ones is no model, and building it would
# take all memory before anything could be said.
SIDE_LIMIT = 1 << 14  # pixels
WIDTH_LIMIT = 1 << 16  # channels
DEPTH_LIMIT = 1 << 10  # layers
CODES_LIMIT = 1 << 24
SCALES_LIMIT = 1 << 8
GRID_LIMIT = 1 << 10  # tokens a side


def need(condition: bool, message: str) -> None:
    """That a configuration is as it must be.

    Raises:
        ConfigError: with the message, where it is not.
    """
    if not condition:
        raise ConfigError(message)


def within(owner: str, low: float, high: float, **values: float) -> None:
    """That numbers of a configuration are within their bounds.

    Args:
        owner: what they are fields of, for the message.
        low, high: the bounds, included.
        values: by the field's name.

    Raises:
        ConfigError: naming the field.
    """
    for name, value in values.items():
        if low == 1:
            need(value > 0, f"{owner}.{name} must be positive, got {shown(value)}")
        # Of NaN every comparison is false.
        need(
            low <= value <= high,
            f"{owner}.{name} must be within [{low}, {high}], got {shown(value)}",
        )


def to_plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type, values: Any, path: str = "") -> Any:
    """Inverse of :func:`to_plain`; ``path`` is what comes before a field's name in messages.

    Raises:
        ConfigError: an unknown field or a value of the wrong type, named by its path.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'configuration'} must be a mapping, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [k for k in values if k not in names]
    if unknown:
        where = f"{path}." if path else ""
        name = shown(unknown[0])
        name = name[1:-1] if isinstance(unknown[0], str) else name
        raise ConfigError(f"unknown field {where}{name}; known here: {', '.join(sorted(names))}")
    made = {
        name: _convert(hints[name], value, f"{path}.{name}" if path else name)
        for name, value in values.items()
    }
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as error:  # a check of the dataclass's own
        message = str(error)
        if path:
            message = re.sub(rf"\b({'|'.join(names)})\b", rf"{path}.\1", message)
        raise ConfigError(message) from error


def _convert(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_plain(kind, value, path)
    options = typing.get_args(kind)
    if type(None) in options:
        if value is None:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # one value or several
        several = isinstance(value, (list, tuple))
        kind = next(o for o in options if (typing.get_origin(o) is tuple) == several)
        return _convert(kind, value, path)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, got {shown(value)}")
        return tuple(_convert(options[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    # bool is a subclass of int: ask for the exact type.
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{path} must be {kind.__name__}, got {shown(value)}")
    if kind is not float:
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{path} must be a finite number, got {shown(value)}")
    return number
