"""Shards of tokens as they are written: whole, verified when met again, by one run at a time."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor
from webdataset import TarWriter

from tokenflow_ext.errors import OutputError
from tokenflow_ext.models.serialization.files import brief, remove_parts, write_file
from tokenflow_ext.train.data.outputs import check_folder, check_new_folder, json_text
from tokenflow_ext.train.data.places import is_file, is_folder, is_remote, names, read_bytes
from tokenflow_ext.train.data.text_files import DataError, read_json
from tokenflow_ext.train.data.tokens import (
    FORMAT,
    INDEX,
    MEMBER,
    UNFINISHED,
    check_shards,
    encoded,
    read_index,
    shard_names,
)

#: What two runs must agree in to write the same tokens, and how messages call a difference.
_MADE_OF = {
    "tokenizer_sha256": "of another tokenizer",
    "data_sha256": "of other pictures or captions",
    "shard_size": "in shards of another size",
    "layout": "in another layout",
    "dtype": "computed in another dtype",
}
_BEFORE = {"layout": "safetensors", "dtype": "float32"}  # in folders from before these were kept
_DONE = ".done.json"


class Row(NamedTuple):
    """What is known of an image beside its tokens.

    ``key`` is what WebDataset calls it, ``members`` are the texts beside it there by their suffix.
    """

    image: str
    key: str
    caption: str | None = None
    label: str | None = None
    members: tuple[tuple[str, bytes], ...] = ()

    def entry(self) -> dict[str, Any]:
        """As a folder of tokens lists it."""
        label = {} if self.label is None else {"label": self.label}
        return {"image": self.image, "caption": self.caption} | label


def put(path: Path, content: bytes, overwrite: bool = True) -> None:
    """Write a file of a folder or a URL, whole or not at all.

    Raises:
        OutputError: the system, or the URL's driver, does not write it.
    """
    if not is_remote(path):
        write_file(path, content, overwrite)
        return
    remote = cast(Any, path)
    try:  # of an object store a request that is complete or fails
        remote.fs.makedirs(remote.parent.path, exist_ok=True)
        remote.fs.pipe_file(remote.path, content)
    except Exception as error:  # drivers raise errors of many types
        raise OutputError(f"cannot write {path}: {brief(error)}") from error


def check_target(folder: Path) -> None:
    """That tokens can be written into ``folder``: a new or empty one, or one of tokens.

    Raises:
        OutputError: naming what is in the way.
    """
    ours = any(is_file(folder / name) for name in (INDEX, UNFINISHED))
    if is_remote(folder):
        other = names(folder) if not ours and is_folder(folder) else []
        if other:
            raise OutputError(
                f"{folder} holds other things, such as {other[0]}: name another folder"
            )
    elif ours:
        check_folder(folder)
    else:
        check_new_folder(folder)


@dataclass(frozen=True)
class Shard:
    """One shard of a folder that is being written."""

    folder: Path
    number: int
    layout: str

    @property
    def names(self) -> dict[str, str]:
        """Of its two files."""
        suffix = {"safetensors": ".safetensors", "webdataset": ".tar"}[self.layout]
        return {"tokens": f"{self._stem}{suffix}", "rows": f"{self._stem}.json"}

    @property
    def _stem(self) -> str:
        return f"tokens-{self.number:05d}"

    @property
    def _done(self) -> Path:
        return self.folder / f"{self._stem}{_DONE}"

    def written(self) -> dict[str, Any] | None:
        """What :meth:`write` returned, where an earlier run finished the shard and its files still
        are what they were; None where it is to be written."""
        if not is_file(self._done):
            return None
        try:
            receipt = read_json(self._done)
            whole = isinstance(receipt, dict) and verified(self.folder, receipt)
        except (DataError, KeyError, AttributeError, TypeError):
            whole = False
        return receipt if whole else None

    def write(
        self,
        tokens: Tensor | None,
        rows: list[Row],
        skipped: list[str],
        about: dict[str, Any],
        source: str = "",
    ) -> dict[str, Any]:
        """Write its files, and that it is finished; returns the shard as the index lists it.

        Args:
            tokens: [n, L] of ``rows``; None where no picture could be read.
            skipped: names of the pictures that could not be read.
            about: what the tokens' file says of them.
            source: the name of the WebDataset shard that they are of.
        """
        receipt: dict[str, Any] = {**self.names, "count": len(rows)}
        receipt |= ({"source": source} if source else {}) | {"sha256": {}}
        if tokens is not None:
            tar = self.layout == "webdataset"
            content = _tar(tokens, rows) if tar else encoded(tokens, about)
            listing = json_text([row.entry() for row in rows], indent=0)
            for kind, data in (("tokens", content), ("rows", listing)):
                put(self.folder / receipt[kind], data)
                receipt["sha256"][kind] = hashlib.sha256(data).hexdigest()
        receipt["skipped"] = skipped
        put(self._done, json_text(receipt))
        return receipt

    def forget(self) -> None:
        """Remove the note that it is finished, once the index says so."""
        self._done.unlink(missing_ok=True)


def _tar(tokens: Tensor, rows: list[Row]) -> bytes:
    """A WebDataset shard: of each image its tokens, and what its source has beside it."""
    content = io.BytesIO()
    with TarWriter(content, "", "", encoder=False, mtime=0, format="PAX_FORMAT") as archive:
        for row, codes in zip(rows, tokens.numpy().astype(np.int32), strict=True):
            array = io.BytesIO()
            np.save(array, codes, allow_pickle=False)
            sample: dict[str, Any] = {"__key__": row.key, **dict(row.members)}
            archive.write(sample | {MEMBER: array.getvalue()})
    return content.getvalue()


def verified(folder: Path, receipt: dict[str, Any]) -> bool:
    """Whether a shard's files have the digests that were noted when they were written."""
    if not receipt["count"]:
        return True
    for kind, digest in receipt["sha256"].items():
        path = folder / receipt[kind]
        if not is_file(path) or hashlib.sha256(read_bytes(path)).hexdigest() != digest:
            return False
    return set(receipt["sha256"]) == {"tokens", "rows"}


