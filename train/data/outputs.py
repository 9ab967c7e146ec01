"""Files that commands write: whole or not at all, and never over something else.

One rule for all commands. What a command is going to write is claimed before its work starts, which
refuses a folder that cannot be written to and a file that is there already; what is written appears
under its name when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models.serialization.files import OutputError, write_file

from .text_files import reason

#: Bytes that a file's name may have, on every file system in use.
_NAME_MAX = 255


def json_text(value: Any, indent: int | None = None) -> bytes:
    """``value`` as JSON in UTF-8.

    A file name that is no UTF-8 has a lone surrogate for each such byte (Python's
    ``surrogateescape``), which becomes an escape such as ``\\udce9``: the JSON is valid, and
    ``os.fsencode`` gives the bytes back.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")


def _alike(name: str) -> str:
    """What names have in common that some file systems take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def png(image: np.ndarray, texts: dict[str, str] | None = None) -> bytes:
    """An image [H, W, 3] as a PNG file, with texts in it by their key."""
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def distinct_names(names: Sequence[str], suffix: str = "") -> list[str]:
    """The names, a number after each that is taken by an earlier one: ``a``, ``a~2``, ``a~3``.

    Names that differ in case alone, or in how an accent is written, count as the same: some file
    systems do not tell them apart. A name too long for a file of this suffix is cut.
    """
    taken: set[str] = set()
    made = []
    for name in names:
        number, ending = 1, ""
        while True:
            room = _NAME_MAX - len(os.fsencode(ending + suffix))
            short = name
            while len(os.fsencode(short)) > room:
                short = short[:-1]
            if (key := _alike(short + ending)) not in taken:
                break
            number += 1
            ending = f"~{number}"
        taken.add(key)
        made.append(short + ending)
    return made


def check_folder(folder: Path) -> None:
    """That files can be written into ``folder``, which is made when the first one is.

    Raises:
        OutputError: naming what stands in the way.
    """
    for part in folder.parts:
        if len(os.fsencode(part)) > _NAME_MAX:
            raise OutputError(f"cannot write into {folder}: a name of more than {_NAME_MAX} bytes")
    place = folder
    try:
        while not _exists(place) and place != place.parent:
            place = place.parent
        if not stat.S_ISDIR(place.stat().st_mode):
            raise OutputError(f"cannot write into {folder}: {place} is no folder")
        with tempfile.TemporaryFile(dir=place):  # whoever asks the system without trying may err
            pass
    except (OSError, ValueError) as error:
        # A broken link, no permission, a read-only file system; ValueError: a zero byte.
        raise OutputError(f"cannot write into {folder}: {reason(error)}: {place}") from error


def check_new_folder(folder: Path) -> None:
    """That ``folder`` can be made: it is not there yet, or empty.

    Raises:
        OutputError: naming what stands in the way.
    """
    check_folder(folder)
    if folder.is_dir() and (other := next(folder.iterdir(), None)):
        raise OutputError(f"{folder} holds other things, such as {other.name}: name another folder")


def write_folder(folder: Path, content: dict[str, bytes]) -> None:
    """Write a folder of files that is seen whole or not at all.

    Raises:
        OutputError: it holds something, or the system does not write it (a full disk).
    """
    check_new_folder(folder)
    folder = Path(os.path.realpath(folder))
    part = folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.mkdir(parents=True)
        try:
            for name, content_of in content.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(content_of)
            part.rename(folder)  # of an empty folder it takes the place
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error


def _exists(path: Path) -> bool:
    """Whether anything has that name: a link that leads nowhere too."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@dataclass
class Outputs:
    """What a command writes into a folder.

    Args:
        overwrite: replace files that are there (never one of the inputs).
    """

    folder: Path
    overwrite: bool = False
    _claimed: dict[str, str] = field(default_factory=dict)
    _written: list[Path] = field(default_factory=list)

    def claim(self, names: Iterable[str], inputs: Iterable[str | Path] = ()) -> None:
        """Say, before the work starts, what is going to be written.

        Args:
            names: of the files, below the folder.
            inputs: files that are read.

        Raises:
            OutputError: the folder cannot be written to, a file is there already, or two outputs
                have one name.
        """
        check_folder(self.folder)
        checked, read = {self.folder}, None
        for name in names:
            path = self.folder / name
            if (other := self._claimed.get(_alike(name))) is not None:
                raise OutputError(f"{path} would be written twice: as {other} and as {name}")
            self._claimed[_alike(name)] = name
            if path.parent not in checked:
                check_folder(path.parent)
                checked.add(path.parent)
            if not os.path.lexists(path):
                continue
            if read is None:
                read = {key for file in inputs if (key := _identity(Path(file))) is not None}
            if _identity(path) in read:
                raise OutputError(f"{path} is one of the inputs: name another folder with --out")
            if not self.overwrite:
                raise OutputError(
                    f"{path} is there already: name another folder with --out, or replace what is "
                    "there with --overwrite"
                )
            if not path.is_symlink() and not path.is_file():
                raise OutputError(f"{path} is no file that could be replaced")

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of that name, whole or not at all; returns its path.

        Raises:
            OutputError: see :func:`write_file`.
        """
        path = self.folder / name
        write_file(path, content, self.overwrite)
        self._written.append(path)
        return path

    @contextmanager
    def together(self) -> Iterator[None]:
        """Files that belong together: where one cannot be written, none stays behind."""
        before = len(self._written)
        try:
            yield
        except BaseException:
            for path in self._written[before:]:
                path.unlink(missing_ok=True)
            raise

    def remove(self, names: Iterable[str]) -> None:
        """Where files are replaced: take out an earlier run's of which there is no new one."""
        if self.overwrite:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as JSON."""
        return self.write(name, json_text(value, indent=2) + b"\n")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to, whatever it is called; None where it leads nowhere."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


__getattr__ = renamed(__name__, {"add_overwrite": "tokenflow_ext.train.cli.options:add_overwrite"})
