"""Images to train on: random crops that depend on nothing but (seed, index of the sample).

Samples are counted from 0 over the whole run and every process: sample ``g`` is the same crop of
the same image whatever the number of processes, workers or accumulation steps, so the data
position of a run is one integer and a resumed run sees exactly the images it would have seen.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.train.config import DataConfig

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


class DataError(RuntimeError):
    """Images that are missing, unreadable or too few."""


@dataclass(frozen=True)
class Picture:
    """An image file and the boxes of it that may be used, as shares of (width, height)."""

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...] = ((0.0, 0.0, 1.0, 1.0),)

    def regions(self) -> list[Image.Image]:
        """The boxes as images of their own: a resize reads some pixels beyond the box it is given,
        and must not find those that this picture may not use.

        Raises:
            DataError: naming the file, where it is no image that can be read.
        """
        image = open_image(self.path)
        regions = []
        for left, top, right, bottom in self.boxes:
            if image.height > image.width:  # bands of a portrait lie across its long side too
                left, top, right, bottom = top, left, bottom, right
            shares, sides = (left, top, right, bottom), image.size * 2
            box = tuple(round(a * b) for a, b in zip(shares, sides, strict=True))
            regions.append(image.crop(box))
        return regions


def open_image(path: Path, content: bytes | None = None) -> Image.Image:
    """The image file as RGB, its orientation tag applied, transparent parts over white.

    Args:
        content: the file's bytes where they are known already; ``path`` then only names them.

    Raises:
        DataError: naming the file, where it is no image that can be read.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def to_square(image: Image.Image, size: int) -> torch.Tensor:
    """The image's middle square, resized: [3, size, size] in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


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
    """The pictures to train on and those held out; no pixel is in both.

    From a folder of 20 images or more every twentieth is held out, from a smaller one (and from the
    built-in photographs) a band of each image.
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
    if config.held_out is not None:
        held_out = [Picture(p) for p in list_images(config.held_out)]
    return train, held_out


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image to float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3] (127.5 x + 128, clamped, truncated)."""
    return to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()


class RandomCrops(Dataset):
    """Sample ``g`` of a run: a random crop of a picture, resized to ``size`` and maybe mirrored.

    Every run of ``len(pictures)`` samples visits every picture once, in an order of its own.
    Few pictures (up to 64) are kept decoded in memory.
    """

    def __init__(self, pictures: list[Picture], size: int, config: DataConfig, seed: int) -> None:
        if not pictures:
            raise DataError("no image to train on")
        self.pictures, self.size, self.config, self.seed = pictures, size, config, seed
        self._memory = [p.regions() for p in pictures] if len(pictures) <= 64 else None
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def _rng(self, stream: int, count: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream], counter=count << 64))

    def _which(self, index: int) -> int:
        epoch, place = divmod(index, len(self.pictures))
        if self._order[0] != epoch:
            self._order = (epoch, self._rng(1, epoch).permutation(len(self.pictures)))
        return int(self._order[1][place])

    def __getitem__(self, index: int) -> torch.Tensor:
        """[3, size, size] in [-1, 1]."""
        which = self._which(index)
        regions = self.pictures[which].regions() if self._memory is None else self._memory[which]
        rng, config = self._rng(0, index), self.config
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
        DataError: no held-out picture.
    """
    if not pictures:
        raise DataError("no held-out image")
    step = -(-len(pictures) // limit)
    crops = []
    for picture in pictures[::step]:
        for region in picture.regions():
            for side in (min(region.size), min(region.size) * 2 / 3):
                for y in _starts(region.height, side):
                    crops += [
                        (region, (x, y, x + side, y + side)) for x in _starts(region.width, side)
                    ]
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
