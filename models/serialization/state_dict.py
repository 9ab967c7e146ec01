"""State dicts: one reader of whatever holds one, and one comparison with what a module has.

An adapter says how an original layout differs from ours: ``original_checkpoint`` in the folder of a
model, and ``towers/teachers.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import CheckpointError
from .files import inside, read_json
from .pretrained import read_safetensors, read_torch

CONTAINERS = ("ema", "model", "state_dict")
"""Under what name a torch file may have its state dict. The first that it has is read."""

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""The weights in a folder of transformers; with ``.index.json`` where there are several files."""

_LISTED = 8  # names that a message spells out, and sentences
_SAID = 3

Shape = tuple[int, ...]


def read_state_dict(
    path: str | Path, error: Callable[[str], Exception] = CheckpointError
) -> dict[str, Tensor]:
    """Every tensor of a state dict, without the ``module.`` of DistributedDataParallel.

    Tensors of torch files in the present format are mapped, not read: copy them before the file
    goes. Nothing in a file is run.

    Args:
        path: a safetensors file, a torch file with the state dict by itself or under one of
            ``CONTAINERS``, or a folder of transformers with either, in one file or several.
        error: makes the exception of a message.

    Raises:
        error: nothing there, a file that cannot be read or holds no state dict, or an index that
            does not agree with its files.
    """
    files, file_of = _files(Path(path), error)
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            try:
                part = read_safetensors(file)[0]
            except CheckpointError as fault:
                raise error(str(fault)) from fault
        else:
            # Training scripts store their argparse.Namespace beside the weights: a plain record.
            content = read_torch(file, error, mmap=True, records=[argparse.Namespace])
            part = _state_dict_in(content, file, error)
        if file_of and (stranger := next((k for k in part if file_of.get(k) != file), None)):
            raise error(f"the index of {path} does not say that {file.name} has {stranger}")
        state |= part
    if missing := [key for key in file_of if key not in state]:
        file = file_of[missing[0]]
        raise error(f"the index of {path} says that {file.name} has {missing[0]}, which it has not")
    return state


def _files(path: Path, error: Callable[[str], Exception]) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and by an index, where there is one, which of them has each name."""
    if not path.is_dir():
        return [path], {}
    for name in FOLDER_FILES:
        if (index := path / f"{name}.index.json").is_file():
            content = read_json(index, error)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict):
                raise error(f"{index} is no index: it must have a weight_map")
            files = {each: inside(path, each, index, error) for each in names.values()}
            return sorted(files.values()), {key: files[each] for key, each in names.items()}
        if (path / name).is_file():
            return [path / name], {}
    raise error(f"{path} holds neither {' nor '.join(FOLDER_FILES)}, nor an index of either")


def _state_dict_in(
    content: Any, path: Path, error: Callable[[str], Exception]
) -> dict[str, Tensor]:
    names = list(content) if isinstance(content, dict) else []
    if found := next((name for name in CONTAINERS if name in names), None):
        content = content[found]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise error(
            f"{path} holds no plain state dict of tensors, by itself or under "
            f"{', '.join(CONTAINERS)}; at its top it has "
            f"{listed(str(name) for name in names) or 'no names'}"
        )
    return without_prefix(content, "module.") if _all_begin(content, "module.") else dict(content)


def _all_begin(state: Mapping[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in state)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under ``prefix``, by their names without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def listed(names: Iterable[str], most: int = _LISTED) -> str:
    """The first few names, and how many more there are."""
    given = list(names)
    more = f", and {len(given) - most} more" if len(given) > most else ""
    return ", ".join(given[:most]) + more


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from what is wanted; false where it does not.

    Attributes:
        missing: names that are wanted and not there.
        unknown: names that are there, of no use.
        other: sentences about tensors of another shape or type.
    """

    missing: list[str]
    unknown: list[str]
    other: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.other)

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing, _LISTED),
            ("unknown", self.unknown, _LISTED),
            ("of another shape or type", self.other, _SAID),
        )
        return "; ".join(
            f"{len(names)} {what} ({listed(names, most)})" for what, names, most in parts if names
        )


def compare(
    found: Mapping[str, Tensor | Shape],
    wanted: Mapping[str, Tensor],
    unused: Mapping[str, Shape] | None = None,
    *,
    dtypes: bool = True,
) -> Difference:
    """How ``found`` differs from ``wanted``.

    Args:
        found: tensors, or their shapes where they have not been read.
        wanted: tensors of the right shapes and dtypes (on the meta device, say).
        unused: shapes of float32 tensors that may be there as well.
        dtypes: whether the types count.
    """
    unused = unused or {}
    other = []
    for key, value in found.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else tuple(value)
        kind = value.dtype if isinstance(value, Tensor) and dtypes else None
        if key in wanted:
            like, like_kind = tuple(wanted[key].shape), wanted[key].dtype
        elif key in unused:
            like, like_kind = unused[key], torch.float32
        else:
            continue
        if shape != like or kind not in (None, like_kind):
            said = (f" {kind}", f" {like_kind}") if kind is not None else ("", "")
            other.append(f"{key} is {shape}{said[0]}, not {like}{said[1]}")
    return Difference(
        [key for key in wanted if key not in found],
        [key for key in found if key not in wanted and key not in unused],
        other,
    )


# In place, each gives back the tensor that it is called with. Of nn.init those that a mode sees:
# what the others call is seen instead.
_RANDOM: set[Any] = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.exponential_,
    Tensor.random_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
}

_ZEROS: dict[Any, Callable[..., Tensor]] = {
    torch.rand: torch.zeros,
    torch.randn: torch.zeros,
    torch.rand_like: torch.zeros_like,
    torch.randn_like: torch.zeros_like,
}


class _NoRandom(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _RANDOM:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            with torch.no_grad():
                return tensor.zero_()
        named = dict(kwargs or {})
        if func in _ZEROS:
            named.pop("generator", None)
            return _ZEROS[func](*args, **named)
        return func(*args, **named)


@contextmanager
def no_random_init() -> Iterator[None]:
    """Modules made here get zeros in the place of random initial values, and draw none from torch's
    generators: for modules whose every weight is loaded next. Constants are set as always."""
    with _NoRandom():
        yield
