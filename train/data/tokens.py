"""Folders of tokens: what ``tokenflow tokenize`` writes and training reads.

    index.json                  written last
    tokens-00000.safetensors    "tokens", int32 [n, L], one row an image
    tokens-00000.json           the images' names, captions and labels, same order
    unfinished.json             there until index.json is: what the tokens are made of

Each file appears whole. A folder without index.json is not finished, and is gone on with only by
the same tokenizer on the same data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.serialization.files import (
    OutputError,
    remove_parts,
    utf8_name,
    write_file,
)

from .outputs import Outputs, check_folder, check_new_folder, json_text
from .text_files import DataError, inside, read_json, require_file

FORMAT, VERSION = "tokenflow-tokens", 1
INDEX, UNFINISHED = "index.json", "unfinished.json"
#: The keys that say what tokens are made of: two folders that agree in them hold the same tokens.
_MADE_OF = ("tokenizer_sha256", "data_sha256", "shard_size")
# Parts of a tokenizer that tokens do not depend on: a decoder may be trained after them.
_DECODERS = ("decoder.", "post_quant_conv.", "semantic_decoder.", "decode_task_layer.")
_STATISTICS = ("quantizer.usage_ema", "quantizer.codebook_sums")


def fingerprint(model: TokenFlowTokenizer) -> str:
    """SHA-256 of what decides a tokenizer's tokens: not its decoders, nor the file it came from."""
    config = model.config
    decides = [
        config.image_size,
        config.pixel.input_size,
        [config.semantic.tower.kind, config.semantic.tower.input_scale],
        [list(size) for size in model.quantizer.scales],
        *(getattr(config.quantizer, key) for key in ("kind", "l2_norm", "weights")),
        *(getattr(config.quantizer, key) for key in ("phi", "phi_shared")),
    ]
    sha = hashlib.sha256(json.dumps(decides).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith((*_DECODERS, *_STATISTICS)):
            sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def data_digest(
    root: Path, captions: dict[Path, str | None], labels: Mapping[Path, str] | None = None
) -> str:
    """SHA-256 of the names, sizes, times, captions and labels of pictures below ``root``."""
    sha = hashlib.sha256()
    for path, caption in sorted(captions.items()):
        try:
            found = path.stat()
            facts = [found.st_size, found.st_mtime_ns]
        except OSError:  # said when it is to be read
            facts = []
        label = [labels[path]] if labels and path in labels else []
        sha.update(json.dumps([os.path.relpath(path, root), facts, caption, *label]).encode())
    return sha.hexdigest()


def facts(model: TokenFlowTokenizer, place: Path) -> dict[str, Any]:
    """What must be known of tokens to use them.

    Raises:
        ConfigError: a tokenizer of the family.
    """
    model.config.need_one_index("a folder of tokens")
    quantizer = model.quantizer
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": str(place),
        "image_size": model.config.image_size,
        "codebook_size": quantizer.codebook_size,
        "scales": [list(size) for size in quantizer.scales],
        "tokens_per_image": quantizer.num_tokens,
    }


def encoded(tokens: Tensor, about: dict[str, Any]) -> bytes:
    """Tokens [n, L] as a safetensors file, with facts about them as its metadata."""
    metadata = {key: json.dumps(value) for key, value in about.items()}
    return save({"tokens": tokens.to(torch.int32).contiguous()}, metadata=metadata)


# -- writing --------------------------------------------------------------------------------------


def check_target(folder: Path) -> None:
    """That tokens can be written into ``folder``: a new or empty one, or one of tokens.

    Raises:
        OutputError: naming what is in the way.
    """
    if any((folder / name).is_file() for name in (INDEX, UNFINISHED)):
        check_folder(folder)
    else:
        check_new_folder(folder)


