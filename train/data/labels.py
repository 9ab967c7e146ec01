"""Pictures with a class each: which sample is which, and what class it has.

As in :mod:`.captions`, samples are counted from 0 over the whole run and every process, and sample
``g`` depends on nothing but (seed, g). The same three forms are read: a folder of pictures (that of
ImageNet, where the folder is the class, or classes in ``metadata.jsonl``), a folder of WebDataset
shards (NAME.cls, NAME.json, or the folder inside the shard), a folder that ``tokenflow tokenize``
wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.train.config import LabelConfig

from . import crops, tokens, webdataset
from .captions import Form, evenly
from .crops import Kept, Rounds, counted_rng
from .image_files import list_images, open_image, read_square, to_square, to_tensor
from .places import lexists, place, relative
from .text_files import (
    METADATA,
    DataError,
    Tally,
    decode,
    lines,
    metadata_entries,
    parse_json,
    read_text,
)


class Sample(NamedTuple):
    """A picture, as pixels [3, S, S] in [-1, 1] or as tokens [L] int64, and its class."""

    picture: Tensor
    label: int


# -- what a picture's class is --------------------------------------------------------------------


def find_label(entry: Any, keys: Sequence[str], name: str) -> tuple[str, str]:
    """The class of a picture as it is written, and why there is none.

    Args:
        entry: what is known of the picture by key; None is nothing.
        keys: the first that holds a text or a whole number counts.
        name: of the picture, from where its data begins: the first folder is its class where no key
            says it.

    Returns:
        (label, ""), or ("", what is there instead).
    """
    for key in keys:
        value = entry.get(key) if isinstance(entry, dict) else None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            return "", f"whose {key} is neither a text nor a whole number"
        if text := str(value).strip():
            return text, ""
        return "", f"with an empty {key}"
    folders = PurePosixPath(name).parts[:-1]
    if folders:
        return folders[0], ""
    return "", f"in no folder of a class, and without {' or '.join(keys)}"


def described(root: Path, keys: Sequence[str]) -> dict[Path, tuple[str, str]]:
    """:func:`find_label` of the pictures for which ``metadata.jsonl`` in ``root`` has one of the
    keys; none where it is not there.

    Raises:
        DataError: it cannot be read.
    """
    found: dict[Path, tuple[str, str]] = {}
    if not lexists(root / METADATA):
        return found
    for path, entry in metadata_entries(root, '{"file_name": ..., "label": ...}'):
        if any(entry.get(key) is not None for key in keys):
            found[path] = find_label(entry, keys, "")
    return found


class Classes:
    """The classes of a run.

    Args:
        count: how many.
        names: theirs, in order; none where they are numbers.
        numbered: whether a label may also be the number of a class that has a name.
    """

    def __init__(self, count: int, names: Sequence[str] = (), numbered: bool = False) -> None:
        self.count, self.names, self.numbered = count, tuple(names), numbered or not names
        self._places = {name: place for place, name in enumerate(self.names)}

    @classmethod
    def of(cls, labels: Iterable[str]) -> Classes:
        """Those of labels: by number where all are whole numbers, else sorted by name."""
        names = sorted(set(labels))
        if all(_is_number(name) for name in names):
            return cls(1 + max(map(int, names)))
        return cls(len(names), names)

    @classmethod
    def read(cls, file: str | Path) -> Classes:
        """Those of a file with a name a line.

        Raises:
            DataError: no such file, none in it, or a name twice.
        """
        names = [line.strip() for _, line in lines(read_text(Path(file)))]
        if not names:
            raise DataError(f"{file} names no class")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{file} names {shown(twice[0])} twice")
        return cls(len(names), names, numbered=True)

    def number(self, label: str) -> int:
        """The class of a label.

        Raises:
            DataError: none of these.
        """
        place = self._places.get(label)
        if place is None and self.numbered and _is_number(label) and int(label) < self.count:
            place = int(label)
        if place is None:
            some = ", ".join(self.names[:6]) + ", ..." * (len(self.names) > 6)
            known = f" ({some})" if some else ", which are numbers from 0"
            raise DataError(f"the class {shown(label)} is none of the {self.count}{known}")
        return place


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 10


# -- where they are -------------------------------------------------------------------------------


class Pictures:
    """A folder of pictures; those without a class are left out. The first stay decoded.

    Raises:
        DataError: no picture with a class.
    """

    def __init__(self, folder: Path, size: int, config: LabelConfig) -> None:
        self.folder, self.size, self.resize = folder, size, config.resize
        known, left = described(folder, config.label_keys), Tally(folder)
        self.paths: list[Path] = []
        self.labels: list[str] = []
        for path in sorted(list_images(folder)):
            name = relative(path, folder)
            label, why = known.get(path) or find_label(None, config.label_keys, name)
            if label:
                self.paths.append(path)
                self.labels.append(label)
            else:
                left.add(f"pictures {why}", path)
        if not self.paths:
            raise DataError(
                f"no picture below {folder} has a class ({left}): it is the name of a folder in "
                f'{folder}, or {METADATA} has {{"file_name": ..., "label": ...}} a line'
            )
        left.say(f"{len(self.paths)} pictures with classes; left out")
        self._kept = Kept(config.cache)

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, index: int) -> np.ndarray:
        """The picture as it is cropped from, uint8 [h, w, 3]."""
        found: np.ndarray | None = self._kept.get(index)
        if found is None:
            found = _resized(open_image(self.paths[index]), self.size, self.resize)
            self._kept.add(index, found, found.nbytes)
        return found

    def middle(self, index: int) -> Tensor:
        """Its middle square, [3, S, S] in [-1, 1]."""
        return read_square(self.paths[index], self.size)

    def listing(self) -> Iterator[str]:
        """Everything there is by name."""
        for path, label in zip(self.paths, self.labels, strict=True):
            yield f"{relative(path, self.folder)} {label}"


class Tokens:
    """A folder that ``tokenflow tokenize`` wrote; rows without a class are left out.

    Raises:
        DataError: unfinished, unreadable, of another tokenizer, or without classes.
    """

    def __init__(self, folder: Path, form: Form, config: LabelConfig) -> None:
        read, rows = tokens.read_rows(folder, form.scales, form.codebook_size, form.tokenizer)
        left, kept = Tally(folder), []
        self.labels: list[str] = []
        for number, row in enumerate(rows):
            name = str(row.get("image") or "")
            label, why = find_label(row, config.label_keys, name)
            if label:
                kept.append(number)
                self.labels.append(label)
            else:
                left.add(f"rows {why}", name or f"row {number}")
        if not kept:
            raise DataError(f"no row of the tokens in {folder} has a class ({left})")
        left.say(f"{len(kept)} rows with classes; left out")
        self.tokens = torch.cat(read)[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def middle(self, index: int) -> Tensor:
        """The tokens [L]."""
        return self.tokens[index].long()

    def listing(self) -> Iterator[str]:
        """Everything there is; of tokens their sum."""
        for sum_, label in zip(self.tokens.sum(1).tolist(), self.labels, strict=True):
            yield f"{sum_} {label}"


class Shards(webdataset.Shards):
    """The pictures with a class in WebDataset shards; others are left out."""

    wanted = "with a class"

    def __init__(
        self,
        source: str | Path | list[Path],
        size: int,
        joint: int,
        seed: int,
        config: LabelConfig,
    ) -> None:
        across, along = config.streams
        super().__init__(webdataset.find_shards(source), (across, along), joint, seed)
        self.size, self.resize, self.keys = size, config.resize, config.label_keys

    def select(
        self, path: Path, members: list[webdataset.Member], left: Tally
    ) -> list[webdataset.Member]:
        """The samples with a class, which stands in the place of their caption."""
        found = []
        for member in members:
            label, why = self._label(path, member)
            if label:
                found.append(member._replace(caption=label))
            else:
                left.add(f"pictures {why}", f"{path}/{member.name}")
        return found

    def _label(self, path: Path, member: webdataset.Member) -> tuple[str, str]:
        span, name = (member.json, "JSON") if member.cls is None else (member.cls, "class")
        content = None if span is None else crops.read_span(path, span)
        try:
            text = None if content is None else decode(content, f"its {name}")
            if member.cls is not None:
                label = (text or "").strip()
                return label, "" if label else "with an empty .cls"
            entry = None if text is None else parse_json(text)
        except DataError:
            return "", f"whose {name} is not UTF-8"
        except ValueError:
            return "", "whose description is not JSON"
        return find_label(entry, self.keys, member.name)

    def read(self, path: Path, number: int) -> tuple[np.ndarray, str]:
        """The picture of that number in a shard as it is cropped from, and its label.

        Raises:
            DataError: naming shard and member.
        """
        image, member = super().read(path, number), self.members(path)[number]
        return _resized(image, self.size, self.resize), member.caption


def _resized(image: Image.Image, size: int, resize: float) -> np.ndarray:
    """An image as random squares are cut from it, uint8 [h, w, 3].

    Its shorter side is ``resize`` times ``size``, by Lanczos; at 1 it is the middle square, as
    :func:`image_files.to_square` makes it.
    """
    if resize == 1:
        return np.asarray(to_square(image, size))
    scale = round(resize * size) / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(sides, Image.Resampling.LANCZOS))


# -- samples --------------------------------------------------------------------------------------


class Labelled(Dataset[Any]):
    """Sample ``g`` of a run: a picture (or its tokens) and its class.

    In a folder of pictures or tokens, every run of ``len(source)`` samples visits each once, in an
    order of its own; for shards see :class:`.webdataset.Shards`.

    Args:
        path: in one of the three forms (see the module).
        joint: samples that all processes take together for one micro-batch.
        classes: those that there are; None finds out, by ``config.classes`` or the data.
        count: how many classes there are, where that is known; 0: as many as are found.

    Raises:
        DataError: nothing there that can be read, or a class that is none of ``classes``.
    """

    def __init__(
        self,
        path: str | Path,
        form: Form,
        config: LabelConfig,
        joint: int,
        seed: int,
        classes: Classes | None = None,
        count: int = 0,
    ) -> None:
        self.config, self.seed, self.size = config, seed, form.image_size
        self.source = _open(path, form, config, joint, seed)
        self.classes = classes or self._find_classes(path, count)
        self.numbers: list[int] = []
        if not isinstance(self.source, Shards):
            self.numbers = [self.classes.number(label) for label in self.source.labels]
            self._rounds = Rounds(len(self.source), seed)

    def _find_classes(self, path: str | Path, count: int) -> Classes:
        if self.config.classes is not None:
            found = Classes.read(self.config.classes)
        elif not isinstance(self.source, Shards):
            found = Classes.of(self.source.labels)
        elif count:
            found = Classes(count)
        else:
            raise DataError(
                f"how many classes the shards in {path} have is not known before they are read: "
                "say model.classes=NUMBER where labels are numbers, or data.classes=FILE with the "
                "names, one a line"
            )
        if count and count != found.count and (found.names or count < found.count):
            raise DataError(f"model.classes is {count}, and there are {found.count}")
        return found if count in (0, found.count) else Classes(count)

    @property
    def tokenized(self) -> bool:
        """Whether samples are tokens rather than pictures."""
        return isinstance(self.source, Tokens)

    def __getitem__(self, index: int) -> Sample:
        if isinstance(self.source, Shards):
            pixels, label = self.source.at(index)
            return Sample(self._crop(pixels, index), self.classes.number(label))
        place = self._rounds[index]
        if isinstance(self.source, Tokens):
            return Sample(self.source.middle(place), self.numbers[place])
        return Sample(self._crop(self.source.pixels(place), index), self.numbers[place])

    def _crop(self, pixels: np.ndarray, index: int) -> Tensor:
        """The square of sample ``index``, maybe mirrored."""
        rng, size = counted_rng(self.seed, 0, index), self.size
        top, left = (int(rng.integers(side - size + 1)) for side in pixels.shape[:2])
        cut = pixels[top : top + size, left : left + size]
        if self.config.flip and rng.random() < 0.5:
            cut = cut[:, ::-1]
        return to_tensor(Image.fromarray(np.ascontiguousarray(cut)))

    def some(self, count: int) -> list[Sample]:
        """Up to ``count`` samples spread evenly, of pictures the middle squares. Of shards those of
        the first ones are taken."""
        source = self.source
        if not isinstance(source, Shards):
            chosen = evenly(len(source), count)
            return [Sample(source.middle(i), self.numbers[i]) for i in chosen]
        places: list[tuple[Path, int]] = []
        for path in source.paths:
            places += [(path, i) for i in range(len(source.members(path)))]
            if len(places) >= count:
                break
        found = []
        for i in evenly(len(places), count):
            pixels, label = source.read_or_another(*places[i], i)
            square = to_square(Image.fromarray(pixels), self.size)
            found.append(Sample(to_tensor(square), self.classes.number(label)))
        return found

    def describe(self) -> str:
        """How much there is, for people."""
        if isinstance(self.source, Shards):
            return f"{self.source.describe()}, {self.classes.count} classes"
        kind = "tokenized " * self.tokenized
        return f"{len(self.source)} {kind}pictures of {self.classes.count} classes"


def _open(
    path: str | Path, form: Form, config: LabelConfig, joint: int, seed: int
) -> Pictures | Tokens | Shards:
    folder = place(path)
    if not webdataset.is_shard(folder) and tokens.is_tokens(folder):
        if config.resize != 1 or config.flip:
            raise DataError(
                f"data.resize and data.flip are for pictures, and {folder} holds tokens"
            )
        return Tokens(folder, form, config)
    if shards := webdataset.find_shards(path):
        source = Shards(shards, form.image_size, joint, seed, config)
        source.beside = webdataset.beside(path)
        return source
    return Pictures(folder, form.image_size, config)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, S, S] or tokens [B, L], and classes [B] int64."""
    return torch.stack([s.picture for s in samples]), torch.tensor([s.label for s in samples])
