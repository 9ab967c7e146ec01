"""What people hand in: errors that name it, text as UTF-8, names that can be printed, and a word
about what is left out."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from tokenflow_ext.errors import DataError as DataError
from tokenflow_ext.errors import printable as printable
from tokenflow_ext.models.serialization import files

#: The listing of a folder of pictures: {"file_name": ..., "text": ...} a line.
METADATA = "metadata.jsonl"
_REASONS = 8  # that a line tells


def say(text: str, everyone: bool = False) -> None:
    """Print a line for people, beside a progress bar; of torchrun's processes the first alone, or
    ``everyone`` that has something of its own to say."""
    if everyone or os.environ.get("RANK", "0") == "0":
        tqdm.write(printable(text), file=sys.stderr)


# -- files ----------------------------------------------------------------------------------------


def check_file(path: str | os.PathLike[str]) -> None:
    """That ``path`` is a file, or a link to one.

    Raises:
        OSError: nothing there, or a folder, a named pipe (which would be waited on) or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError("a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device, no file")


def require_file(path: str | os.PathLike[str]) -> None:
    """That there is a file at ``path`` which may be read, before any work that needs it.

    Raises:
        DataError: naming it.
    """
    try:
        check_file(path)
        if not os.access(path, os.R_OK):
            raise OSError("no permission to read it")
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise DataError(f"cannot read {path}: {reason(error)}") from error


def _path(path: str | os.PathLike[str]) -> Path:
    """A path as it is: it may be a URL's (:mod:`.places`), which pathlib would not keep."""
    return Path(path) if isinstance(path, str) else cast(Path, path)


def reason(error: BaseException) -> str:
    """What an error says, without the path that an OSError repeats; its type where that is all."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def inside(root: str | os.PathLike[str], name: Any) -> Path:
    """The path that a listing in ``root`` means by ``name``.

    Raises:
        ValueError: no name, an absolute path, or one with ``..``: a listing reads nothing outside
            its folder.
    """
    return files.inside(_path(root), name, "the listing", ValueError)


# -- text -----------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file of any length, see :func:`decode`.

    Raises:
        DataError: naming the file.
    """
    return files.read_text(_path(path), DataError, limit=None)


def decode(content: bytes, name: str) -> str:
    """UTF-8 text, without the byte order mark that some editors put before it.

    Raises:
        DataError: another encoding, naming ``name``, and the line where there is one.
    """
    return files.decode(content, name, DataError)


def lines(text: str) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line without white space around it) of each line that is not blank.

    Lines end at ``\n`` alone: other separators (U+2028, U+0085) may stand inside a JSON string.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.strip():
            yield number, line


def parse_json(text: str) -> Any:
    """What ``text`` means as JSON; ``NaN`` and ``Infinity`` too, which public listings hold.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a UTF-8 file means as JSON.

    Raises:
        DataError: naming the file.
    """
    return files.read_json(_path(path), DataError)


def json_lines(path: str | os.PathLike[str], expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line of a file of JSON objects.

    Args:
        expected: what a line looks like, for the message.

    Raises:
        DataError: naming file and line.
    """
    for number, line in lines(read_text(path)):
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict):
                raise ValueError(f"a {type(entry).__name__}")
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected {expected}, got {line[:80]} ({error})"
            ) from error
        yield number, entry


# -- what is left out -----------------------------------------------------------------------------


class Tally:
    """How many things were left out, why, and an example of each.

    Args:
        where: what they were left out of, for the line that says so.
        everyone: see :func:`say`.
    """

    def __init__(self, where: str | os.PathLike[str], everyone: bool = False) -> None:
        self.where, self.everyone = str(where), everyone
        self.total, self._said = 0, 0
        self._reasons: dict[str, tuple[int, str]] = {}

    def add(self, why: str, example: str | os.PathLike[str], count: int = 1) -> None:
        """Count what was left out for the reason ``why``."""
        before, first = self._reasons.get(why, (0, str(example)))
        self._reasons[why] = (before + count, first)
        self.total += count

    def __str__(self) -> str:
        told = sorted(self._reasons.items(), key=lambda entry: -entry[1][0])
        parts = [f"{count} {why} ({example})" for why, (count, example) in told[:_REASONS]]
        if rest := sum(count for _, (count, _) in told[_REASONS:]):
            parts.append(f"{rest} for other reasons")
        return "; ".join(parts)

    def say(self, verb: str = "left out") -> None:
        """One line about all of it, where anything is new."""
        if self.total > self._said:
            say(f"{self.where}: {verb}: {self}", self.everyone)
            self._said = self.total

    def say_doubled(self, verb: str = "left out") -> None:
        """As :meth:`say`, but not before the number has doubled: what is met while a run goes on
        is told in a few lines, however much of it there is."""
        if self.total >= 2 * self._said:
            self.say(verb)


def metadata_entries(root: Path, expected: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The picture that each line of ``metadata.jsonl`` in ``root`` names, and the line.

    Args:
        expected: what a line should be, for the message.

    Raises:
        DataError: the file cannot be read, or names a picture outside ``root`` or none.
    """
    file = root / METADATA
    for number, entry in json_lines(file, expected):
        try:
            path = inside(root, entry["file_name"])
        except (ValueError, KeyError) as error:
            what = "there is no file_name" if isinstance(error, KeyError) else error
            raise DataError(f"{file}, line {number}: expected {expected}: {what}") from error
        yield path, entry


def check_text(text: Any, where: str) -> str:
    """``text``, where it is one that a text tokenizer takes.

    Raises:
        DataError: it is not; naming ``where``.
    """
    if not isinstance(text, str):
        raise DataError(f"{where}: a prompt must be text, got {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text!r} is no Unicode text (not UTF-8?)") from error
    if "\0" in text:
        raise DataError(f"{where}: {text!r} has a NUL in it")
    return text
