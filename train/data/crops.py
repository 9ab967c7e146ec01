"""Images to train on: random crops that depend on nothing but (seed, index of the sample).

Samples are counted from 0 over the whole run and every process: sample ``g`` is the same crop of
the same image whatever the number of processes, workers or accumulation steps, so the data
position of a run is one integer and a resumed run sees exactly the images it would have seen.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tokenflow_ext.train.config import DataConfig

from .image_files import BrokenImageError, list_images, open_image, to_tensor
from .places import is_remote, parent, place, read_range, relative
from .text_files import DataError, Tally, inside, json_lines, reason

# Where a large image set is not at hand, this vertical band of every photograph is held out: off
# the middle, where most photographs keep their subject, so that the held-out part shows some of it.
HELD_OUT_BAND = (0.60, 0.85)
_LONGEST_ROUND = 1 << 31  # of images by weight: their order is in memory

# (name, package, file below the package, licence)
PHOTOGRAPHS = (
    ("astronaut", "skimage", "data/astronaut.png", "public domain, NASA"),
    ("chelsea", "skimage", "data/chelsea.png", "CC0, Stefan van der Walt"),
    ("coffee", "skimage", "data/coffee.png", "CC0, Rachel Michetti"),
    ("rocket", "skimage", "data/rocket.jpg", "public domain, SpaceX"),
    ("motorcycle", "skimage", "data/motorcycle_left.png", "CC0, Middlebury Stereo 2014"),
    ("hubble_deep_field", "skimage", "data/hubble_deep_field.jpg", "public domain, NASA"),
    ("camera", "skimage", "data/camera.png", "CC0, Lav Varshney"),
    ("moon", "skimage", "data/moon.png", "public domain, NASA"),
    ("retina", "skimage", "data/retina.jpg", "CC0, Mikael Häggström"),
    ("china", "sklearn", "datasets/images/china.jpg", "CC BY 2.0, danielbuechele (Flickr)"),
    ("flower", "sklearn", "datasets/images/flower.jpg", "CC BY 2.0, vultilion (Flickr)"),
)


def counted_rng(seed: int, stream: int, count: int) -> np.random.Generator:
    """The generator of draw ``count`` of a stream: it depends on nothing else.

    Streams: 0 the crop of a sample, 1 the order of pictures, 2 the order of pairs, and what stands
    in for a broken image of a shard, 3 what becomes of a caption, 4 and up the order of shards.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=count << 64))


def draw_round(
    rng: np.random.Generator, count: int, weights: np.ndarray | None, length: int
) -> np.ndarray:
    """Which of ``count`` samples a round of ``length`` visits, in random order.

    Without weights each once. With them sample i is expected length * w_i / sum(w) times, and is
    there that often rounded down or up (systematic sampling over a random order of the samples).
    """
    order = rng.permutation(count)
    if weights is None:
        return order
    edges = np.cumsum(weights[order])
    points = (np.arange(length) + rng.random()) * (edges[-1] / length)
    # A point may be rounded up to the last edge; samples of weight 0 have no width to be hit.
    which = np.searchsorted(edges, points, side="right").clip(max=np.argmax(edges))
    return rng.permutation(order[which])


