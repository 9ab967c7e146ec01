"""A picture as the square of pixels that understanding models read. Needs no transformers."""

from __future__ import annotations

import numpy as np
from PIL import Image

GREY = 127
"""Each channel of what a picture is padded with: int(0.5 * 255), the mean colour."""
#: Pixels of a padded picture that are in memory at once, at most, but for one line.
_AT_ONCE = 1 << 24


def to_square(image: Image.Image, side: int, pad: bool) -> Image.Image:
    """An RGB image at ``side`` x ``side`` with Pillow's bicubic filter on 8 bits, its aspect ratio
    not kept. Its own square is itself.

    Args:
        pad: first pad it to a square, in the middle of grey (offsets rounded down).
    """
    if pad and image.width != image.height:
        return _padded(image, side)
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _padded(image: Image.Image, side: int) -> Image.Image:
    """Some rows of the padded picture at a time are made narrower, then all are made lower: that is
    how Pillow's filter goes too, but the whole of a long picture's square can be larger than the
    memory."""
    longer = max(image.size)
    left, top = (longer - image.width) // 2, (longer - image.height) // 2
    rows = max(1, _AT_ONCE // longer)
    narrow = Image.new("RGB", (side, longer), (GREY,) * 3)
    for row in range(0, image.height, rows):
        part = image.crop((0, row, image.width, min(row + rows, image.height)))
        wide = Image.new("RGB", (longer, part.height), (GREY,) * 3)
        wide.paste(part, (left, 0))
        narrow.paste(wide.resize((side, part.height), Image.Resampling.BICUBIC), (0, top + row))
    return narrow.resize((side, side), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image, side: int, pad: bool) -> np.ndarray:
    """The square of an RGB image, see :func:`to_square`, as float32 [3, side, side] in [-1, 1]."""
    values = np.asarray(to_square(image, side, pad), np.float32).transpose(2, 0, 1)
    return (values / 255 - 0.5) / 0.5
