"""Files of people and of strangers: read within limits, written whole or not at all.

Every reader takes the exception to raise, and every message is one line that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from tokenflow_ext.errors import OutputError as OutputError

#: The most that a JSON or YAML file of a model, a run or an index may hold.
TEXT_LIMIT = 256 << 20
_PART = ".part"
# How files of other encodings begin (UTF-32's mark begins as UTF-16's does).
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 2, 4, 6, 6


def shown(value: Any) -> str:
    """``repr(value)`` short enough for a message, whatever the value."""
    try:
        text = _REPR.repr(value)
        return text if len(text) <= 200 else text[:196] + " ..."
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return f"a {type(value).__name__} too long to show"


def brief(error: BaseException | str, limit: int = 400) -> str:
    """An error of another library as one line of a message; torch's advice to load a file without
    ``weights_only`` is not passed on."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    if "weights_only" in text:
        text = "it holds objects other than tensors and plain containers"
    # What follows in messages from C++ is the stack.
    text = re.split(r"\n(?:Exception raised from|C\+\+ CapturedTraceback)", text)[0]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 4] + " ..."


# -- reading --------------------------------------------------------------------------------------


def check_regular(path: Path, error: Callable[[str], Exception]) -> None:
    """That ``path`` is a file (links followed): a pipe or a device would be waited for.

    Raises:
        error: nothing there, something else, or a place that cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (OSError, ValueError) as fault:  # ValueError: a name with a zero byte
        raise error(f"{path} cannot be read: {brief(fault)}") from fault
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise error(f"{path} is no file but {kind}")


def read_text(path: Path, error: Callable[[str], Exception], limit: int | None = TEXT_LIMIT) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        error: no regular file, one that cannot be read, more bytes than ``limit`` (None: any
            number), or bytes that are no UTF-8.
    """
    check_regular(path, error)
    try:
        with path.open("rb") as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {brief(fault)}") from fault
    if limit is not None and len(content) > limit:
        raise error(f"{path} is larger than the {limit} bytes that are read")
    return decode(content, path, error)


def decode(content: bytes, where: str | Path, error: Callable[[str], Exception]) -> str:
    """UTF-8 text, without the byte order mark that some editors put before it.

    Raises:
        error: another encoding, naming ``where`` and, where there is one, the line.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise error(f"{where} is not UTF-8 but {encoding} text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise error(
            f"{where}, line {line}: byte 0x{content[fault.start]:02x} is not UTF-8 but of another "
            "encoding (Windows-1252, Latin-1, ...): save it as UTF-8"
        ) from fault
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise error(f"{where}, line {line}: NUL, as in UTF-16 text: save it as UTF-8")
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse_json(text: str | bytes, where: str | Path, error: Callable[[str], Exception]) -> Any:
    """JSON text as Python values; ``where`` is what messages call it.

    Raises:
        error: no JSON (``NaN`` and ``Infinity`` are none), or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise error(f"{where} is nested too deeply") from None
    except ValueError as fault:
        raise error(f"{where} is not JSON: {brief(fault)}") from fault


def read_json(path: Path, error: Callable[[str], Exception], limit: int = TEXT_LIMIT) -> Any:
    """The content of a JSON file.

    Raises:
        error: see :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path, error, limit), path, error)


def inside(folder: Path, name: Any, where: str | Path, error: Callable[[str], Exception]) -> Path:
    """The file below ``folder`` that an entry ``name`` of the file ``where`` means.

    Raises:
        error: a name that is no text, empty, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise error(f"{where} must name files below {folder}, got {shown(name)}")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise error(f"{where} names {shown(name)}, which is not below {folder}")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise error(f"{where} names {shown(name)}, as no file can be named") from None
    return folder / name


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of the file for readers of other libraries that take none but UTF-8: its own, or that
    of an open handle (Linux)."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield str(path)


# -- writing --------------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Ask the system to write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """A new file in ``path``'s folder, which takes its name when the block has written it.

    It is flushed to the disk before, and removed where the block fails. It has a name of its own
    that nobody else has, so that neither a link nor a left-over of that name is followed.

    Args:
        overwrite: whether it takes the place of a file of that name.

    Yields:
        The path to write to; an empty file is there.

    Raises:
        OutputError: the name is taken, or the system does not write it (a full disk).
    """
    path = Path(path)
    # A short name of its own: one made of a long name might be too long.
    part = path.with_name(f".{secrets.token_hex(8)}{_PART}")
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {path}: something that is no file is there")
        part.touch(exist_ok=False)
        yield part
        flush(part)
        if overwrite:
            part.replace(path)
        else:
            _take_free_name(part, path)
        flush(path.parent)
    except FileExistsError as error:
        raise OutputError(f"{path} is there already: nothing is written over it") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _take_free_name(part: Path, path: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        os.link(part, path)  # unlike a rename, refuses a name that is taken
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        part.rename(path)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left of :func:`replacing`."""
    for path in folder.glob(f".{'[0-9a-f]' * 16}{_PART}"):
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: BaseException) -> OutputError:
    """The error of a file that could not be written, with the system's reason where there is one:
    writers of other libraries put a message of their own around it."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    return OutputError(f"cannot write {path}: {brief(error) if cause is None else cause.strerror}")


def write_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file by :func:`replacing`, and its folder where there is none.

    Raises:
        OutputError: see there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    with replacing(path, overwrite) as part:
        part.write_bytes(content)