class Rounds:
    """Which of ``count`` pictures a sample of a run is: every ``count`` samples visit each once, in
    an order of their own."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        if self._order[0] != epoch:
            self._order = (epoch, counted_rng(self.seed, 2, epoch).permutation(self.count))
        return int(self._order[1][place])


@dataclass(frozen=True)
class Picture:
    """An image file and the boxes of it that may be used, as shares of (width, height).

    ``span`` is (offset, size) of the image inside the file, where it is one of many in a tar file,
    and ``member`` its name there.
    """

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...] = ((0.0, 0.0, 1.0, 1.0),)
    span: tuple[int, int] | None = None
    member: str = ""

    def regions(self) -> list[Image.Image]:
        """The boxes as images of their own: a resize reads some pixels beyond the box it is given,
        and must not find those that this picture may not use. Boxes of a picture so small that no
        pixel is in them are left out.

        Raises:
            DataError: naming the file, where it is no image that can be read.
        """
        content = None if self.span is None else read_span(self.path, self.span)
        image = open_image(f"{self.path}/{self.member}" if self.member else self.path, content)
        regions = []
        for left, top, right, bottom in self.boxes:
            if image.height > image.width:  # bands of a portrait lie across its long side too
                left, top, right, bottom = top, left, bottom, right
            shares, sides = (left, top, right, bottom), image.size * 2
            x0, y0, x1, y1 = (round(a * b) for a, b in zip(shares, sides, strict=True))
            if x0 < x1 and y0 < y1:
                regions.append(image.crop((x0, y0, x1, y1)))
        return regions


class Kept:
    """Decoded pictures in memory: the first that come, as long as they fit in ``mib`` MiB."""

    def __init__(self, mib: int) -> None:
        self._left = mib << 20
        self._pictures: dict[int | str, Any] = {}

    def add(self, number: int | str, picture: Any, size: int) -> bool:
        """Whether the picture of ``size`` bytes is kept: once one is not, no other is."""
        self._left -= size
        if self._left >= 0:
            self._pictures[number] = picture
        return self._left >= 0

    def get(self, number: int | str) -> Any:
        """The picture, None where it is not kept."""
        return self._pictures.get(number)


def _memory(regions: list[Image.Image]) -> int:
    """Bytes of images as Pillow holds them."""
    return sum(4 * region.width * region.height for region in regions)


def read_span(path: Path, span: tuple[int, int]) -> bytes:
    """The bytes at (offset, size) of a file.

    Raises:
        DataError: a file that cannot be read or ends before.
    """
    offset, size = span
    if is_remote(path):
        return read_range(path, offset, size)
    try:
        with path.open("rb") as file:
            # Before anything is allocated: a header may claim any size.
            ends = os.fstat(file.fileno()).st_size
            whole = min(offset, size) >= 0 and offset + size <= ends
            content = os.pread(file.fileno(), size, offset) if whole else b""
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    if not whole or len(content) < size:
        raise DataError(f"cannot read {path}: it ends before {offset + size} bytes")
    return content


def photographs() -> list[Path]:
    """The photographs that ship inside scikit-image and scikit-learn.

    Raises:
        DataError: naming the package to install.
    """
    paths = []
    for _, package, file, _ in PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            wanted = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
            raise DataError(
                f"the built-in photographs need {wanted}: pip install {wanted}, "
                "or name a folder of images with data.path=FOLDER"
            )
        path = Path(spec.origin).parent / file
        if not path.is_file():
            raise DataError(f"{package} is installed without {path}")
        paths.append(path)
    return paths


def photograph_licences() -> str:
    """One line for each built-in photograph: name, where it comes from, licence."""
    return "\n".join(
        f"  {name:18s} {package}/{file}: {licence}" for name, package, file, licence in PHOTOGRAPHS
    )


def _by_band(paths: list[Path]) -> tuple[list[Picture], list[Picture]]:
    start, stop = HELD_OUT_BAND
    train = [Picture(p, ((0.0, 0.0, start, 1.0), (stop, 0.0, 1.0, 1.0))) for p in paths]
    return train, [Picture(p, ((start, 0.0, stop, 1.0),)) for p in paths]


def split(config: DataConfig) -> tuple[list[Picture], list[Picture]]:
    """The pictures of a folder to train on and those held out; no pixel is in both.

    From a folder of 20 images or more every twentieth is held out, from a smaller one (and from the
    built-in photographs) a band of each image, and none where ``config.held_out`` names others.
    """
    if config.path is None:
        train, held_out = _by_band(photographs())
    else:
        paths = list_images(config.path)
        if config.held_out is not None:
            train, held_out = [Picture(p) for p in paths], []
        elif len(paths) >= 20:
            train = [Picture(p) for i, p in enumerate(paths) if i % 20]
            held_out = [Picture(p) for p in paths[::20]]
        else:
            train, held_out = _by_band(paths)
    return train, held_out


def read_weights(file: str | Path, root: str | Path) -> dict[Path, float]:
    """Weights of the pictures below ``root``: {"file_name": ..., "weight": ...} a line.

    Raises:
        DataError: naming file and line.
    """
    found: dict[Path, float] = {}
    expected = '{"file_name": ..., "weight": number >= 0}'
    for number, entry in json_lines(file, expected):
        try:
            path, weight = inside(place(root), entry["file_name"]), checked_weight(entry["weight"])
            if found.setdefault(path, weight) != weight:
                raise ValueError("it has another weight already")
        except (ValueError, KeyError) as error:
            got = json.dumps(entry)[:80]
            raise DataError(
                f"{file}, line {number}: expected {expected}, got {got} ({error})"
            ) from error
    return found


def checked_weight(value: object) -> float:
    """``value`` as a weight.

    Raises:
        ValueError: no number, or one that is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a weight must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"a weight must be finite and 0 or more, got {value!r}")
    return float(value)


class Source(Protocol):
    """Where the images of :class:`RandomCrops` come from."""

    def regions(self, index: int) -> list[Image.Image]:
        """What sample ``index`` of the run may be cut from."""

    def describe(self) -> str:
        """How much there is, for people."""

    def listing(self) -> Iterator[str]:
        """Everything there is by name, wherever it lies: what processes must agree in."""


