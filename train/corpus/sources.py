"""What a corpus is made of: folders of pictures and WebDataset shards, in units of one shard of
tokens each, in an order that hangs on their names alone."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from webdataset.tariterators import group_by_keys

from tokenflow_ext.models.serialization.files import brief
from tokenflow_ext.train.config import CaptionConfig, LabelConfig
from tokenflow_ext.train.data.captions import find_caption, list_captions
from tokenflow_ext.train.data.image_files import suffixes
from tokenflow_ext.train.data.labels import described, find_label
from tokenflow_ext.train.data.outputs import distinct_names
from tokenflow_ext.train.data.places import (
    expand,
    open_place,
    place,
    reading,
    relative,
    state,
)
from tokenflow_ext.train.data.text_files import METADATA, DataError, Tally, decode, parse_json, say
from tokenflow_ext.train.data.webdataset import beside, check_once, find_shards

from .writing import Row

#: Texts of a WebDataset sample that go with its tokens.
_TEXTS = ("txt", "json", "cls")


@dataclass(frozen=True)
class Keys:
    """Of captions and classes in JSON: the first that is there counts."""

    captions: tuple[str, ...] = CaptionConfig.caption_keys
    labels: tuple[str, ...] = LabelConfig.label_keys


class Picture(NamedTuple):
    """One picture of a folder: its place, as a text, and what is known of it."""

    place: str
    row: Row


@dataclass(frozen=True)
class Unit:
    """What becomes one shard of tokens: some pictures of a folder, or a WebDataset shard.

    ``tar`` is the shard's place; a unit of pictures has none.
    """

    number: int
    pictures: tuple[Picture, ...] = ()
    tar: str = ""

    @property
    def source(self) -> str:
        """The name of its WebDataset shard."""
        return self.tar.rpartition("/")[2]


@dataclass(frozen=True)
class Corpus:
    """Sources in order, and the units they are cut into. ``digest`` is the SHA-256 of names, sizes,
    times, captions and labels."""

    sources: list[str]
    units: list[Unit]
    digest: str


def open_corpus(
    sources: Sequence[str], shard_size: int, keys: Keys, webdataset: bool = False
) -> Corpus:
    """The units of sources.

    Args:
        sources: each a folder of pictures or of WebDataset shards, one shard, or a pattern of
            those with braces; local paths or URLs.
        shard_size: pictures of a folder in a unit.
        webdataset: whether rows carry what is written beside tokens in a tar file.

    Raises:
        DataError: a source that holds nothing, or cannot be read.
    """
    units: list[Unit] = []
    sha = hashlib.sha256()
    for source in sources:
        shards = find_shards(source)
        if shards:
            beside(source)
            sha.update(json.dumps([keys.captions, keys.labels]).encode())
        for shard in shards:
            sha.update(json.dumps([shard.name, state(shard)]).encode())
            units.append(Unit(len(units), tar=str(shard)))
        for text in [] if shards else expand(source):
            units += _pictures(place(text), len(units), shard_size, keys, webdataset, sha)
    check_once(unit.tar for unit in units if unit.tar)
    check_once(unit.pictures[0].place for unit in units if unit.pictures)
    return Corpus(list(sources), units, sha.hexdigest())


def _pictures(
    folder: Path, first: int, size: int, keys: Keys, webdataset: bool, sha: Any
) -> Iterator[Unit]:
    """The units of a folder of pictures."""
    captions = list_captions(folder, keys.captions)
    known = described(folder, keys.labels)
    labels = {path: label for path, (label, _) in known.items() if label}
    if bad := [why for label, why in known.values() if not label]:
        say(f"{len(bad)} labels in {METADATA} are left out, of pictures {bad[0]}")
    paths = sorted(captions)
    sha.update(data_digest(folder, captions, labels).encode())
    for number, start in enumerate(range(0, len(paths), size)):
        chosen = paths[start : start + size]
        names = [relative(path, folder) for path in chosen]
        rows = [
            Row(name, "", captions[p], labels.get(p)) for name, p in zip(names, chosen, strict=True)
        ]
        if webdataset:
            rows = _keyed(rows)
        texts = [str(path) for path in chosen]
        yield Unit(first + number, tuple(map(Picture, texts, rows)))


def data_digest(root: Path, captions: Mapping[Path, str | None], labels: Mapping[Path, str]) -> str:
    """SHA-256 of the names, sizes, times, captions and labels of pictures below ``root``."""
    sha = hashlib.sha256()
    for path, caption in sorted(captions.items()):
        try:
            facts = state(path)
        except DataError:  # said when it is to be read
            facts = []
        label = [labels[path]] if path in labels else []
        sha.update(json.dumps([relative(path, root), facts, caption, *label]).encode())
    return sha.hexdigest()


def _keyed(rows: list[Row]) -> list[Row]:
    """Rows of a folder with a key and texts as WebDataset has them: a key ends at the first dot of
    the file's name, so there is no other."""
    stems = []
    for row in rows:
        folder, name = posixpath.split(row.image)
        stems.append(posixpath.join(folder, posixpath.splitext(name)[0].replace(".", "_")))
    return [
        row._replace(key=key, members=_texts(row))
        for row, key in zip(rows, distinct_names(stems), strict=True)
    ]


