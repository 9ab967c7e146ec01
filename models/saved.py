"""Saved models: a directory with a header ``config.json`` and weights ``model.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tokenflow_ext.models.config import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
Config = TypeVar("Config")


@dataclass(frozen=True)
class SavedForm:
    """One kind of model in such a directory.

    Attributes:
        name: the header's ``format``.
        version: the header's ``version`` that is written, and the only one read.
        foreign: what to call another file: it "is ``foreign``".
        changed: what this version changed, told to whoever has an earlier one.
    """

    name: str
    version: int
    foreign: str
    changed: str = ""

    def write(self, folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Writes the weights, then the header. Each file is complete before it takes its name."""
        from safetensors.torch import save_file

        partial = folder / (WEIGHTS_FILE + ".partial")
        save_file(state, str(partial), metadata={"format": self.name})
        os.replace(partial, folder / WEIGHTS_FILE)
        header = {"format": self.name, "version": self.version, "config": config}
        partial = folder / (CONFIG_FILE + ".partial")
        partial.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG_FILE)

    def read_config(self, folder: Path, parse: Callable[[Any], Config]) -> Config:
        """What ``parse`` makes of the header's ``config``.

        Raises:
            CheckpointError: a missing or foreign header, or one that ``parse`` refuses.
        """
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        try:
            header = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if not isinstance(header, dict) or header.get("format") != self.name:
            raise CheckpointError(f'{file} is {self.foreign}: no "format": "{self.name}"')
        if header.get("version") != self.version:
            raise CheckpointError(
                f"{file} has format version {header.get('version')!r}, this release reads "
                f"{self.version}" + (f": {self.changed}" if self.changed else "")
            )
        try:
            return parse(header.get("config"))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from error


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights, and the metadata of their file.

    Raises:
        CheckpointError: a missing or truncated file.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    return read_safetensors(file)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as reader:
            weights = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            return weights, reader.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}") from error
