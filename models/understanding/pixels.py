"""Pictures to the pixels of the released understanding models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from tokenflow_ext.models.registration import register
from tokenflow_ext.models.serialization.config import need
from tokenflow_ext.models.serialization.files import shown

from .squares import to_pixels, to_square


class TokenFlowImageProcessor(BaseImageProcessor):
    """Pictures to tensors [B, 3, S, S] in [-1, 1].

    The picture becomes S x S with Pillow's bicubic filter on 8 bits, its aspect ratio not kept, and
    then 2 x / 255 - 1. With ``do_pad`` it is first padded to a square, in the middle of grey 127
    (offsets rounded down): so were instruction tuning and evaluation of the released models, while
    their alignment stage did not pad.

    Args:
        size: {"height": S, "width": S}, or S.
        do_pad: whether to pad to a square.
        options: of transformers' image processors.

    Raises:
        ConfigError: a size that is no square.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self, size: int | dict[str, int] | None = None, do_pad: bool = True, **options: Any
    ) -> None:
        options.pop("crop_size", None)  # of a saved one: the same as the size
        super().__init__(**options)
        self.size = _square(224 if size is None else size)
        self.crop_size = dict(self.size)  # where transformers looks when it counts placeholders
        self.do_pad = do_pad

    def square(self, image: Image.Image) -> Image.Image:
        """What a model reads of a picture, in 8 bits: RGB, S x S. Its pixels are the picture's."""
        return to_square(_as_rgb(image), self.size["height"], self.do_pad)

    def preprocess(
        self,
        images: Any,
        do_pad: bool | None = None,
        size: int | dict[str, int] | None = None,
        return_tensors: str | None = None,
        device: Any = None,
    ) -> BatchFeature:
        """Pixels of one picture or of several.

        Args:
            images: a PIL image, an array or a tensor [3, H, W] or [H, W, 3] (uint8, or floating
                point within [0, 1]), several of these in one [B, ...], or lists of them.
            do_pad: in the place of the processor's own.
            size: in the place of the processor's own.
            return_tensors: as anywhere in transformers; without it a list of arrays.
            device: of the tensors.

        Returns:
            ``pixel_values`` [B, 3, S, S] float32.

        Raises:
            ValueError: no picture that can be read.
        """
        side = (self.size if size is None else _square(size))["height"]
        pad = self.do_pad if do_pad is None else do_pad
        pixels = [to_pixels(_as_rgb(image), side, pad) for image in _flat(images)]
        content = BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
        return content if device is None else content.to(device)


def _square(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    sides = {key: size[key] for key in ("height", "width") if key in size} if size else {}
    need(
        len(set(sides.values())) == 1 and len(sides) == 2,
        f'size must be a number or {{"height": S, "width": S}}, got {shown(size)}',
    )
    return sides


def _flat(images: Any) -> list[Any]:
    """Every picture in nested lists, in order."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flat(entry)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _as_rgb(image: Any) -> Image.Image:
    """A PIL image in RGB: transparency over white."""
    if not isinstance(image, Image.Image):
        image = _from_array(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: Any) -> Image.Image:
    values = np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array)
    if values.ndim != 3 or 3 not in (values.shape[0], values.shape[-1]):
        raise ValueError(f"a picture must be [3, H, W] or [H, W, 3], got {values.shape}")
    if values.shape[-1] != 3:
        values = values.transpose(1, 2, 0)
    if values.dtype != np.uint8:
        low, high = float(values.min()), float(values.max())
        if not (np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1):
            raise ValueError(
                "a picture must hold uint8, or floating point within [0, 1]; got "
                f"{values.dtype} from {low:g} to {high:g}"
            )
        values = (values * 255).round().astype(np.uint8)
    return Image.fromarray(values)


register()  # where importing this module is what imports transformers
