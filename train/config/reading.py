"""How a configuration is read: YAML files and dotted command-line overrides."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenflow_ext.models.serialization.config import ConfigError, from_plain, to_plain
from tokenflow_ext.models.serialization.files import brief, read_text, shown
from tokenflow_ext.models.tokenizer.config import TokenizerConfig

from .checks import leaves
from .decoder import DecoderConfig
from .text_to_image import TextConfig
from .tokenizer import TrainConfig
from .understanding import UnderstandingConfig
from .unified import UnifiedConfig
from .var import VarTrainConfig


class _Loader(yaml.SafeLoader):
    """YAML whose floats are those of YAML 1.2: ``1e-4`` is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


_FILE_LIMIT = 1 << 20  # bytes
_NODE_LIMIT = 100_000


def _read_yaml(text: str, what: str) -> Any:
    """YAML as plain values.

    Raises:
        ConfigError: no YAML, or aliases that stand for more than a configuration can hold.
    """
    try:
        loader = _Loader(text)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if not _nodes(node, {}) <= _NODE_LIMIT:
                raise ConfigError(
                    f"{what} stands for more than {_NODE_LIMIT} values by its aliases"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date without a 13th month, ...
        raise ConfigError(f"{what} is not YAML: {brief(error)}") from error


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there would be if each alias were written out; infinite for one in itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = math.inf
    count = 1.0
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                count += _nodes(part, known)
    known[id(node)] = count
    return count


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["optim.lr=1e-4", "--seed", "3", "--data.flip=no"]`` as a nested mapping.

    Raises:
        ConfigError: an argument that is neither ``key=value`` nor ``--key value``.
    """
    nested: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"expected key=value or --key value, got {shown(word)}")
            text = rest.pop(0)
        *sections, name = key.split(".")
        if len(sections) > 16:
            raise ConfigError(f"unknown field {shown(key)}")
        # YAML knows no bytes that are not UTF-8; a file may have them in its name.
        plain = any("\udc80" <= character <= "\udcff" for character in text)
        value: Any = {name: text if plain else _read_yaml(text, key)}
        for section in reversed(sections):
            value = {section: value}
        nested = _overlay(nested, value)
    return nested


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = _overlay(result[key], value)
        result[key] = value
    return result


Config = TypeVar(
    "Config",
    TrainConfig,
    DecoderConfig,
    TextConfig,
    UnderstandingConfig,
    UnifiedConfig,
    VarTrainConfig,
)


def _load(kind: type[Config], path: str | Path | None, overrides: list[str] | None) -> Config:
    """The configuration of an optional file and overrides, over the defaults and the preset."""
    given: Any = {}
    if path is not None:
        text = read_text(Path(path), ConfigError, _FILE_LIMIT)
        given = _read_yaml(text, str(path))
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise ConfigError(f"{path} must hold a mapping, got {type(given).__name__}")
    given = _overlay(given, parse_overrides(overrides or []))
    try:
        below = to_plain(kind())
        if kind is TrainConfig:
            below["model"] = to_plain(TokenizerConfig.preset(given.get("preset", "tiny")))
        return from_plain(kind, _overlay(below, given))
    except ConfigError as error:
        if path is None:
            raise
        more = " and the command line" if overrides else ""
        raise ConfigError(f"{path}{more}: {error}") from error


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a tokenizer's run from an optional YAML file and overrides.

    Raises:
        ConfigError: unknown keys, wrong types, numbers out of their range, or a file that is not a
            YAML mapping.
    """
    return _load(TrainConfig, path, overrides)


def load_decoder_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> DecoderConfig:
    """The configuration of a pixel decoder's fine-tuning; as :func:`load_config`."""
    return _load(DecoderConfig, path, overrides)


def load_text_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> TextConfig:
    """The configuration of a text-to-image run; as :func:`load_config`."""
    return _load(TextConfig, path, overrides)


def load_understanding_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> UnderstandingConfig:
    """The configuration of an understanding model's run; as :func:`load_config`."""
    return _load(UnderstandingConfig, path, overrides)


def load_unified_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> UnifiedConfig:
    """The configuration of a run both ways; as :func:`load_config`."""
    return _load(UnifiedConfig, path, overrides)


def load_var_config(
    path: str | Path | None = None, overrides: list[str] | None = None
) -> VarTrainConfig:
    """The configuration of a VAR transformer's run; as :func:`load_config`."""
    return _load(VarTrainConfig, path, overrides)


def from_yaml(text: str, what: str) -> dict[str, Any]:
    """What :func:`to_yaml` wrote, as dotted keys and plain values.

    Args:
        what: what messages call it.

    Raises:
        ConfigError: no YAML mapping.
    """
    values = _read_yaml(text, what)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{what} must hold a mapping")
    return leaves(values)


def to_yaml(
    config: TrainConfig | DecoderConfig | TextConfig | UnderstandingConfig | VarTrainConfig,
) -> str:
    """The configuration as YAML that the functions above read back as it was."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=100)
