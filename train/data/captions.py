"""Pictures with captions: which sample is which, and what becomes of its caption.

As in :mod:`.crops`, samples are counted from 0 over the whole run and every
process, and sample ``g`` depends on nothing but (seed, g): the data position of a run is one
integer, and the joined batch of several processes is the batch of one.

Three forms are read: a folder of pictures (captions in ``metadata.jsonl`` or in NAME.txt beside
NAME.png), a folder of WebDataset shards (``*.tar``), a folder that ``tokenflow tokenize`` wrote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenflow_ext.train.config import CaptionConfig

from . import crops, tokens, webdataset
from .crops import Kept, Rounds, counted_rng
from .image_files import find_images, list_images, read_square, to_square, to_tensor
from .places import exists, is_file, is_remote, lexists, place, relative, remote_files
from .text_files import (
    METADATA,
    DataError,
    Tally,
    decode,
    metadata_entries,
    parse_json,
    read_json,
    read_text,
    say,
)

_SENTENCE = re.compile(r"[.!?]+[\"')\]]*(?=\s)|[\u3002\uff01\uff1f]")


class Sample(NamedTuple):
    """A picture, as pixels [3, S, S] in [-1, 1] or as tokens [L] int64, and its caption."""

    picture: Tensor
    caption: str


def first_sentence(caption: str) -> str:
    """``caption`` up to the first full stop, ``!`` or ``?`` before white space."""
    end = _SENTENCE.search(caption)
    return caption[: end.end()] if end else caption


def vary(caption: str, config: CaptionConfig, seed: int, index: int) -> str:
    """The caption as sample ``index`` trains on it (arXiv 2412.03069, section 4.1).

    Replaced by the empty string with probability ``config.drop``, so that the model can be run
    without a text for guidance; else cut to the first sentence with ``config.truncate``.
    """
    dropped, cut = counted_rng(seed, 3, index).random(2)
    if dropped < config.drop:
        return ""
    return first_sentence(caption) if cut < config.truncate else caption


def _text(caption: str) -> str:
    """A caption without white space around it; "" where nothing of it can be seen."""
    caption = caption.strip().strip("\ufeff").strip()
    return caption if any(c.isprintable() and c != " " for c in caption) else ""


def find_caption(txt: str | None, entry: Any, keys: Sequence[str]) -> tuple[str, str]:
    """The caption of a picture, and why there is none.

    Args:
        txt: what NAME.txt holds: its first line is the caption, unless it is empty.
        entry: what NAME.json or a line of ``metadata.jsonl`` holds: the first of ``keys`` with a
            text is the caption. None where there is neither.
        keys: in the order in which they count.

    Returns:
        (caption, ""), or ("", what is there instead).
    """
    if txt is not None and (caption := _text(_text(txt).split("\n")[0])):
        return caption, ""
    if entry is None:
        return "", "without a caption" if txt is None else "with an empty caption"
    if not isinstance(entry, dict):
        return "", f"whose JSON is no object but {_kind(entry)}"
    found = [key for key in keys if key in entry]
    for key in found:
        if isinstance(entry[key], str) and (caption := _text(entry[key])):
            if any("\ud800" <= c <= "\udfff" for c in caption):
                return "", "with half a surrogate pair in the caption"
            return caption, ""
    for key in found:
        if entry[key] is not None and not isinstance(entry[key], str):
            return "", f"whose {key} is no text but {_kind(entry[key])}"
    return "", "with an empty caption" if found else f"without the key {' or '.join(keys)}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", str: "a text"}
    return kinds.get(type(value), "a number")


def _keys_found(counts: Counter[str]) -> str:
    """The keys that descriptions have, for a message."""
    names = ", ".join(key for key, _ in counts.most_common(12))
    return f"; their JSON has the keys {names}: say which with data.caption_keys=[KEY]" * bool(
        names
    )


def _beside(
    path: Path, keys: Sequence[str], seen: Counter[str], there: Callable[[Path], bool]
) -> tuple[str, str]:
    """:func:`find_caption` of NAME.txt and, where that gives none, NAME.json beside a picture."""
    text, listing = path.with_suffix(".txt"), path.with_suffix(".json")
    txt = read_text(text) if there(text) else None
    if (txt is not None and _text(txt)) or not there(listing):
        return find_caption(txt, None, keys)
    entry = read_json(listing)
    seen.update(list(entry) if isinstance(entry, dict) else [])
    return find_caption(txt, entry, keys)


def _described(root: Path, keys: Sequence[str], seen: Counter[str]) -> dict[Path, tuple[str, str]]:
    """Every picture below ``root`` with :func:`find_caption` of it.

    Args:
        seen: counts the keys of JSON objects.
    """
    file = root / METADATA
    if not lexists(file):
        there = set(remote_files(root)).__contains__ if is_remote(root) else is_file
        return {path: _beside(path, keys, seen, there) for path in list_images(root)}
    found: dict[Path, tuple[str, str]] = {}
    left = Tally(file)
    for path, entry in metadata_entries(root, '{"file_name": ..., "text": ...}'):
        if path in found:
            left.add("lines replaced by a later one of the same picture", path)
        seen.update(key for key in entry if key != "file_name")
        found[path] = find_caption(None, entry, keys)
    if not found:
        raise DataError(f"{file} names no picture")
    images, _ = find_images(root)
    if others := [path for path in images if path not in found]:
        left.add("images that it does not name", others[0], len(others))
    left.say(f"{len(found)} pictures; left out")
    return found


def list_captions(
    folder: str | Path, keys: Sequence[str] = CaptionConfig.caption_keys
) -> dict[Path, str | None]:
    """Every picture below ``folder``, by its path, with its caption where it has one.

    A ``metadata.jsonl`` ({"file_name": ..., "text": ...} a line) names pictures beside or below it;
    where it is in ``folder`` itself, it alone decides which pictures there are.

    Args:
        keys: of a caption in JSON; the first that holds a text counts.

    Raises:
        DataError: no folder, no picture, or a description that cannot be read.
    """
    seen: Counter[str] = Counter()
    without = Tally(folder)
    described = _described(place(folder), keys, seen)
    for path, (caption, why) in described.items():
        if not caption:
            without.add(f"pictures {why}", path)
    if seen or without.total < len(described):  # else nobody meant to have captions
        without.say(f"{len(described) - without.total} pictures with captions, but")
    return {path: caption or None for path, (caption, _) in described.items()}


@dataclass(frozen=True)
class Choice:
    """Which pairs of a folder are meant, by their captions: those that ``match`` matches, and
    ``unseen`` does not or, with ``held_out``, does; then ``limit`` of them, evenly (0: all)."""

    match: str = ""
    unseen: str = ""
    limit: int = 0
    held_out: bool = False

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """Places of the captions that are meant.

        Raises:
            DataError: none is.
        """
        match, unseen = re.compile(self.match or ".*"), re.compile(self.unseen or r"\A(?!)")
        found = [
            place
            for place, caption in enumerate(captions)
            if match.fullmatch(caption) and bool(unseen.fullmatch(caption)) == self.held_out
        ]
        if captions and not found:
            raise DataError(
                f"data.match={self.match!r} and data.unseen={self.unseen!r} leave none of "
                f"{len(captions)} captions to {'hold out' if self.held_out else 'train with'}"
            )
        return [found[i] for i in evenly(len(found), self.limit)]


_ALL = Choice()


class Pictures:
    """A folder of pictures; those without a caption are left out. The first stay decoded.

    Args:
        keys: of a caption in JSON.
        cache: MiB of decoded pictures that are kept.

    Raises:
        DataError: no picture with a caption, or a description that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        choice: Choice = _ALL,
        keys: Sequence[str] = CaptionConfig.caption_keys,
        cache: int = CaptionConfig.cache,
    ) -> None:
        self.folder, self.size = folder, size
        pairs, left = [], Tally(folder)
        seen: Counter[str] = Counter()
        for path, (caption, why) in sorted(_described(folder, keys, seen).items()):
            if not caption:
                left.add(f"pictures {why}", path)
            elif not exists(path):
                left.add("pictures that are named but not there", path)
            else:
                pairs.append((path, caption))
        if not pairs:
            raise DataError(
                f"no picture below {folder} has a caption ({left}): NAME.txt beside NAME.png, or "
                f'{METADATA} with {{"file_name": ..., "text": ...}} a line{_keys_found(seen)}'
            )
        left.say(f"{len(pairs)} pictures with captions; left out")
        self.pairs = [pairs[i] for i in choice([caption for _, caption in pairs])]
        self._kept = Kept(cache)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        path, caption = self.pairs[index]
        picture = self._kept.get(index)
        if picture is None:
            picture = read_square(path, self.size)
            self._kept.add(index, picture, picture.nbytes)
        return Sample(picture, caption)

    def captions_up_to(self, count: int) -> list[str]:
        """The captions, ``count`` of them at most."""
        return [caption for _, caption in self.pairs[:count]]

    def listing(self) -> Iterator[str]:
        """Everything there is by name."""
        for path, caption in self.pairs:
            yield f"{relative(path, self.folder)} {caption}"