def _texts(row: Row) -> tuple[tuple[str, bytes], ...]:
    found = {"txt": row.caption, "cls": row.label}
    return tuple(
        (kind, text.encode("utf-8", "surrogateescape")) for kind, text in found.items() if text
    )


# -- WebDataset shards ----------------------------------------------------------------------------


class Sample(NamedTuple):
    """One picture to be decoded: its file's bytes, or None where they lie at ``place``."""

    place: str
    content: bytes | None
    row: Row


def samples(unit: Unit, keys: Keys, left: Tally) -> Iterator[Sample]:
    """What a unit consists of, in order.

    Args:
        left: counts what is left out of a shard.

    Raises:
        DataError: a shard that cannot be opened, or a connection that breaks.
    """
    if not unit.tar:
        for picture in unit.pictures:
            yield Sample(picture.place, None, picture.row)
        return
    path = place(unit.tar)
    with reading(path), open_place(path, once=True) as stream:
        files = _files(stream, unit.tar, left)
        for sample in group_by_keys(files, handler=_Repeated(unit.tar, left)):
            if (found := _sample(sample, unit.tar, keys, left)) is not None:
                yield found


def _files(stream: IO[bytes], name: str, left: Tally) -> Iterator[dict[str, Any]]:
    """The files of a tar stream, as webdataset's functions hand them on. A shard that ends early,
    or is damaged, ends there."""
    tail, end = _Tail(stream), 0
    try:
        with tarfile.open(fileobj=tail, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                end = member.offset_data + -(-member.size // 512) * 512 * member.isreg()
                if member.isdir():
                    continue
                key = posixpath.basename(member.name).partition(".")[0]
                file = archive.extractfile(member) if member.isreg() else None
                if not key:
                    left.add("hidden files", f"{name}/{member.name}")
                elif file is None:
                    left.add("links and other special files", f"{name}/{member.name}")
                elif len(content := file.read()) == member.size:  # tarfile lets less pass
                    yield {"fname": member.name, "data": content, "__url__": name}
        tail.check(end)
    except (tarfile.TarError, EOFError) as error:
        left.add("shards that end early or are damaged", f"{name}: {brief(error)}")


class _Tail:
    """A stream of which the last part that was read stays: tarfile takes whatever is no header for
    the archive's end."""

    _KEPT = 4 * tarfile.RECORDSIZE

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.read_so_far, self.kept = stream, 0, b""

    def read(self, size: int) -> bytes:
        """Of tarfile's."""
        found = self.stream.read(size)
        self.read_so_far += len(found)
        self.kept = (self.kept + found)[-self._KEPT :] if len(found) < self._KEPT else found
        return found

    def check(self, end: int) -> None:
        """That the archive's last member ends at byte ``end``, and nothing but zeros follow.

        Raises:
            TarError: they do not.
        """
        rest = self.kept[end - self.read_so_far + len(self.kept) :]
        if len(rest) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark")
        while rest:
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"what follows byte {end} is not read")
            rest = self.stream.read(tarfile.RECORDSIZE)


class _Repeated:
    """Told by webdataset of a file that it cannot put into a sample."""

    def __init__(self, name: str, left: Tally) -> None:
        self.name, self.left = name, left

    def __call__(self, error: Exception) -> bool:
        """Goes on after a second file of one name; anything else is the caller's."""
        if isinstance(error, ValueError):
            self.left.add("files of a name that their sample has already", self.name)
            return True
        raise error


def _sample(found: dict[str, Any], name: str, keys: Keys, left: Tally) -> Sample | None:
    key = found["__key__"]
    kinds = [kind for kind in found if not kind.startswith("__")]
    pictures = [kind for kind in kinds if f".{kind}" in suffixes()]
    if others := [kind for kind in kinds if kind not in (*_TEXTS, *pictures)]:
        left.add(
            "files that are neither picture nor text", f"{name}/{key}.{others[0]}", len(others)
        )
    if not pictures:
        left.add("samples without a picture", f"{name}/{key}")
        return None
    if pictures[1:]:
        left.add("further pictures of a sample", f"{name}/{key}.{pictures[1]}", len(pictures) - 1)
    image = f"{key}.{pictures[0]}"
    texts = {kind: found[kind] for kind in _TEXTS if kind in found}
    caption, label = _described(texts, image, keys, f"{name}/{image}", left)
    row = Row(image, key, caption, label, tuple(texts.items()))
    return Sample(f"{name}/{image}", found[pictures[0]], row)


def _described(
    texts: dict[str, bytes], image: str, keys: Keys, name: str, left: Tally
) -> tuple[str | None, str | None]:
    """The caption and the class of a sample, where it has them."""
    entry = txt = None
    try:
        if "txt" in texts:
            txt = decode(texts["txt"], name)
        if "json" in texts:
            entry = parse_json(decode(texts["json"], name))
        label = decode(texts["cls"], name).strip() if "cls" in texts else ""
    except ValueError:  # DataError is not one; neither is text
        left.add("descriptions that are not JSON", name)
        return None, None
    except DataError:
        left.add("descriptions that are not UTF-8", name)
        return None, None
    caption, _ = find_caption(txt, entry, keys.captions)
    if not label and isinstance(entry, dict) and any(entry.get(k) is not None for k in keys.labels):
        label, _ = find_label(entry, keys.labels, "")
    return caption or None, label or None
