"""Picture files: reading them as RGB, and the square of one that a tokenizer takes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.train.reading import DataError

# A longer picture is cut to its middle first: enlarging a line of pixels would fill the memory.
_LONGEST = 16

#: What :func:`open_image` and :func:`to_square` do, with the size to be filled in.
PREPROCESSING = (
    "EXIF orientation applied, transparency over white, RGB; of a picture more than "
    f"{_LONGEST} times as long as wide the middle {_LONGEST} : 1; while the shorter side is twice "
    "{size} px or more, both sides are halved (rounded down) with Pillow's box filter; then the "
    "shorter side becomes {size} px and the longer one in proportion (rounded) with Pillow's "
    "bicubic filter, a = -0.5, antialiased (its support grows with the reduction); then the middle "
    "{size} x {size} px, the corner rounded down."
)


class BrokenImageError(DataError):
    """Bytes that are there but are no image that can be decoded."""


def open_image(path: Path, content: bytes | None = None) -> Image.Image:
    """The image file as RGB, its orientation tag applied, transparent parts over white.

    Args:
        content: the file's bytes where they are known already; ``path`` then only names them.

    Raises:
        BrokenImageError: naming the file, where it is no image that can be read.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"cannot read the image {path}: {error}") from error


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB image at ``size`` pixels: see ``PREPROCESSING``.

    The released code's evaluation does the same. Every command that takes whole pictures does it,
    so that their figures compare; training crops otherwise, see data.py.
    """
    longest = _LONGEST * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_square(path: Path, size: int) -> torch.Tensor:
    """The middle square of an image file: [3, size, size] in [-1, 1].

    Raises:
        BrokenImageError: naming the file.
    """
    return to_tensor(to_square(open_image(path), size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image to float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3] (127.5 x + 128, clamped, truncated)."""
    return to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()