class Tokens:
    """A folder that ``tokenflow tokenize`` wrote; rows without a caption are left out.

    Args:
        scales: (rows, columns) of each scale that the tokenizer at hand has.
        tokenizer: gives its :func:`tokens.fingerprint`; None trusts that the tokens are its own.

    Raises:
        DataError: unfinished, unreadable, or tokens of another tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        scales: list[tuple[int, int]],
        codebook_size: int,
        choice: Choice = _ALL,
        tokenizer: Callable[[], str] | None = None,
    ) -> None:
        read, stored = tokens.read(folder, scales, codebook_size, tokenizer)
        captions = [_text(caption or "") for caption in stored]
        described = [i for i, caption in enumerate(captions) if caption]
        if not described:
            raise DataError(f"no row of the tokens in {folder} has a caption")
        if without := len(captions) - len(described):
            say(f"{folder}: {len(described)} rows with captions; left out: {without} without")
        chosen = [described[i] for i in choice([captions[i] for i in described])]
        self.tokens, self.captions = torch.cat(read)[chosen], [captions[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.tokens[index].long(), self.captions[index])

    def captions_up_to(self, count: int) -> list[str]:
        """The captions, ``count`` of them at most."""
        return self.captions[:count]

    def listing(self) -> Iterator[str]:
        """Everything there is; of tokens their sum."""
        for sum_, caption in zip(self.tokens.sum(1).tolist(), self.captions, strict=True):
            yield f"{sum_} {caption}"


class Shards(webdataset.Shards):
    """The pairs in WebDataset shards: pictures with a caption in ``.txt`` or ``.json``.

    Others are left out, those whose description cannot be read too.

    Args:
        keys: of a caption in JSON.
    """

    wanted = "with a caption"

    def __init__(
        self,
        source: str | Path | list[Path],
        size: int,
        streams: tuple[int, int],
        joint: int,
        seed: int,
        keys: Sequence[str] = CaptionConfig.caption_keys,
    ) -> None:
        super().__init__(webdataset.find_shards(source), streams, joint, seed)
        self.size, self.keys = size, keys
        self._seen: Counter[str] = Counter()  # keys of descriptions without a caption

    def hint(self) -> str:
        return _keys_found(self._seen)

    def select(
        self, path: Path, members: list[webdataset.Member], left: Tally
    ) -> list[webdataset.Member]:
        """The samples with a caption, which they are given."""
        found = []
        for member in members:
            caption, why = self._caption(path, member)
            if caption:
                found.append(member._replace(caption=caption))
            else:
                left.add(f"pictures {why}", f"{path}/{member.name}")
        return found

    def _caption(self, path: Path, member: webdataset.Member) -> tuple[str, str]:
        written = None if member.txt is None else crops.read_span(path, member.txt)
        listing = None if member.json is None else crops.read_span(path, member.json)
        entry = None
        try:
            txt = None if written is None else decode(written, "its text")
            if listing is not None and not (txt and _text(txt)):
                entry = parse_json(decode(listing, "its JSON"))
        except DataError:
            return "", "whose description is not UTF-8"
        except ValueError:
            return "", "whose description is not JSON"
        found = find_caption(txt, entry, self.keys)
        if not found[0] and isinstance(entry, dict):
            self._seen.update(list(entry))
        return found

    def read(self, path: Path, number: int) -> Sample:
        """The pair of that number in a shard.

        Raises:
            DataError: naming shard and member.
        """
        image, member = super().read(path, number), self.members(path)[number]
        return Sample(to_tensor(to_square(image, self.size)), member.caption)

    def captions_up_to(self, count: int) -> list[str]:
        """The captions of the first shards, ``count`` of them at most."""
        found: list[str] = []
        for path in self.paths:
            found += [member.caption for member in self.members(path)[: count - len(found)]]
            if len(found) == count:
                break
        return found

    def some(self, count: int) -> list[Sample]:
        """Up to ``count`` samples, evenly over the first shards."""
        chosen: list[tuple[Path, int]] = []
        for path in self.paths:
            chosen += [(path, i) for i in range(len(self.members(path)))]
            if len(chosen) >= count:
                break
        return [self.read_or_another(*chosen[i], i) for i in evenly(len(chosen), count)]


def evenly(total: int, count: int) -> list[int]:
    """``count`` of ``range(total)`` (0: all), evenly."""
    count = min(total, count or total)
    return [i * total // count for i in range(count)]


@dataclass(frozen=True)
class Form:
    """What the tokenizer wants of pictures and tokens; ``tokenizer`` gives its fingerprint, with
    which tokens of another one are refused (:func:`tokens.fingerprint`)."""

    image_size: int
    scales: list[tuple[int, int]]
    codebook_size: int
    tokenizer: Callable[[], str] | None = None


class Captioned(Dataset[Any]):
    """Sample ``g`` of a run: a picture (or its tokens) and its caption, dropped or cut by chance.

    In a folder of pictures or tokens, every run of ``len(source)`` samples visits each once, in an
    order of its own; for shards see :class:`Shards`.

    Args:
        path: in one of the three forms (see the module).
        joint: samples that all processes take together for one micro-batch.

    Raises:
        DataError: nothing there that can be read.
    """

    def __init__(
        self, path: str | Path, form: Form, config: CaptionConfig, joint: int, seed: int
    ) -> None:
        self.config, self.seed = config, seed
        self.source = open_source(path, form, config, joint, seed)
        if not isinstance(self.source, Shards):
            self._rounds = Rounds(len(self.source), seed)

    @property
    def tokenized(self) -> bool:
        """Whether samples are tokens rather than pictures."""
        return isinstance(self.source, Tokens)

    def original(self, index: int) -> Sample:
        """Sample ``index`` with its caption as it is."""
        if isinstance(self.source, Shards):
            return self.source.at(index)
        return self.source[self._rounds[index]]

    def __getitem__(self, index: int) -> Sample:
        picture, caption = self.original(index)
        return Sample(picture, vary(caption, self.config, self.seed, index))

    def describe(self) -> str:
        """How much there is, for people."""
        if isinstance(self.source, Shards):
            return self.source.describe()
        return f"{len(self.source)} {'tokenized ' * self.tokenized}pictures with captions"


def open_source(
    path: str | Path,
    form: Form,
    config: CaptionConfig,
    joint: int,
    seed: int,
    choice: Choice | None = None,
) -> Pictures | Tokens | Shards:
    """The pictures, tokens or shards in the folder ``path``.

    Args:
        choice: which of the pairs; those to train with by default.

    Raises:
        DataError: see the classes.
    """
    if choice is None:
        choice = Choice(config.match, config.unseen, config.limit)
    folder = place(path)
    if not webdataset.is_shard(folder) and tokens.is_tokens(folder):
        return Tokens(folder, form.scales, form.codebook_size, choice, form.tokenizer)
    if shards := webdataset.find_shards(path):
        if choice != _ALL:
            raise DataError(f"data.match, unseen and limit are not for shards, which {path} holds")
        across, along = config.streams
        source = Shards(shards, form.image_size, (across, along), joint, seed, config.caption_keys)
        source.beside = webdataset.beside(path)
        return source
    return Pictures(folder, form.image_size, choice, config.caption_keys, config.cache)


def some(source: Pictures | Tokens | Shards, count: int) -> list[Sample]:
    """Up to ``count`` samples spread evenly over a source, captions as they are."""
    if isinstance(source, Shards):
        return source.some(count)
    return [source[i] for i in evenly(len(source), count)]


def collate(samples: list[Sample]) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, S, S] or tokens [B, L], and captions."""
    return torch.stack([s.picture for s in samples]), [s.caption for s in samples]
