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
from .files import check_regular, inside, read_json
from .pretrained import not_finite, read_safetensors, read_torch, safetensors_shapes

CONTAINERS = ("ema", "model", "state_dict")
"""Under what name a torch file may have its state dict. The first that it has is read."""

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""The weights in a folder of transformers; with ``.index.json`` where there are several files."""

INDEX = ".index.json"
"""How the name of an index ends: a JSON file whose ``weight_map`` names the file of each tensor."""

WEIGHTS_FILES = tuple(name + end for name in FOLDER_FILES for end in ("", INDEX))
"""Under what names a folder may have its weights. The first that is there is read."""

_PARALLEL = "module."
_COMPILED = "_orig_mod"
_LISTED = 8  # names that a message spells out, and sentences
_SAID = 3

Shape = tuple[int, ...]


def read_state_dict(
    path: str | Path,
    error: Callable[[str], Exception] = CheckpointError,
    check: Callable[[dict[str, Shape]], None] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of a state dict, by its module's own names (see :func:`plain_names`).

    Tensors of torch files in the present format are mapped, not read: copy them before the file
    goes. Nothing in a file is run.

    Args:
        path: a safetensors file, a torch file with the state dict by itself or under one of
            ``CONTAINERS``, an index (``NAME.index.json``) of several such files, or a folder with
            one of ``FOLDER_FILES`` or its index.
        error: makes the exception of a message.
        check: is given the shapes, by name, before any tensor of a safetensors file is read, and
            may refuse them.

    Raises:
        error: nothing there, a file that cannot be read or holds no state dict, or an index that
            does not agree with its files.
    """
    path = Path(path)
    files, file_of = _files(path, error)
    shapes: dict[str, Shape] = {}
    contents: dict[Path, dict[str, Tensor]] = {}
    try:
        for file in files:
            if file.suffix == ".safetensors":
                found = safetensors_shapes(file)
            else:
                # Training scripts store their argparse.Namespace beside the weights: a plain record
                content = read_torch(file, error, mmap=True, records=[argparse.Namespace])
                contents[file] = _state_dict_in(content, file, error)
                found = {key: tuple(value.shape) for key, value in contents[file].items()}
            if file_of and (stranger := next((k for k in found if file_of.get(k) != file), None)):
                raise error(f"the index of {path} does not say that {file.name} has {stranger}")
            shapes |= found
        if missing := [key for key in file_of if key not in shapes]:
            file = file_of[missing[0]]
            raise error(
                f"the index of {path} says that {file.name} has {missing[0]}, which it has not"
            )
        names = plain_names(shapes, path, error)
        if check is not None:
            check({names[key]: shape for key, shape in shapes.items()})
        state: dict[str, Tensor] = {}
        for file in files:
            part = contents[file] if file in contents else read_safetensors(file)[0]
            state |= {names[key]: value for key, value in part.items()}
    except CheckpointError as fault:
        if error is CheckpointError:
            raise
        raise error(str(fault)) from fault
    return state


def read_weights(
    folder: Path, check: Callable[[dict[str, Shape]], None] | None = None
) -> dict[str, Tensor]:
    """The weights in a folder of ``save_pretrained``: one of ``FOLDER_FILES``, or its index.

    Args:
        check: see :func:`read_state_dict`.

    Raises:
        CheckpointError: see :func:`read_state_dict`; or weights that are not finite.
    """
    file = weights_file(folder)
    check_regular(file, CheckpointError)
    weights = read_state_dict(file, check=check)
    if bad := not_finite(weights):
        raise CheckpointError(f"{file} holds numbers that are not finite, first in {bad[0]}")
    return weights


def weights_file(folder: Path) -> Path:
    """What :func:`read_state_dict` reads in a folder: its weights, or their index. Where there is
    neither, the file that is missing."""
    found = (folder / name for name in WEIGHTS_FILES if (folder / name).is_file())
    return next(found, folder / WEIGHTS_FILES[0])


def weights_files(path: Path, error: Callable[[str], Exception] = CheckpointError) -> list[Path]:
    """The files whose tensors :func:`read_state_dict` reads at ``path``, in order of their names.

    Raises:
        error: an index that cannot be read.
    """
    return _files(path, error)[0]


def indexed(index: Path, error: Callable[[str], Exception] = CheckpointError) -> dict[str, Path]:
    """Which file beside an index has each name.

    Raises:
        error: no index, or one that names files elsewhere.
    """
    content = read_json(index, error)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise error(f"{index} is no index: it must have a weight_map")
    return {key: inside(index.parent, each, index, error) for key, each in names.items()}


def _files(path: Path, error: Callable[[str], Exception]) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and by an index, where there is one, which of them has each name."""
    file = weights_file(path) if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise error(f"{path} holds neither {' nor '.join(FOLDER_FILES)}, nor an index of either")
    if not file.name.endswith(INDEX):
        return [file], {}
    file_of = indexed(file, error)
    return sorted(set(file_of.values())), file_of


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
    return dict(content)


def plain_names(
    names: Iterable[str], source: str | Path, error: Callable[[str], Exception] = CheckpointError
) -> dict[str, str]:
    """By each name of a state dict, the module's own, without what wrappers put into it:
    ``module.`` of DistributedDataParallel before all names, ``_orig_mod.`` of ``torch.compile``
    anywhere, in any order.

    Raises:
        error: two names that become one.
    """
    given = list(names)
    plain = given
    while plain:
        stripped = [".".join(p for p in name.split(".") if p != _COMPILED) for name in plain]
        if all(name.startswith(_PARALLEL) for name in stripped):
            stripped = [name.removeprefix(_PARALLEL) for name in stripped]
        if stripped == plain:
            break
        plain = stripped
    found: dict[str, str] = {}
    for name, short in zip(given, plain, strict=True):
        if short in found:
            raise error(f"{source} has {found[short]} and {name}, which are both {short}")
        found[short] = name
    return dict(zip(given, plain, strict=True))


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in half precision as float32; the others as they are."""
    half = (torch.float16, torch.bfloat16)
    return {k: v.float() if v.dtype in half else v for k, v in state.items()}


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
