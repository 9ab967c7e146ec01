"""Saved models: a directory with a header ``config.json`` and weights ``model.safetensors``."""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenflow_ext._deprecated import renamed

from .config import CheckpointError, ConfigError
from .files import (
    OutputError,
    brief,
    cannot_write,
    check_regular,
    read_json,
    replacing,
    shown,
    utf8_name,
    write_file,
)

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
        """Writes the weights, then the header. Each file is complete before it takes its name, and
        takes the place of an earlier save's alone.

        Raises:
            OutputError: another kind of model is there, or the files cannot be written.
        """
        self._check_own(folder)
        write_safetensors(folder / WEIGHTS_FILE, state, {"format": self.name})
        header = {"format": self.name, "version": self.version, "config": config}
        text = json.dumps(header, indent=2) + "\n"
        write_file(folder / CONFIG_FILE, text.encode(), overwrite=True)

    def _check_own(self, folder: Path) -> None:
        """That nothing is in the folder which a save of this form would write over but such a save:
        whole, or its weights alone, where it was broken off."""
        header, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        try:
            if os.path.lexists(header):
                own = self._is_own(read_json(header, CheckpointError, limit=1 << 20))
            elif os.path.lexists(weights):
                own = read_safetensors(weights, names=())[1].get("format") == self.name
            else:
                own = True
        except CheckpointError:
            own = False
        if not own:
            raise OutputError(f"{folder} holds another model: nothing is written over it")

    def is_in(self, folder: Path) -> bool:
        """Whether the folder's header says that it is of this form.

        Raises:
            CheckpointError: a header that cannot be read.
        """
        file = folder / CONFIG_FILE
        if not file.is_file():
            return False
        return self._is_own(read_json(file, CheckpointError, limit=1 << 20))

    def _is_own(self, header: Any) -> bool:
        return isinstance(header, dict) and header.get("format") == self.name

    def read_config(self, folder: Path, parse: Callable[[Any], Config]) -> Config:
        """What ``parse`` makes of the header's ``config``.

        Raises:
            CheckpointError: a missing or foreign header, or one that ``parse`` refuses.
        """
        file = folder / CONFIG_FILE
        header = read_json(file, CheckpointError, limit=1 << 20)
        if not self._is_own(header):
            raise CheckpointError(f'{file} is {self.foreign}: no "format": "{self.name}"')
        if header.get("version") != self.version:
            raise CheckpointError(
                f"{file} has format version {shown(header.get('version'))}, this release reads "
                f"{self.version}" + (f": {self.changed}" if self.changed else "")
            )
        try:
            return parse(header.get("config"))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from error


def not_finite(values: Any, name: str = "") -> list[str]:
    """Names of the tensors and numbers in nested containers that hold a NaN or an infinity."""
    entries: Iterable[tuple[Any, Any]]
    if isinstance(values, dict):
        entries = values.items()
    elif isinstance(values, (list, tuple)):
        entries = enumerate(values)
    elif isinstance(values, Tensor):
        if not values.is_floating_point() or not values.numel():
            return []
        storage = values.untyped_storage()
        if values.nbytes > storage.nbytes():  # a file can say that one number is 2^40 of them
            values = values.new_empty(0).set_(storage)
        # The largest magnitude: one pass, and no tensor of the same size.
        return [] if torch.linalg.vector_norm(values, math.inf).isfinite() else [name]
    else:
        return [name] if isinstance(values, float) and not math.isfinite(values) else []
    return [n for key, value in entries for n in not_finite(value, f"{name}.{key}".lstrip("."))]


# -- files of tensors -----------------------------------------------------------------------------


def read_safetensors(
    file: Path, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Args:
        names: of the tensors to read; all by default.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    with _safetensors(file) as reader:
        wanted = list(reader.keys()) if names is None else names
        return {key: reader.get_tensor(key) for key in wanted}, reader.metadata() or {}


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, by name; no tensor is read.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    with _safetensors(file) as reader:
        keys = list(reader.keys())
        return {key: tuple(reader.get_slice(key).get_shape()) for key in keys}


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    from safetensors import safe_open

    check_regular(file, CheckpointError)
    try:
        with utf8_name(file) as name, safe_open(name, framework="pt") as reader:
            yield reader
    except Exception as error:  # the reader raises many kinds; each means the same to the user
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: {brief(error)}"
        ) from error


def write_safetensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes the tensors by :func:`.files.replacing`.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(file) as temporary:
        try:
            save_file(tensors, str(temporary), metadata=metadata)
        except SafetensorError as error:
            raise cannot_write(file, error) from error


def read_torch(
    file: Path,
    error: Callable[[str], Exception] = CheckpointError,
    *,
    device: str | torch.device = "cpu",
    mmap: bool = False,
    records: Iterable[type] = (),
) -> Any:
    """The content of a torch file: tensors and plain containers of them. Nothing in it is run.

    Args:
        mmap: tensors of files in torch's present format are mapped, not read.
        records: further classes that may be in the file.

    Raises:
        error: no regular file, one that is damaged, or one that holds other objects.
    """
    check_regular(file, error)
    try:
        with torch.serialization.safe_globals(list(records)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a strange protocol: the error says enough
            return torch.load(
                file,
                map_location=device,
                weights_only=True,
                mmap=mmap and zipfile.is_zipfile(file),
            )
    except Exception as fault:  # the reader raises many kinds; each means the same to the user
        raise error(f"{file} cannot be read as a torch file of tensors: {brief(fault)}") from fault


def write_torch(file: Path, content: Any, overwrite: bool = True) -> None:
    """Writes ``content`` as a torch file by :func:`.files.replacing`.

    Raises:
        OutputError: the file cannot be written, or is there and not to be written over.
    """
    with replacing(file, overwrite) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # around the system's error, where a write has failed
            raise cannot_write(file, error) from error


__getattr__ = renamed(
    __name__, {"read_weights": "tokenflow_ext.models.serialization.state_dict:read_weights"}
)
