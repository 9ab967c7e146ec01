"""Folders of tokens: what ``tokenflow tokenize`` writes and training reads.

    index.json                  written last
    tokens-00000.safetensors    "tokens", int32 [n, L], one row an image
    tokens-00000.json           the images' names, captions and labels, same order
    tokens-00000.done.json      until index.json is there: the shard is finished, and its digests
    unfinished.json             until index.json is there: what the tokens are made of

In the layout "webdataset" shards are tar files: KEY.tokens.npy, int32 [L], with the source's
KEY.txt, KEY.json and KEY.cls as they were.

Each file appears whole. A folder without index.json is not finished, and is gone on with only by
the same tokenizer on the same data (:mod:`tokenflow_ext.train.corpus`). Folders may be URLs
(:mod:`.places`).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from tokenflow_ext._deprecated import renamed
from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.serialization.files import shown, utf8_name

from .places import is_file, is_folder, is_remote, lexists, names, read_bytes, reading
from .text_files import DataError, inside, read_json, require_file

FORMAT, VERSION = "tokenflow-tokens", 1
#: Layouts of a shard, with the version of the format that has them first.
LAYOUTS = {"safetensors": VERSION, "webdataset": 2}
INDEX, UNFINISHED = "index.json", "unfinished.json"
#: What the tokens of an image are called in a tar file.
MEMBER = "tokens.npy"
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
    """Tokens [n, L] as a safetensors file, with facts about them as its metadata: the same bytes
    for the same tokens (safetensors orders metadata by chance)."""
    metadata = {key: json.dumps(value) for key, value in about.items()}
    content = save({"tokens": tokens.to(torch.int32).contiguous()}, metadata=metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[start:]


def shard_names(found: Sequence[str]) -> list[str]:
    """Those of shards among the names in a folder."""
    return [
        name
        for name in found
        if name.startswith("tokens-") and name.endswith((".safetensors", ".tar"))
    ]


# -- reading --------------------------------------------------------------------------------------


def is_tokens(folder: Path) -> bool:
    """Whether ``folder`` holds tokens.

    Raises:
        DataError: it does, but they are not finished.
    """
    if is_file(folder / INDEX):
        return True
    if lexists(folder / UNFINISHED) or (
        not is_remote(folder) and is_folder(folder) and shard_names(names(folder))
    ):
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
    index = read_index(path)
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
    check_shards(folder, index)
    tokens, found = [], []
    for shard in index["shards"]:
        found += _rows(folder / shard["rows"], shard["count"])
        tokens.append(_load(folder / shard["tokens"], _shape_of(shard, index)))
        least, most = int(tokens[-1].min()), int(tokens[-1].max())
        if least < 0 or most >= codebook_size:
            raise DataError(
                f"{folder / shard['tokens']} holds tokens from {least} to {most}, the tokenizer "
                f"has {codebook_size}"
            )
    return tokens, found


def check_shards(folder: Path, index: dict[str, Any]) -> None:
    """That the files are there, and hold as much as the index says where a header tells.

    Raises:
        DataError: naming the file.
    """
    for shard in index["shards"]:
        path = folder / shard["tokens"]
        if is_remote(path) or path.suffix == ".tar":
            _require(path)
        else:
            _check_shape(path, _shape(path), _shape_of(shard, index))
        _require(folder / shard["rows"])


def _require(path: Path) -> None:
    if not is_remote(path):
        require_file(path)
    elif not is_file(path):
        raise DataError(f"cannot read {path}: it is missing")


def _shape_of(shard: dict[str, Any], index: dict[str, Any]) -> tuple[int, int]:
    """What the index says of a shard's tokens."""
    return shard["count"], sum(rows * columns for rows, columns in index["scales"])


def _check_shape(path: Path, found: tuple[int, ...], expected: tuple[int, int]) -> None:
    if found != expected:
        raise DataError(f"{path} holds tokens {list(found)}, {INDEX} says {list(expected)}")


def _load(path: Path, expected: tuple[int, int]) -> Tensor:
    """A shard's tokens, [n, L] of that shape.

    Raises:
        DataError: naming the file.
    """
    if path.suffix == ".tar":
        tokens = _load_tar(path)
    elif is_remote(path):
        with reading(path):
            tokens = load(read_bytes(path))["tokens"]
    else:  # by its header, which was checked
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            tokens = file.get_tensor("tokens")
    _check_shape(path, tuple(tokens.shape), expected)
    if tokens.is_floating_point():
        raise DataError(f"{path}: tokens must be whole numbers, got {tokens.dtype}")
    return tokens


def _load_tar(path: Path) -> Tensor:
    """The tokens in a tar file, in its order."""
    rows = []
    with reading(path), tarfile.open(fileobj=io.BytesIO(read_bytes(path)), mode="r:") as archive:
        for member in archive:
            if member.name.endswith(f".{MEMBER}") and (file := archive.extractfile(member)):
                rows.append(np.load(io.BytesIO(file.read()), allow_pickle=False))
        if not rows:
            raise ValueError(f"no member is called KEY.{MEMBER}")
        return torch.from_numpy(np.stack(rows))


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


def read_index(path: Path) -> dict[str, Any]:
    """The index, every entry of the type and range it must have."""
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path} is not what `tokenflow tokenize` writes")
    layout = index.get("layout", "safetensors")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise DataError(
            f"{path} has the layout {shown(layout)}; this release knows {list(LAYOUTS)}"
        )
    if index.get("version") != LAYOUTS[layout]:
        raise DataError(
            f"{path} has version {index.get('version')!r}; this release reads version "
            f"{LAYOUTS[layout]} of the layout {layout}"
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
    named = [shard["tokens"] for shard in index["shards"]]
    if len(set(named)) < len(named):
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


__getattr__ = renamed(
    __name__,
    {
        "Shard": "tokenflow_ext.train.corpus.writing:Shard",
        "check_target": "tokenflow_ext.train.corpus.writing:check_target",
        "data_digest": "tokenflow_ext.train.corpus.sources:data_digest",
        "finish": "tokenflow_ext.train.corpus.writing:finish",
        "writing": "tokenflow_ext.train.corpus.writing:writing",
    },
)
