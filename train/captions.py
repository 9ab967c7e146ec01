"""Pictures with captions: which sample is which, and what becomes of its caption.

As in :mod:`tokenflow_ext.train.data`, samples are counted from 0 over the whole run and every
process, and sample ``g`` depends on nothing but (seed, g): the data position of a run is one
integer, and the joined batch of several processes is the batch of one.

Three forms are read: a folder of pictures (captions in ``metadata.jsonl`` or in NAME.txt beside
NAME.png), a folder of WebDataset shards (``*.tar``), a folder that ``tokenflow tokenize`` wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenflow_ext.train import data, shards, tokens
from tokenflow_ext.train.config import CaptionConfig
from tokenflow_ext.train.data import DataError, counted_rng
from tokenflow_ext.train.pictures import read_square, to_square, to_tensor

METADATA = "metadata.jsonl"
_MEMORY = 256 << 20  # bytes of decoded pictures that are kept
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


def read_caption(path: Path) -> str | None:
    """The first line of NAME.txt beside the image, where there is one."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    return _first_line(text.read_text(encoding="utf-8", errors="replace"))


def _first_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else None


def _caption_of(entry: Any) -> str | None:
    """The caption in a JSON object: its "caption" or "text"."""
    if not isinstance(entry, dict):
        return None
    for key in ("caption", "text"):
        if isinstance(entry.get(key), str) and entry[key].strip():
            return entry[key].strip()
    return None


def list_captions(folder: str | Path) -> dict[Path, str | None]:
    """Every picture below ``folder``, by its path, with its caption where it has one.

    A ``metadata.jsonl`` ({"file_name": ..., "text": ...} a line) names pictures beside or below it;
    where it is in ``folder`` itself, it alone decides which pictures there are.

    Raises:
        DataError: no folder, no picture, or a line that cannot be read.
    """
    root = Path(folder)
    file = root / METADATA
    if not file.is_file():
        return {path: read_caption(path) for path in data.list_images(root)}
    found: dict[Path, str | None] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = root / entry["file_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}'
            ) from error
        found[path] = _caption_of(entry)
    if not found:
        raise DataError(f"{file} names no picture")
    return found


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
        return [found[i] for i in _evenly(len(found), self.limit)]


_ALL = Choice()


class Pictures:
    """A folder of pictures; those without a caption are left out. Few pictures stay decoded."""

    def __init__(self, folder: Path, size: int, choice: Choice = _ALL) -> None:
        self.folder, self.size = folder, size
        pairs = [(p, c) for p, c in sorted(list_captions(folder).items()) if c]
        if not pairs:
            raise DataError(
                f"no picture below {folder} has a caption: NAME.txt beside NAME.png, or "
                f'{METADATA} with {{"file_name": ..., "text": ...}} a line'
            )
        self.pairs = [pairs[i] for i in choice([caption for _, caption in pairs])]
        keep = len(self.pairs) * 3 * size * size * 4 <= _MEMORY
        self._memory: dict[int, Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        path, caption = self.pairs[index]
        picture = None if self._memory is None else self._memory.get(index)
        if picture is None:
            picture = read_square(path, self.size)
            if self._memory is not None:
                self._memory[index] = picture
        return Sample(picture, caption)

    def captions_up_to(self, count: int) -> list[str]:
        """The captions, ``count`` of them at most."""
        return [caption for _, caption in self.pairs[:count]]


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
        read, captions = tokens.read(folder, scales, codebook_size, tokenizer)
        described = [i for i, caption in enumerate(captions) if caption]
        if not described:
            raise DataError(f"no row of the tokens in {folder} has a caption")
        chosen = [described[i] for i in choice([captions[i] for i in described])]
        self.tokens, self.captions = torch.cat(read)[chosen], [captions[i] for i in chosen]
        self.left_out = len(captions) - len(described)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.tokens[index].long(), self.captions[index])

    def captions_up_to(self, count: int) -> list[str]:
        """The captions, ``count`` of them at most."""
        return self.captions[:count]


class Shards(shards.Shards):
    """The pairs in a folder of WebDataset shards: pictures with ``.txt`` or ``.json``."""

    def __init__(
        self, folder: Path, size: int, streams: tuple[int, int], joint: int, seed: int
    ) -> None:
        super().__init__(shards.list_shards(folder), streams, joint, seed, described=True)
        self.size = size

    def read(self, path: Path, number: int) -> Sample:
        """The pair of that number in a shard.

        Raises:
            DataError: naming shard and member.
        """
        image, member = super().read(path, number), self.members(path)[number]
        return Sample(to_tensor(to_square(image, self.size)), _caption(path, member))

    def captions_up_to(self, count: int) -> list[str]:
        """The captions of the first shards, ``count`` of them at most."""
        found: list[str] = []
        for path in self.paths:
            found += [_caption(path, m) for m in self.members(path)[: count - len(found)]]
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
        return [self.read(*chosen[i]) for i in _evenly(len(chosen), count)]


def _caption(path: Path, member: shards.Member) -> str:
    """The caption in a member's ``.txt``, else in its ``.json``.

    Raises:
        DataError: naming shard and member.
    """
    if member.txt is not None:
        text = data.read_span(path, member.txt).decode("utf-8", errors="replace")
        return _first_line(text) or ""
    try:
        return _caption_of(json.loads(data.read_span(path, member.json))) or ""
    except ValueError as error:
        raise DataError(f"the caption of {path / member.name} is not JSON: {error}") from error


def _evenly(total: int, count: int) -> list[int]:
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


class Captioned(Dataset):
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
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def tokenized(self) -> bool:
        """Whether samples are tokens rather than pictures."""
        return isinstance(self.source, Tokens)

    def original(self, index: int) -> Sample:
        """Sample ``index`` with its caption as it is."""
        if isinstance(self.source, Shards):
            return self.source.at(index)
        epoch, place = divmod(index, len(self.source))
        if self._order[0] != epoch:
            self._order = (epoch, counted_rng(self.seed, 2, epoch).permutation(len(self.source)))
        return self.source[int(self._order[1][place])]

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
    folder = Path(path)
    if choice is None:
        choice = Choice(config.match, config.unseen, config.limit)
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    if tokens.is_tokens(folder):
        return Tokens(folder, form.scales, form.codebook_size, choice, form.tokenizer)
    if shards.list_shards(folder):
        if choice != _ALL:
            raise DataError(
                f"data.match, unseen and limit are not for shards, which {folder} holds"
            )
        across, along = config.streams
        return Shards(folder, form.image_size, (across, along), joint, seed)
    return Pictures(folder, form.image_size, choice)


def some(source: Pictures | Tokens | Shards, count: int) -> list[Sample]:
    """Up to ``count`` samples spread evenly over a source, captions as they are."""
    if isinstance(source, Shards):
        return source.some(count)
    return [source[i] for i in _evenly(len(source), count)]


def collate(samples: list[Sample]) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, S, S] or tokens [B, L], and captions."""
    return torch.stack([s.picture for s in samples]), [s.caption for s in samples]
