"""Where data lie: local paths, and URLs of every file system that fsspec has a driver for.

A place is a :class:`pathlib.Path`, or universal_pathlib's UPath of a URL, which has the same
methods. Content is read through the functions here: they open a URL's file system anew in each
process, as a forked worker of a DataLoader must.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from tokenflow_ext.errors import MissingPackageError
from tokenflow_ext.models.serialization.files import brief

from .text_files import DataError, check_file, reason

#: What URLs begin with; ``simplecache::s3://...`` is fsspec's chain of two file systems.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(://|::)")
_MOST_NAMES = 1_000_000  # that a pattern may stand for
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_NAMES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_PATTERN = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL rather than a local path."""
    return isinstance(text, str) and _URL.match(text) is not None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL's (a text is a local path here)."""
    return not isinstance(path, (str, Path))


def place(text: str | os.PathLike[str]) -> Path:
    """The place that a text means; ``file://`` URLs are local paths.

    Raises:
        DataError: a URL of a protocol that fsspec does not know.
        MissingPackageError: the protocol's driver, or universal_pathlib, is not installed.
    """
    if not isinstance(text, str) or not is_url(text):
        return Path(text) if isinstance(text, str) else cast(Path, text)
    if re.match(r"(file|local)://", text):
        return Path(text.split("://", 1)[1])
    try:
        from upath import UPath
    except ImportError as error:
        raise MissingPackageError(
            f"{text}: URLs need universal_pathlib: pip install 'tokenflow_ext[train]'"
        ) from error
    try:
        found = UPath(text)
        _ = found.fs  # the driver is loaded
    except ImportError as error:
        raise MissingPackageError(f"{text}: {brief(error)}") from error
    except ValueError as error:
        raise DataError(f"{text} is no URL that can be read: {brief(error)}") from error
    return cast(Path, found)


def expand(text: str) -> list[str]:
    """What a pattern with braces stands for: ``{000..127}`` for numbers, ``{a,b}`` for names.

    A local path of that very name is no pattern.

    Raises:
        DataError: braces that do not close, or more names than anyone means.
    """
    if not _PATTERN.search(text) or (not is_url(text) and os.path.lexists(text)):
        return [text]
    from braceexpand import braceexpand

    counts = [abs(int(b) - int(a)) + 1 for a, b in _RANGE.findall(text)]
    counts += [names.count(",") + 1 for names in _NAMES.findall(text)]
    if math.prod(counts) > _MOST_NAMES:
        raise DataError(f"the pattern {text} stands for more than {_MOST_NAMES} names")
    try:
        found = list(itertools.islice(braceexpand(text), _MOST_NAMES + 1))
    except ValueError as error:
        raise DataError(f"the pattern {text}: {brief(error)}") from error
    if len(found) > _MOST_NAMES:
        raise DataError(f"the pattern {text} stands for more than {_MOST_NAMES} names")
    return found


# -- which there are ------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block as one error that names the place: drivers raise errors of many
    types.

    Raises:
        DataError: whatever was raised.
    """
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"{path}: {brief(error)}") from error
    except Exception as error:
        said = brief(error) if is_remote(path) else reason(error)
        raise DataError(f"cannot read {path}: {said}") from error


def is_file(path: Path) -> bool:
    """Whether a file is there. (os.path says no where a name is too long to be one.)"""
    if not is_remote(path):
        return os.path.isfile(path)
    with reading(path):
        return path.is_file()


def exists(path: Path) -> bool:
    """Whether anything is there."""
    if not is_remote(path):
        return os.path.exists(path)
    with reading(path):
        return path.exists()


def is_folder(path: Path) -> bool:
    """Whether a folder is there."""
    if not is_remote(path):
        return os.path.isdir(path)
    with reading(path):
        return path.is_dir()


def lexists(path: Path) -> bool:
    """Whether something has that name: a link that leads nowhere too."""
    return is_file(path) if is_remote(path) else os.path.lexists(path)


def relative(path: Path, root: Path) -> str:
    """The name of a place below ``root``."""
    if is_remote(path):
        return str(path.relative_to(root))
    return os.path.relpath(path, root)


def parent(path: Path) -> str:
    """What a place is in, for messages."""
    return str(path).rpartition("/")[0] if is_remote(path) else str(path.parent)


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        DataError: it cannot be read.
    """
    with reading(folder):
        if not is_remote(folder):
            return sorted(os.listdir(folder))
        return sorted(path.name for path in folder.iterdir())


def remote_files(folder: Path) -> list[Path]:
    """Every file below a URL, sorted.

    Raises:
        DataError: it cannot be listed.
    """
    remote = cast(Any, folder)
    with reading(folder):
        # Some drivers list full URLs, some paths of their own.
        found = [remote.fs.unstrip_protocol(name) for name in remote.fs.find(remote.path)]
        return sorted(map(place, found))


# -- content --------------------------------------------------------------------------------------


@contextmanager
def open_place(path: Path, once: bool = False) -> Iterator[IO[bytes]]:
    """A file to read bytes from.

    Args:
        once: it is read from begin to end alone, as every server allows; otherwise it may be sought
            in, for which an HTTP server must know ranges.
    """
    if not is_remote(path):
        check_file(path)
        with open(path, "rb") as file:
            yield file
        return
    import fsspec

    remote = cast(Any, path)
    options = {"block_size": 0} if once and remote.protocol in ("http", "https") else {}
    with fsspec.open(str(path), "rb", **options) as file:
        yield file


def read_bytes(path: Path) -> bytes:
    """The whole content of a file.

    Raises:
        DataError: naming it.
    """
    with reading(path), open_place(path) as file:
        return file.read()


def read_range(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a URL's file, of which they are one request.

    Raises:
        DataError: it ends before, or its server sends something else.
    """
    import fsspec

    with reading(path):
        system, name = fsspec.core.url_to_fs(str(path))
        content: bytes = system.cat_file(name, start=offset, end=offset + size)
    if len(content) != size:
        raise DataError(
            f"cannot read {path}: {len(content)} bytes came for {size} at byte {offset} (a server "
            "without ranges? Then simplecache:: before the URL keeps a copy)"
        )
    return content


def state(path: Path) -> list[Any]:
    """What tells one content of a file from another without reading it: size and time, or what
    the URL's driver takes for that (an ETag, say).

    Raises:
        DataError: nothing there, or it cannot be asked for.
    """
    with reading(path):
        if is_remote(path):
            remote = cast(Any, path)
            return [remote.fs.size(remote.path), str(remote.fs.checksum(remote.path))]
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
