"""Whole pictures as evaluation and analysis see them: center crops of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenflow_ext.train.data import list_images, open_image, photographs
from tokenflow_ext.train.data.image_files import to_square

Item = TypeVar("Item")
Sample = tuple[int, Tensor, bool, str]

# The built-in photographs' crops, along their shorter side, if they lay edge to edge.
_CROPS_A_SIDE = 8


class CenterCropDataset(Dataset[Sample]):
    """(number, uint8 [3, S, S], whether it was enlarged, SHA-256 of its pixels) of each image."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """The whole image."""
        return open_image(self.paths[index])

    def __getitem__(self, index: int) -> Sample:
        image = self.open(index)
        enlarged = min(image.size) < self.size
        pixels = np.array(to_square(image, self.size))
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        return index, torch.from_numpy(pixels).permute(2, 0, 1), enlarged, digest


def collate(samples: list[Sample]) -> tuple[list[int], Tensor, list[bool], list[str]]:
    """A batch of samples: lists, and the pixels stacked."""
    indices, pixels, enlarged, digests = zip(*samples, strict=True)
    return list(indices), torch.stack(pixels), list(enlarged), list(digests)


def digest_of(digests: Iterable[str]) -> str:
    """SHA-256 of images, from each one's own (hexadecimal), in order."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], the values that training sees."""
    return pixels.float().div_(127.5).sub_(1.0)


def evenly_spread(items: list[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` of the items, evenly spread: the first images of a folder of classes would
    all be of one class."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


class PhotographCrops(CenterCropDataset):
    """The built-in photographs, cut into squares of an eighth of their shorter side, each moved by
    half of that: 3,225, so that there are more of them than the small presets' codes."""

    def __init__(self, size: int, limit: int | None = None) -> None:
        crops: list[tuple[Image.Image, tuple[int, int, int, int], Path]] = []
        for path in photographs():
            image = open_image(path)
            side = min(image.size) // _CROPS_A_SIDE
            for y in range(0, image.height - side + 1, side // 2):
                for x in range(0, image.width - side + 1, side // 2):
                    name = Path(f"{path.stem} {x},{y}")
                    crops.append((image, (x, y, x + side, y + side), name))
        self.crops = evenly_spread(crops, limit)
        super().__init__([name for _, _, name in self.crops], size)

    def open(self, index: int) -> Image.Image:
        """The square, at its own size."""
        image, box, _ = self.crops[index]
        return image.crop(box)


def crops_of(folder: str | None, limit: int | None, size: int) -> CenterCropDataset:
    """Of the images below ``folder``, or of the built-in photographs; ``limit`` of them."""
    if folder is None:
        return PhotographCrops(size, limit)
    return CenterCropDataset(evenly_spread(list_images(folder), limit), size)