@dataclass
class Shard:
    """One shard of a folder that is being written."""

    folder: Path
    number: int

    @property
    def names(self) -> dict[str, str]:
        """Of its two files."""
        stem = f"tokens-{self.number:05d}"
        return {"tokens": f"{stem}.safetensors", "rows": f"{stem}.json"}

    def written(self) -> list[dict[str, Any]] | None:
        """Its rows, where an earlier run wrote both files."""
        paths = [self.folder / name for name in self.names.values()]
        if not all(path.is_file() for path in paths):
            return None
        rows = read_json(paths[1])
        if not isinstance(rows, list) or _shape(paths[0])[0] != len(rows):
            raise DataError(f"{paths[0]} and {paths[1].name} do not fit together: remove both")
        return rows

    def write(self, tokens: Tensor, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
        """Write its two files."""
        names = self.names
        write_file(self.folder / names["tokens"], encoded(tokens, about), overwrite=True)
        write_file(self.folder / names["rows"], json_text(rows, indent=0), overwrite=True)


@contextmanager
def writing(folder: Path, about: dict[str, Any]) -> Iterator[bool]:
    """Write shards of tokens into ``folder``, alone; its index afterwards (:func:`finish`).

    Yields whether the folder holds just these tokens already, finished.

    Args:
        about: :func:`facts`, and the keys that say what the tokens are made of.

    Raises:
        OutputError: the folder holds other things, other tokens, or another process writes there.
        DataError: it is finished, and a shard is damaged or gone.
    """
    check_target(folder)
    if (folder / INDEX).is_file():
        _check_same(folder / INDEX, about)
        _check_shards(folder, _read_index(folder / INDEX))
        (folder / UNFINISHED).unlink(missing_ok=True)  # of a run that ended right after its index
        yield True
        return
    marker = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, which would lead to a file of somebody's.
        handle = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {marker}: {error.strerror}") from error
    with open(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends
        except OSError as error:
            raise OutputError(
                f"cannot lock {marker}: {error.strerror} (another process writes into {folder}?)"
            ) from error
        if _shards(folder):
            _check_same(marker, about)
        else:  # nothing was begun that could be gone on with
            file.truncate(0)
            file.write(json_text(about, indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        remove_parts(folder)
        try:
            yield False
        finally:
            if not _shards(folder):
                marker.unlink(missing_ok=True)


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """That a folder's tokens, finished or begun, are made of the same."""
    try:
        found = read_json(path)
    except DataError as error:
        raise OutputError(f"{error}: name another --out") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise OutputError(f"{path} is not of `tokenflow tokenize`: name another --out")
    words = {
        "tokenizer_sha256": "of another tokenizer",
        "data_sha256": "of other pictures or captions",
        "shard_size": "in shards of another size",
    }
    for key, what in words.items():
        if found.get(key) != about[key]:
            raise OutputError(
                f"{path.parent} holds tokens {what} ({key} {found.get(key)}, now {about[key]}): "
                "name another --out, or remove it"
            )


def finish(folder: Path, index: dict[str, Any]) -> Path:
    """Write the index, with which the folder is finished; returns its path."""
    path = Outputs(folder).write_json(INDEX, index)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return path


def _shards(folder: Path) -> list[Path]:
    return list(folder.glob("tokens-*.safetensors"))


# -- reading --------------------------------------------------------------------------------------


def is_tokens(folder: Path) -> bool:
    """Whether ``folder`` holds tokens.

    Raises:
        DataError: it does, but they are not finished.
    """
    if (folder / INDEX).is_file():
        return True
    if (folder / UNFINISHED).exists() or _shards(folder):
        raise DataError(
            f"the tokens in {folder} are not finished, there is no {INDEX}: run the same "
            "`tokenflow tokenize` again"
        )
    return False


def read(
    folder: Path,
    scales: Sequence[tuple[int, int]],
    codebook_size: int,
    tokenizer: Callable[[], str] | None = None,
) -> tuple[list[Tensor], list[str | None]]:
    """The tokens in ``folder``, int32 [n, L] of each shard, and their captions.

    Everything the index says is compared with the files before they are read.

    Args:
        scales: (rows, columns) of each scale that the tokenizer at hand has.
        tokenizer: gives its :func:`fingerprint`; None trusts that it is the one.

    Raises:
        DataError: unfinished, unreadable, or tokens of another tokenizer; naming the file.
    """
    tokens, rows = read_rows(folder, scales, codebook_size, tokenizer)
    return tokens, [row["caption"] for row in rows]


def read_by_name(
    folder: Path,
    scales: Sequence[tuple[int, int]],
    codebook_size: int,
    tokenizer: Callable[[], str] | None = None,
) -> dict[str, Tensor]:
    """The tokens [L] int32 of each picture, by its name; arguments and errors as :func:`read`."""
    tokens, rows = read_rows(folder, scales, codebook_size, tokenizer)
    named = {}
    for row, found in zip(rows, torch.cat(tokens), strict=True):
        if not isinstance(row.get("image"), str):
            raise DataError(f"a row of the tokens in {folder} does not name its image")
        named[row["image"]] = found
    return named


def read_rows(
    folder: Path,
    scales: Sequence[tuple[int, int]],
    codebook_size: int,
    tokenizer: Callable[[], str] | None = None,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The tokens of each shard, and what is written of each image ("image", "caption", "label"
    where it has one); arguments and errors as :func:`read`."""
    path = folder / INDEX
    if not is_tokens(folder):
        raise DataError(f"no tokens in {folder}: {path} is missing")
    index = _read_index(path)
    if index["scales"] != [list(size) for size in scales]:
        raise DataError(
            f"{folder} holds tokens of the scales {index['scales']}, the tokenizer has "
            f"{[list(size) for size in scales]}"
        )
    if index["codebook_size"] != codebook_size:
        raise DataError(
            f"{folder} holds tokens of {index['codebook_size']} codes, the tokenizer has "
            f"{codebook_size}"
        )
    known = index.get("tokenizer_sha256")  # folders written before this was kept have none
    if known is not None and tokenizer is not None and known != (mine := tokenizer()):
        raise DataError(
            f"{folder} holds tokens of another tokenizer, {index['tokenizer']} "
            f"(SHA-256 {known[:16]}, this one's is {mine[:16]})"
        )
    _check_shards(folder, index)
    tokens, found = [], []
    for shard in index["shards"]:
        found += _rows(folder / shard["rows"], shard["count"])
        with utf8_name(folder / shard["tokens"]) as name, safe_open(name, framework="pt") as file:
            tokens.append(file.get_tensor("tokens"))
        least, most = int(tokens[-1].min()), int(tokens[-1].max())
        if least < 0 or most >= codebook_size:
            raise DataError(
                f"{folder / shard['tokens']} holds tokens from {least} to {most}, the tokenizer "
                f"has {codebook_size}"
            )
    return tokens, found


def _check_shards(folder: Path, index: dict[str, Any]) -> None:
    """That the files hold as much as the index says."""
    length = sum(rows * columns for rows, columns in index["scales"])
    for shard in index["shards"]:
        expected = (shard["count"], length)
        if (found := _shape(folder / shard["tokens"])) != expected:
            raise DataError(
                f"{folder / shard['tokens']} holds tokens {list(found)}, {INDEX} says "
                f"{list(expected)}"
            )
        require_file(folder / shard["rows"])


def _rows(path: Path, count: int) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list) or len(rows) != count:
        raise DataError(f"{path} must be a list of {count} rows, as {INDEX} says")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("caption", 0), str | None):
            raise DataError(
                f'{path}, row {number}: expected {{"image": ..., "caption": text or null}}, got '
                f"{str(row)[:80]}"
            )
    return rows


def _read_index(path: Path) -> dict[str, Any]:
    """The index, every entry of the type and range it must have."""
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path} is not what `tokenflow tokenize` writes")
    if index.get("version") != VERSION:
        raise DataError(
            f"{path} has version {index.get('version')!r}; this release reads version {VERSION}"
        )

    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def pair(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))

    def name(value: Any) -> bool:
        """A file in the folder: an index from elsewhere must not lead out of it."""
        try:
            return inside(path.parent, value) != path.parent
        except ValueError:
            return False

    def shard(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and name(value.get("tokens"))
            and name(value.get("rows"))
            and number(value.get("count"))
        )

    def some(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, list) and bool(value) and all(map(each, value))

    wanted = {
        "codebook_size": (number, "a number above 0"),
        "scales": (some(pair), "a list of pairs of numbers above 0"),
        "shards": (some(shard), "a list of {tokens, rows, count}, files in this folder"),
        "tokenizer": (lambda value: isinstance(value, str), "a text"),
        "tokenizer_sha256": (lambda value: value is None or isinstance(value, str), "a text"),
    }
    for key, (right, what) in wanted.items():
        if not right(index.get(key)):
            raise DataError(f"{path}: {key} must be {what}, got {str(index.get(key))[:80]}")
    names = [shard["tokens"] for shard in index["shards"]]
    if len(set(names)) < len(names):
        raise DataError(f"{path} names a shard twice")
    return index


def _shape(path: Path) -> tuple[int, ...]:
    """The shape of a shard's tokens, from its header: the reader has compared it with the size."""
    require_file(path)
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            header = file.get_slice("tokens")
            shape, kind = tuple(header.get_shape()), header.get_dtype()
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the tokens {path}: {error}") from error
    if kind not in ("I16", "I32", "I64") or len(shape) != 2:
        raise DataError(f"{path}: tokens must be whole numbers [n, L], got {kind} {list(shape)}")
    return shape