class PictureSet:
    """Pictures in rounds, each in an order of its own. A round visits every picture once, or as
    often as its weight w says: w times on average, w rounded down or up in any one round.

    The first pictures are decoded at once and kept in memory.

    Args:
        weights: of pictures by their path, 1 for those that are not named; None is 1 for all.
        cache: MiB of decoded pictures that are kept.

    Raises:
        DataError: no picture, weights of others, or one of the first pictures cannot be read.
    """

    def __init__(
        self,
        pictures: list[Picture],
        seed: int,
        weights: dict[Path, float] | None = None,
        cache: int = DataConfig.cache,
    ) -> None:
        if not pictures:
            raise DataError("no image to train on")
        self.pictures, self.seed = pictures, seed
        self.weights, self.round = None, len(pictures)
        if weights is not None:
            self.weights = np.array([weights.get(p.path, 1.0) for p in pictures])
            total = self.weights.sum()
            if total > _LONGEST_ROUND:
                raise DataError(
                    f"data.weights sum to {total:g}, and a round has as many images: make them "
                    f"smaller, they may sum to {_LONGEST_ROUND}"
                )
            self.round = round(total)
            if not self.round:
                raise DataError("data.weights leaves no image to train on: they sum to 0")
        self._kept = Kept(cache)
        for number, picture in enumerate(pictures):
            regions = picture.regions()
            if not self._kept.add(number, regions, _memory(regions)):
                break
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def which(self, index: int) -> int:
        """The number of the picture that sample ``index`` of the run is cut from."""
        epoch, place = divmod(index, self.round)
        if self._order[0] != epoch:
            rng = counted_rng(self.seed, 1, epoch)
            order = draw_round(rng, len(self.pictures), self.weights, self.round)
            self._order = (epoch, order)
        return int(self._order[1][place])

    def regions(self, index: int) -> list[Image.Image]:
        which = self.which(index)
        return self._kept.get(which) or self.pictures[which].regions()

    def describe(self) -> str:
        weighted = "" if self.weights is None else f" ({self.round} a round by weight)"
        return f"{len(self.pictures)} images{weighted}"

    def listing(self) -> Iterator[str]:
        yield from listing(self.pictures)
        if self.weights is not None:
            yield from map(repr, self.weights.tolist())


def listing(pictures: list[Picture]) -> Iterator[str]:
    """Each picture by its name, wherever the folder lies that holds them all."""
    local = [p.path.parent for p in pictures if not is_remote(p.path)]
    root = Path(os.path.commonpath(local)) if local else Path()
    for picture in pictures:
        path = picture.path
        name = str(path) if is_remote(path) else relative(path, root)
        yield f"{name} {picture.member} {picture.boxes}"


class RandomCrops(Dataset[Any]):
    """Sample ``g`` of a run: a random crop of a picture, resized to ``size`` and maybe mirrored."""

    def __init__(self, source: Source, size: int, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.config, self.seed = source, size, config, seed

    def describe(self) -> str:
        """How much there is, for people."""
        return self.source.describe()

    def __getitem__(self, index: int) -> torch.Tensor:
        """[3, size, size] in [-1, 1]."""
        regions = self.source.regions(index)
        rng, config = counted_rng(self.seed, 0, index), self.config
        areas = np.array([r.width * r.height for r in regions], dtype=np.float64)
        region = regions[rng.choice(len(regions), p=areas / areas.sum())]
        width, height = region.size
        longest = config.max_crop * min(width, height)
        shortest = min(max(config.min_crop * min(width, height), self.size), longest)
        side = np.exp(rng.uniform(np.log(shortest), np.log(longest)))
        stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(config.aspect))
        w, h = min(side * stretch, width), min(side / stretch, height)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        size = (self.size, self.size)
        crop = region.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        pixels = to_tensor(crop)
        return pixels.flip(-1) if config.flip and rng.random() < 0.5 else pixels


@dataclass(frozen=True)
class BatchPartition:
    """The part of one process in the batches of a run.

    Optimizer step t takes the samples from ``position = t * batch`` on: micro-batch m of process r
    is the (m * world + r)-th of equal consecutive parts, so that the joined batch of all processes
    and accumulation steps is the batch that one process would have taken.
    """

    batch: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world
        if self.batch % parts:
            raise DataError(
                f"optim.batch = {self.batch} cannot be dealt out evenly to {self.world} processes "
                f"x {self.accumulate} accumulation steps"
            )

    @property
    def local(self) -> int:
        """Images in one micro-batch of one process."""
        return self.batch // (self.accumulate * self.world)

    def indices(self, position: int, micro: int) -> list[int]:
        """The samples of micro-batch ``micro`` of the step that starts at ``position``."""
        start = position + (micro * self.world + self.rank) * self.local
        return list(range(start, start + self.local))