@contextmanager
def writing(folder: Path, about: dict[str, Any]) -> Iterator[bool]:
    """Write shards of tokens into ``folder``, alone; its index afterwards (:func:`finish`).

    Yields whether the folder holds just these tokens already, finished. Of a URL nothing can be
    locked: two runs there at once write the same bytes twice.

    Args:
        about: :func:`tokens.facts`, and the keys that say what the tokens are made of.

    Raises:
        OutputError: the folder holds other things, other tokens, or another process writes there.
        DataError: it is finished, and a shard is damaged or gone.
    """
    check_target(folder)
    if is_file(folder / INDEX):
        _check_same(folder / INDEX, about)
        _check_finished(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)  # of a run that ended right after its index
        yield True
        return
    marker = folder / UNFINISHED
    with _marker(marker) as begin:
        if _begun(folder):
            _check_same(marker, about)
        else:  # nothing was begun that could be gone on with
            _forget_all(folder)
            begin(json_text(about, indent=2) + b"\n")
        if not is_remote(folder):
            remove_parts(folder)
        try:
            yield False
        finally:
            if not _begun(folder):
                _forget_all(folder)
                marker.unlink(missing_ok=True)


@contextmanager
def _marker(path: Path) -> Iterator[Any]:
    """The file that says what is being written, locked; yields what writes it."""
    if is_remote(path):
        yield lambda content: put(path, content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not through a link, which would lead to a file of somebody's.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with open(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends
        except OSError as error:
            raise OutputError(
                f"cannot lock {path}: {error.strerror} (another process writes into {path.parent}?)"
            ) from error

        def begin(content: bytes) -> None:
            file.truncate(0)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        yield begin


def _begun(folder: Path) -> bool:
    """Whether a shard is in the folder."""
    return bool(shard_names(_names(folder)))


def _names(folder: Path) -> list[str]:
    return names(folder) if is_folder(folder) else []


def _forget_all(folder: Path) -> None:
    """Remove what is noted of shards in which no picture could be read."""
    for name in _names(folder):
        if name.startswith("tokens-") and name.endswith(_DONE):
            (folder / name).unlink(missing_ok=True)


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """That a folder's tokens, finished or begun, are made of the same."""
    try:
        found = read_json(path)
    except DataError as error:
        raise OutputError(f"{error}: name another --out") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise OutputError(f"{path} is not of `tokenflow tokenize`: name another --out")
    for key, what in _MADE_OF.items():
        if found.get(key, _BEFORE.get(key)) != about[key]:
            raise OutputError(
                f"{path.parent} holds tokens {what} ({key} {found.get(key)}, now {about[key]}): "
                "name another --out, or remove it"
            )


def _check_finished(folder: Path) -> None:
    """That the shards of a finished folder are what its index says."""
    index = read_index(folder / INDEX)
    check_shards(folder, index)
    for shard in index["shards"]:
        if "sha256" in shard and not verified(folder, shard):
            raise DataError(
                f"{folder / shard['tokens']} or {shard['rows']} is not what was written: their "
                f"SHA-256 differ from {INDEX}'s"
            )


def finish(folder: Path, index: dict[str, Any], shards: list[Shard]) -> Path:
    """Write the index, with which the folder is finished; returns its path.

    Raises:
        OutputError: an index is there already.
    """
    path = folder / INDEX
    put(path, json_text(index, indent=2) + b"\n", overwrite=False)
    for shard in shards:
        shard.forget()
    (folder / UNFINISHED).unlink(missing_ok=True)
    return path
