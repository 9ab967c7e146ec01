"""Images to train on: random crops that depend on nothing but (seed, index of the sample).

Samples are counted from 0 over the whole run and every process: sample ``g`` is the same crop of
the same image whatever the number of processes, workers or accumulation steps, so the data
position of a run is one integer and a resumed run sees exactly the images it would have seen.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tokenflow_ext.train.config import DataConfig
from tokenflow_ext.train.pictures import BrokenImageError, open_image, to_tensor
from tokenflow_ext.train.reading import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# Where a large image set is not at hand, this vertical band of every photograph is held out: off
# the middle, where most photographs keep their subject, so that the held-out part shows some of it.
HELD_OUT_BAND = (0.60, 0.85)

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


def check_counts(options: Any, **least: int) -> None:
    """That numbers of a command line, where they are given, are large enough.

    Args:
        options: has them as attributes.
        least: the smallest value of each.

    Raises:
        DataError: naming the option.
    """
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not minimum <= value < math.inf:  # a NaN is not, either
            raise DataError(f"--{name.replace('_', '-')} must be {minimum} or more, got {value}")


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
        and must not find those that this picture may not use.

        Raises:
            DataError: naming the file, where it is no image that can be read.
        """
        content = None if self.span is None else read_span(self.path, self.span)
        image = open_image(self.path / self.member, content)
        regions = []
        for left, top, right, bottom in self.boxes:
            if image.height > image.width:  # bands of a portrait lie across its long side too
                left, top, right, bottom = top, left, bottom, right
            shares, sides = (left, top, right, bottom), image.size * 2
            box = tuple(round(a * b) for a, b in zip(shares, sides, strict=True))
            regions.append(image.crop(box))
        return regions


def read_span(path: Path, span: tuple[int, int]) -> bytes:
    """The bytes at (offset, size) of a file.

    Raises:
        DataError: a file that cannot be read or ends before.
    """
    offset, size = span
    try:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(content) < size:
        raise DataError(f"cannot read {path}: it ends before {offset + size} bytes")
    return content


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below ``folder``, sorted by its path.

    Raises:
        DataError: no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"no folder at {root}")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"no image ({', '.join(SUFFIXES)}) below {root}")
    return found


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
    found = {}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read data.weights={file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[Path(root) / entry["file_name"]] = checked_weight(entry["weight"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file}, line {number}: expected {{"file_name": ..., "weight": number >= 0}}, '
                f"got {line.strip()[:80]}"
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


class PictureSet:
    """Pictures in rounds, each in an order of its own. A round visits every picture once, or as
    often as its weight w says: w times on average, w rounded down or up in any one round.

    Few pictures (up to 64) are kept decoded in memory.

    Args:
        weights: of pictures by their path, 1 for those that are not named; None is 1 for all.

    Raises:
        DataError: no picture, or weights of others.
    """

    def __init__(
        self, pictures: list[Picture], seed: int, weights: dict[Path, float] | None = None
    ) -> None:
        if not pictures:
            raise DataError("no image to train on")
        self.pictures, self.seed = pictures, seed
        self.weights, self.round = None, len(pictures)
        if weights is not None:
            self.weights = np.array([weights.get(p.path, 1.0) for p in pictures])
            self.round = round(self.weights.sum())
            if not self.round:
                raise DataError("data.weights leaves no image to train on: they sum to 0")
        self._memory = [p.regions() for p in pictures] if len(pictures) <= 64 else None
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
        return self.pictures[which].regions() if self._memory is None else self._memory[which]

    def describe(self) -> str:
        weighted = "" if self.weights is None else f" ({self.round} a round by weight)"
        return f"{len(self.pictures)} images{weighted}"


class RandomCrops(Dataset):
    """Sample ``g`` of a run: a random crop of a picture, resized to ``size`` and maybe mirrored."""

    def __init__(self, source: Source, size: int, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.config, self.seed = source, size, config, seed

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
class Shard:
    """The share of one process in the samples of a run.

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

    def __init__(self, shard: Shard, position: int) -> None:
        self.shard, self.position = shard, position

    def __iter__(self) -> Iterator[list[int]]:
        position = self.position
        while True:
            for micro in range(self.shard.accumulate):
                yield self.shard.indices(position, micro)
            position += self.shard.batch


def loader(
    dataset: Dataset,
    shard: Shard,
    position: int,
    workers: int = 0,
    collate: Callable[[list], Any] | None = None,
) -> DataLoader:
    """Micro-batches of a process, from the data position on.

    Args:
        dataset: has a sample for every number from 0 on, and a ``seed``.
        collate: makes a batch of a list of samples; None stacks them.
    """
    return DataLoader(
        dataset,
        batch_sampler=_Positions(shard, position),
        num_workers=workers,
        collate_fn=collate,
        # The loader draws a seed for its workers, by default from the global generator, whose
        # state a resumed run must find as it was.
        generator=torch.Generator().manual_seed(dataset.seed),
        persistent_workers=workers > 0,
    )


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
    crops = []
    for picture in pictures[::step]:
        try:
            regions = picture.regions()
        except BrokenImageError:
            if picture.span is None:
                raise
            continue  # as in training, see train/shards.py
        for region in regions:
            for side in (min(region.size), min(region.size) * 2 / 3):
                for y in _starts(region.height, side):
                    crops += [
                        (region, (x, y, x + side, y + side)) for x in _starts(region.width, side)
                    ]
    if not crops:
        raise DataError(f"no held-out image of {pictures[0].path} can be read")
    chosen = np.unique(np.linspace(0, len(crops) - 1, min(limit, len(crops))).round().astype(int))
    return torch.stack(
        [
            to_tensor(crops[i][0].resize((size, size), Image.Resampling.BICUBIC, box=crops[i][1]))
            for i in chosen
        ]
    )


def _starts(length: int, side: float) -> np.ndarray:
    """Where squares of a side begin so that they cover a length, overlapping by half at least."""
    return np.linspace(0, length - side, int((length - side) / (side / 2) + 1e-6) + 1)