class _Positions:
    """Batch sampler: the micro-batches of a process from ``position`` on, without an end."""

    def __init__(self, partition: BatchPartition, position: int) -> None:
        self.partition, self.position = partition, position

    def __iter__(self) -> Iterator[list[int]]:
        position = self.position
        while True:
            for micro in range(self.partition.accumulate):
                yield self.partition.indices(position, micro)
            position += self.partition.batch


class Samples(Protocol):
    """Samples by their number; a dataset, with a length or without."""

    def __getitem__(self, index: int) -> Any: ...


class SeededSamples(Samples, Protocol):
    """Such that depend on a seed."""

    seed: int


def loader(
    dataset: SeededSamples,
    partition: BatchPartition,
    position: int,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Micro-batches of a process, from the data position on.

    Args:
        dataset: has a sample for every number from 0 on, and a ``seed``.
        collate: makes a batch of a list of samples; None stacks them.
    """
    return read_batches(
        dataset,
        collate or torch.stack,
        batch_sampler=_Positions(partition, position),
        num_workers=workers,
        # The loader draws a seed for its workers, by default from the global generator, whose
        # state a resumed run must find as it was.
        generator=torch.Generator().manual_seed(dataset.seed),
        persistent_workers=workers > 0,
    )


class _OrError(Dataset[Any]):
    """The samples of ``dataset``, or the DataError that came in the place of one."""

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return next((s for s in samples if isinstance(s, DataError)), None) or collate(samples)


def read_batches(
    dataset: Samples, collate: Callable[[list[Any]], Any], **options: Any
) -> Iterator[Any]:
    """What a DataLoader of ``dataset`` gives, with a DataError as it was raised: a worker's would
    come with its traceback as the message.

    Args:
        collate: makes a batch of a list of samples.
        options: the DataLoader's.
    """
    joined = functools.partial(_collate, collate)
    yield from raised(DataLoader(_OrError(dataset), collate_fn=joined, **options))


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """What a DataLoader gives, until a DataError comes in the place of a batch, or a worker ends.

    Raises:
        DataError: in both cases.
    """
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"a process that decodes images has ended ({str(error).split(') ')[-1]}): was there "
            "memory enough for so many workers?"
        ) from error


def held_out_crops(pictures: list[Picture], size: int, limit: int) -> torch.Tensor:
    """A fixed set of crops [n, 3, size, size] of the held-out boxes, n at most ``limit``.

    Squares of the box's shorter side and of two thirds of it, each moved by half a side, evenly
    thinned out to the limit.

    Raises:
        DataError: no held-out picture that can be read.
    """
    if not pictures:
        raise DataError("no held-out image")
    step = -(-len(pictures) // limit)
    crops, left = [], Tally(parent(pictures[0].path))
    # Large pictures are decoded again rather than held all at once.
    kept = Kept(DataConfig.cache)
    for number in range(0, len(pictures), step):
        picture = pictures[number]
        try:
            regions = picture.regions()
        except BrokenImageError as error:
            if picture.span is None:
                raise
            left.add("images that cannot be read", str(error))  # as in training, webdataset.py
            continue
        if not regions:
            left.add("images too small to hold a band of them out", picture.path)
        kept.add(number, regions, _memory(regions))
        for which, region in enumerate(regions):
            for side in (min(region.size), min(region.size) * 2 / 3):
                for y in _starts(region.height, side):
                    crops += [
                        (number, which, (x, y, x + side, y + side))
                        for x in _starts(region.width, side)
                    ]
    if not crops:
        raise DataError(f"no held-out image can be used: {left}")
    left.say("left out of the held-out crops")
    chosen = np.unique(np.linspace(0, len(crops) - 1, min(limit, len(crops))).round().astype(int))
    shown, last, regions = [], -1, []
    for i in chosen:
        number, which, box = crops[i]
        if number != last:
            last, regions = number, kept.get(number) or pictures[number].regions()
        square = regions[which].resize((size, size), Image.Resampling.BICUBIC, box=box)
        shown.append(to_tensor(square))
    return torch.stack(shown)


def _starts(length: int, side: float) -> np.ndarray:
    """Where squares of a side begin so that they cover a length, overlapping by half at least."""
    return np.linspace(0, length - side, int((length - side) / (side / 2) + 1e-6) + 1)
