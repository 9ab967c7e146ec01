"""Conversations about pictures: which there are, what a model reads of them, and what it learns.

As in :mod:`.crops`, samples are counted from 0 over the whole run and every process, and sample
``g`` depends on nothing but (seed, g) and the size of a batch.

LLaVA's form is read: a list, or a line each, of

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                    {"from": "gpt", "value": "A cat."}, ...]}

``image`` may be missing, or a list. ``weight`` says how much oftener than once a round a
conversation comes, ``kind`` of what sort the question is, and ``caption`` what the picture shows.
A folder of WebDataset shards has the
same in the ``.json`` beside each picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.understanding.chat import IMAGE, Turn, check_form, pieces
from tokenflow_ext.models.understanding.squares import to_pixels
from tokenflow_ext.train.config import ConversationConfig

from . import crops, tokens, webdataset
from .captions import Form, evenly
from .crops import Kept, counted_rng, draw_round
from .image_files import open_image
from .places import expand, is_file, place
from .text_files import DataError, Tally, decode, inside, json_lines, parse_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of what is not learned."""
_ROLES = {"human": "user", "gpt": "assistant"}
# Batches of like length are looked for among so many.
_TOGETHER = 50


class Conversation(NamedTuple):
    """What is said about pictures.

    Attributes:
        name: for messages.
        pictures: names of the pictures, in reading order.
        turns: the user's and the assistant's, with ``<image>`` where a picture stands.
        weight: how much oftener than once a round it comes.
        kind: of what sort the question is; "" where that is not said.
        caption: what the picture shows; "" where that is not said.
    """

    name: str
    pictures: tuple[str, ...]
    turns: tuple[Turn, ...]
    weight: float = 1.0
    kind: str = ""
    caption: str = ""


class Example(NamedTuple):
    """A conversation as a model reads it: ids and labels, and its pictures as pixels [3, S, S] or
    tokens [L]."""

    ids: list[int]
    labels: list[int]
    pictures: list[Tensor]


class Batch(NamedTuple):
    """Examples side by side, padded on the right.

    Attributes:
        ids: [B, T] int64.
        labels: [B, T] int64, -100 where nothing is learned.
        valid: [B, T] int64, 1 where no padding is.
        pictures: of all examples in reading order, [P, 3, S, S] or [P, L]; None where there are
            none.
    """

    ids: Tensor
    labels: Tensor
    valid: Tensor
    pictures: Tensor | None


# -- the form -------------------------------------------------------------------------------------


