"""A picture as the square of pixels that understanding models read. Needs no transformers."""

from __future__ import annotations

import numpy as np
from PIL import Image

GREY = 127
"""Each channel of what a picture is padded with: int(0.5 * 255), the mean colour."""


def to_pixels(image: Image.Image, side: int, pad: bool) -> np.ndarray:
    """An RGB image as float32 [3, side, side] in [-1, 1].

    It becomes side x side with Pillow's bicubic filter on 8 bits, its aspect ratio not kept.

    Args:
        pad: first pad it to a square, in the middle of grey (offsets rounded down).
    """
    if pad and image.width != image.height:
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), (GREY,) * 3)
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        image = square
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(image, np.float32).transpose(2, 0, 1)
    return (values / 255 - 0.5) / 0.5