def parse(entry: Any, number: int, one_picture: bool = False) -> tuple[Conversation | None, str]:
    """A conversation in LLaVA's form, and why there is none.

    Args:
        number: of the entry, where it has no id.
        one_picture: it is a shard's, which has one picture and need not name it.

    Returns:
        (conversation, ""), or (None, what is there instead).
    """
    if not isinstance(entry, dict):
        return None, "that are no objects"
    name = str(entry.get("id", number))
    images = entry.get("image")
    if one_picture:
        images = [""]
    names = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) for image in names):
        return None, "whose image is no name"
    said = entry.get("conversations")
    if not isinstance(said, list) or not said:
        return None, "without a conversation"
    turns = []
    for turn in said:
        role = _ROLES.get(turn.get("from", "")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            return None, 'with a turn that is not {"from": "human" or "gpt", "value": text}'
        turns.append(Turn(role, turn["value"]))
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        return None, "whose turns do not go from human to gpt and so on"
    if any(IMAGE in turn.text for turn in turns if turn.role == "assistant"):
        return None, f"with {IMAGE} in an answer"
    if not all(turn.text.strip() for turn in turns):
        return None, "with an empty turn"
    places = sum(turn.text.count(IMAGE) for turn in turns)
    if places != len(names):
        return None, f"whose number of {IMAGE} is not that of its pictures"
    weight = entry.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 <= weight < 1e6:
        return None, "whose weight is no number of 0 or more"
    known = {key: entry.get(key, "") for key in ("kind", "caption")}
    for key, value in known.items():
        if not isinstance(value, str):
            return None, f"whose {key} is no text"
    tidy = tuple(Turn(turn.role, _in_front(turn.text)) for turn in turns)
    return Conversation(name, tuple(names), tidy, float(weight), **known), ""


def _in_front(text: str) -> str:
    """A single picture comes before what is said of it, on a line of its own, as the release has
    it; several stay where they are."""
    if text.count(IMAGE) != 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"


def entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, entry) of a JSON list, or of a file with an object a line.

    Raises:
        DataError: a file that is neither.
    """
    if path.suffix == ".jsonl":
        yield from json_lines(path, '{"image": ..., "conversations": [...]}')
        return
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} must hold a list of conversations, got {type(content).__name__}")
    yield from enumerate(content, 1)


# -- ids and labels -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Writes conversations as ids and labels.

    Args:
        text: the text tokenizer, with ``<image>`` as one id.
        form: one of :data:`.chat.FORMS`.
        visual_tokens: rows that a picture becomes.
        system: what stands before a conversation; None is the form's own.
        mask: ``answers`` (answers and their ends are learned) or ``original`` (of ChatML, as the
            released program does: the assistant's messages whole, and every ``<|im_start|>``,
            ``<|im_end|>`` and newline).

    Raises:
        ConfigError: a text tokenizer that does not say which id is which part of a text, one
            without the ids of the form, or the original's mask of another form than ChatML.
    """

    text: PreTrainedTokenizerBase
    form: str
    visual_tokens: int
    system: str | None = None
    mask: str = "answers"

    def __post_init__(self) -> None:
        check_form(self.form)
        if not self.text.is_fast:
            raise ConfigError(
                f"the text tokenizer {type(self.text).__name__} does not say which id is which "
                "part of a text: a fast one is needed"
            )
        if self.mask == "original" and self.form != "chatml":
            raise ConfigError("data.mask 'original' is of data.template 'chatml' alone")
        if self.form == "vicuna" and not self.text.eos_token:
            raise ConfigError("data.template 'vicuna' ends answers with eos: the text has none")
        known = self.text.get_added_vocab()
        wanted = [IMAGE, *(["<|im_start|>", "<|im_end|>"] if self.form == "chatml" else [])]
        for token in wanted:
            if token not in known:
                raise ConfigError(f"the text tokenizer has no id for {token}")

    def __call__(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """(ids, labels) of a conversation; every ``<image>`` becomes an id for each row."""
        parts = pieces(turns, self.form, self.text.eos_token or "", self.system)
        encoded = self.text(
            "".join(part.text for part in parts), return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        learned = self._learned(ids, encoded["offset_mapping"], parts)
        image = self.text.convert_tokens_to_ids(IMAGE)
        written: list[int] = []
        labels: list[int] = []
        for token, answer in zip(ids, learned, strict=True):
            count = self.visual_tokens if token == image else 1
            written += [token] * count
            labels += [token if answer and token != image else IGNORED] * count
        return written, labels

    def _learned(
        self, ids: list[int], offsets: list[tuple[int, int]], parts: Sequence[Any]
    ) -> list[bool]:
        original = self.mask == "original"
        spans, end = [], 0
        for part in parts:
            start, end = end, end + len(part.text)
            if part.own if original else part.answer:
                spans.append((start, end))
        everywhere: set[int] = set()
        if original:
            for mark in ("<|im_start|>", "<|im_end|>", "\n"):
                known = self.text.encode(mark, add_special_tokens=False)
                everywhere |= set(known) if len(known) == 1 else set()
        found, place = [], 0
        for token, (first, last) in zip(ids, offsets, strict=True):
            while place < len(spans) and spans[place][1] <= first:
                place += 1
            inside = place < len(spans) and spans[place][0] <= first and last > first
            found.append(inside or token in everywhere)
        return found


# -- sources --------------------------------------------------------------------------------------


class Listed:
    """The conversations of a file. Those that cannot be used are counted and named.

    Args:
        path: of the file.
        images: the folder of its pictures; None is the file's own.
        writer: writes them.
        length: ids of a conversation at most.
        size: side of the pixels.
        pad: whether pictures are padded to squares.
        known: tokens of pictures by name, in the place of the files.
        cache: MiB of pixels that are kept.
        choice: which of them are meant; None is all.

    Raises:
        DataError: no file, or no conversation in it that can be used.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None,
        writer: Writer,
        length: int,
        size: int,
        pad: bool,
        known: Mapping[str, Tensor] | None = None,
        cache: int = ConversationConfig.cache,
        choice: Choice | None = None,
    ) -> None:
        self.path, self.images = path, path.parent if images is None else images
        self.writer, self.size, self.pad, self.known = writer, size, pad, known
        self.conversations: list[Conversation] = []
        self.lengths: list[int] = []
        left = Tally(path)
        there: dict[str, bool] = {}
        for number, entry in entries(path):
            found, why = parse(entry, number)
            if found is None:
                left.add(f"conversations {why}", f"number {number}")
                continue
            missing = next((x for x in found.pictures if not self._there(x, there)), None)
            if missing is not None:
                left.add("conversations whose picture is not there", missing)
                continue
            if choice is not None and (why := choice(found)):
                left.add(f"conversations {why}", found.name)
                continue
            least, why = _room(found, writer, length)
            if why:
                left.add(f"conversations {why}", f"{found.name}: {least}" if least else found.name)
                continue
            self.conversations.append(found)
            self.lengths.append(least)
        if not self.conversations:
            raise DataError(f"no conversation in {path} can be used ({left})")
        left.say(f"{len(self.conversations)} conversations; left out")
        self._kept = Kept(cache)

    def _there(self, name: str, known: dict[str, bool]) -> bool:
        if name not in known:
            if self.known is not None:
                known[name] = name in self.known
            else:
                try:
                    known[name] = inside(self.images, name).is_file()
                except (ValueError, OSError):
                    known[name] = False
        return known[name]

    @property
    def some_without_picture(self) -> bool:
        """Whether a batch may be without a picture."""
        return not all(found.pictures for found in self.conversations)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Example:
        found = self.conversations[index]
        ids, labels = self.writer(found.turns)
        return Example(ids, labels, [self.picture(name) for name in found.pictures])

    def picture(self, name: str) -> Tensor:
        """A picture as pixels [3, S, S] or tokens [L].

        Raises:
            DataError: naming the file, where it is no picture that can be read.
        """
        if self.known is not None:
            return self.known[name].long()
        pixels = self._kept.get(name)
        if pixels is None:
            pixels = _pixels(open_image(inside(self.images, name)), self.size, self.pad)
            self._kept.add(name, pixels, pixels.nbytes)
        return pixels

    @property
    def weights(self) -> np.ndarray | None:
        """How much oftener each comes; None where all come alike."""
        found = np.array([x.weight for x in self.conversations])
        return None if (found == 1).all() else found

    def listing(self) -> Iterator[str]:
        """Everything there is by name."""
        for found in self.conversations:
            yield json.dumps([found.name, found.pictures, found.turns, found.weight])


def _pixels(image: Image.Image, size: int, pad: bool) -> Tensor:
    return torch.from_numpy(to_pixels(image, size, pad))


def _room(found: Conversation, writer: Writer, length: int) -> tuple[int, str]:
    """Its ids, or a bound for them where that fits, and why it cannot be used ("": it can)."""
    if writer.form == "plain" and len(found.turns) > 2:
        return 0, "of several turns, in the plain form"
    parts = pieces(found.turns, writer.form, writer.text.eos_token or "", writer.system)
    # No id is of less than a byte.
    said = sum(len(part.text.encode("utf-8", "surrogatepass")) for part in parts)
    bound = said + 2 + len(found.pictures) * writer.visual_tokens
    if bound <= length:
        return bound, ""
    count = len(writer(found.turns)[0])
    return count, f"of more than {length} ids" * (count > length)


class ListedShards(webdataset.Shards):
    """The conversations in a folder of WebDataset shards, one picture each. Those that cannot be
    used are counted and named."""

    wanted = "with a conversation"
    some_without_picture = False

    def __init__(
        self,
        source: str | Path | list[Path],
        writer: Writer,
        length: int,
        size: int,
        pad: bool,
        streams: tuple[int, int],
        joint: int,
        seed: int,
    ) -> None:
        super().__init__(webdataset.find_shards(source), streams, joint, seed)
        self.writer, self.length, self.size, self.pad = writer, length, size, pad

    def select(
        self, path: Path, members: list[webdataset.Member], left: Tally
    ) -> list[webdataset.Member]:
        found = []
        for member in members:
            text, why = self._text(path, member)
            if text:
                found.append(member._replace(caption=text))
            else:
                left.add(f"pictures {why}", f"{path}/{member.name}")
        return found

    def _text(self, path: Path, member: webdataset.Member) -> tuple[str, str]:
        if member.json is None:
            return "", "without a conversation"
        try:
            text = decode(crops.read_span(path, member.json), "its JSON")
            found, why = parse(parse_json(text), 0, one_picture=True)
        except (DataError, ValueError):
            return "", "whose JSON cannot be read"
        if found is None:
            return "", why
        _, why = _room(found, self.writer, self.length)
        return ("", f"with conversations {why}") if why else (text, "")

    def conversation(self, path: Path, number: int) -> Conversation:
        """What is said of the picture of that number in a shard."""
        found, _ = parse(parse_json(self.members(path)[number].caption), number, one_picture=True)
        assert found is not None  # `select` has kept it
        return found

    def read(self, path: Path, number: int) -> Example:
        image = super().read(path, number)
        ids, labels = self.writer(self.conversation(path, number).turns)
        return Example(ids, labels, [_pixels(image, self.size, self.pad)])

    def _first(self, count: int) -> list[tuple[Path, int]]:
        chosen: list[tuple[Path, int]] = []
        for path in self.paths:
            chosen += [(path, i) for i in range(len(self.members(path)))]
            if len(chosen) >= count:
                break
        return chosen[:count]

    def some(self, count: int) -> list[tuple[Conversation, Example]]:
        """Up to ``count`` of them, of the first shards."""
        return [(self.conversation(*at), self.read(*at)) for at in self._first(count)]


Source = Listed | ListedShards
Choice = Callable[[Conversation], str]
"""Why a conversation is not meant; "" where it is."""


class Conversations(Dataset[Any]):
    """Sample ``g`` of a run, as ids, labels and pictures.

    Of a file every run of ``len(source)`` samples visits each once (or as its weight says), in an
    order of its own; batches are of like length where that is asked for. For shards see
    :class:`.webdataset.Shards`.

    Args:
        source: what there is.
        joint: samples that all processes take together for one micro-batch.
    """

    def __init__(self, source: Source, group_by_length: bool, joint: int, seed: int) -> None:
        self.source, self.seed = source, seed
        self.group_by_length, self.joint = group_by_length, joint
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> Example:
        source = self.source
        if isinstance(source, ListedShards):
            return source.at(index)
        epoch, place = divmod(index, len(source))
        if self._order[0] != epoch:
            self._order = (epoch, self._round(source, epoch))
        return source[int(self._order[1][place])]

    def _round(self, source: Listed, epoch: int) -> np.ndarray:
        rng = counted_rng(self.seed, 2, epoch)
        order = draw_round(rng, len(source), source.weights, len(source))
        if not self.group_by_length:
            return order
        return by_length(order, np.array(source.lengths), self.joint, rng)

    def describe(self) -> str:
        """How much there is, for people."""
        if isinstance(self.source, ListedShards):
            return self.source.describe()
        return f"{len(self.source)} conversations"


def by_length(
    order: np.ndarray, lengths: np.ndarray, joint: int, rng: np.random.Generator
) -> np.ndarray:
    """An order whose batches of ``joint`` are of like length: each run of some batches is sorted,
    cut into batches, and these come in random order. What is left over comes last."""
    found = []
    for start in range(0, len(order), joint * _TOGETHER):
        part = order[start : start + joint * _TOGETHER]
        part = part[np.argsort(lengths[part], kind="stable")]
        whole = len(part) // joint * joint
        batches = part[:whole].reshape(-1, joint)
        found += [batches[rng.permutation(len(batches))].reshape(-1), part[whole:]]
    return np.concatenate(found)


def open_source(
    path: str | Path,
    images: str | None,
    known: str | None,
    writer: Writer,
    form: Form,
    config: ConversationConfig,
    joint: int,
    seed: int,
    choice: Choice | None = None,
) -> Source:
    """The conversations at ``path``: a file, or a folder of shards.

    Args:
        images: the folder of a file's pictures; None is its own.
        known: a folder with the pictures' tokens, in their place.
        form: what the tokenizer wants of them.
        choice: which of a file's are meant.

    Raises:
        DataError: see the classes.
    """
    if shards := _shards(path):
        if choice is not None:
            raise DataError(f"{path} holds shards, of which all are read: none can be held out")
        if images is not None or known is not None:
            raise DataError(f"{path} holds shards, which have their pictures inside")
        across, along = config.streams
        return ListedShards(
            shards, writer, config.length, form.image_size, config.pad, (across, along), joint, seed
        )
    named = None
    if known is not None:
        named = tokens.read_by_name(place(known), form.scales, form.codebook_size, form.tokenizer)
    return Listed(
        place(path),
        None if images is None else place(images),
        writer,
        config.length,
        form.image_size,
        config.pad,
        named,
        config.cache,
        choice,
    )


def _shards(path: str | Path) -> list[Path]:
    """The shards that ``path`` means; none where it is a file of conversations.

    Raises:
        DataError: neither.
    """
    if (
        len(expand(str(path))) == 1
        and is_file(file := place(path))
        and not webdataset.is_shard(file)
    ):
        return []
    try:
        shards = webdataset.find_shards(path)
    except DataError as error:
        raise DataError(f"no conversations at {path}: {error}") from error
    if not shards:
        raise DataError(f"{path} is a folder without shards: name the file of conversations")
    return shards


def texts(path: str | Path, count: int, form: str, system: str | None = None) -> list[str]:
    """What is written at ``path``, of ``count`` conversations at most, whether it can be used or
    not: of it a text tokenizer is made, before there is one to write with.

    Args:
        form, system: as of a :class:`Writer`.

    Raises:
        DataError: nothing there that can be read.
    """
    said: list[Any] = []
    shards = _shards(path)
    for shard in shards:
        for member in webdataset.read_members(shard):
            if member.json is not None and len(said) < count:
                said.append(_entry(shard, member))
    if not shards:
        said = [entry for _, (_, entry) in zip(range(count), entries(place(path)), strict=False)]
    parsed = [parse(entry, 0, bool(shards))[0] for entry in said]
    written = [
        part.text.replace(IMAGE, "")
        for found in parsed
        if found is not None and (form != "plain" or len(found.turns) == 2)
        for part in pieces(found.turns, form, "", system)
    ]
    if not written:
        raise DataError(f"no conversations at {path}")
    return written


def _entry(shard: Path, member: webdataset.Member) -> Any:
    assert member.json is not None
    try:
        return parse_json(decode(crops.read_span(shard, member.json), "its JSON"))
    except (DataError, ValueError):
        return None  # counted when the shard is opened


def some(source: Source, count: int) -> list[tuple[Conversation, Example]]:
    """Up to ``count`` conversations, spread evenly over a file or of the first shards."""
    if isinstance(source, ListedShards):
        return source.some(count)
    return [(source.conversations[i], source[i]) for i in evenly(len(source), count)]


def collate(pad_id: int, examples: Sequence[Example]) -> Batch:
    """Examples side by side.

    Args:
        pad_id: the id that fills up shorter ones.
    """
    longest = max(len(example.ids) for example in examples)

    def filled(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    pictures = [picture for example in examples for picture in example.pictures]
    return Batch(
        filled([example.ids for example in examples], pad_id),
        filled([example.labels for example in examples], IGNORED),
        filled([[1] * len(example.ids) for example in examples], 0),
        torch.stack(pictures) if pictures else None,
    )


def collating(pad_id: int) -> Callable[[list[Example]], Batch]:
    """:func:`collate` with a filling of its own."""
    return partial(collate, pad_id)
