"""A picture as its tokens: encoded, decoded after each scale, and with tokens swapped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.image_files import to_square, to_tensor


def check_tokenizer(tokenizer: TokenFlowTokenizer, name: str) -> None:
    """That a tokenizer can be shown.

    Raises:
        ConfigError: it decodes no pictures, or a token is more than one number.
    """
    tokenizer.config.need_one_index(f"the demo (asked to show {name})")
    if not tokenizer.config.pixel.enabled:
        raise ConfigError(
            f"the tokenizer {name} has no tab in the demo: it decodes no pictures (its "
            "pixel.enabled is false)"
        )


@dataclass(frozen=True)
class Place:
    """Where a token stands: its scale and row and column there, from 0, and the scale's sides."""

    scale: int
    row: int
    column: int
    height: int
    width: int

    def box(self, size: int) -> tuple[int, int, int, int]:
        """The part of a picture of ``size`` pixels that it covers: left, top, right, bottom."""
        return (
            self.column * size // self.width,
            self.row * size // self.height,
            -(-(self.column + 1) * size // self.width),
            -(-(self.row + 1) * size // self.height),
        )


def sides(tokenizer: TokenFlowTokenizer) -> list[tuple[int, int]]:
    """(height, width) of each scale."""
    return list(tokenizer.quantizer.scales)


def place_of(scales: list[tuple[int, int]], number: int) -> Place:
    """Where token ``number`` of a picture stands.

    Raises:
        DataError: there are not so many.
    """
    left = number
    for scale, (height, width) in enumerate(scales):
        if 0 <= left < height * width:
            return Place(scale, left // width, left % width, height, width)
        left -= height * width
    raise DataError(f"a picture has {sum(h * w for h, w in scales)} tokens, there is no {number}")


@torch.no_grad()
def decode_scales(tokenizer: TokenFlowTokenizer, tokens: Tensor, last: bool = False) -> Tensor:
    """Pictures [S, 3, H, W] uint8 of tokens [l], after each of the S scales that they are of. All
    of them are decoded in one batch.

    Args:
        last: only after the last of the scales, [1, 3, H, W].

    Raises:
        DataError: one is not finite.
    """
    quantizer, grid = tokenizer.quantizer, (tokenizer.config.grid, tokenizer.config.grid)
    row = tokens[None].to(next(tokenizer.parameters()).device)
    held = len(quantizer.split(row))
    shown = range(held if last else 1, held + 1)
    f_hat = torch.cat([quantizer.decode(row, upto, grid) for upto in shown])
    images = tokenizer.decode_pixels(f_hat)
    if not images.isfinite().all():  # 8 bits would hide it
        raise DataError("the decoded picture is not finite")
    return to_uint8(images).cpu()


@dataclass(frozen=True)
class TokenPicture:
    """A picture, its tokens as the tokenizer gave them and as they are now.

    Attributes:
        original: uint8 [3, H, W].
        encoded: tokens [L] int64.
        tokens: the same with some swapped.
        steps: decoded after each scale, uint8 [S, 3, H, W].
        before: the last of the steps, of the tokens as they were encoded.
    """

    original: Tensor
    encoded: Tensor
    tokens: Tensor
    steps: Tensor
    before: Tensor

    @property
    def psnr(self) -> list[float]:
        """In dB, after each scale; infinite where nothing differs."""
        original = self.original.expand_as(self.steps)
        return psnr(self.steps, original, reduction="none").tolist()

    @property
    def swapped(self) -> list[int]:
        """The places of tokens that are not as they were encoded."""
        return (self.tokens != self.encoded).nonzero().flatten().tolist()


@torch.no_grad()
def encode(tokenizer: TokenFlowTokenizer, image: Image.Image) -> TokenPicture:
    """The middle square of an RGB image through the tokenizer, as ``tokenflow reconstruct``."""
    pixels = to_tensor(to_square(image, tokenizer.config.image_size))
    device = next(tokenizer.parameters()).device
    tokens = tokenizer.encode(pixels[None].to(device))[0].cpu()
    steps = decode_scales(tokenizer, tokens)
    return TokenPicture(to_uint8(pixels), tokens, tokens, steps, steps[-1])


def swap(
    tokenizer: TokenFlowTokenizer, picture: TokenPicture, number: int, code: int
) -> TokenPicture:
    """The picture with another code for one of its tokens.

    Raises:
        DataError: no such token or code.
    """
    place_of(sides(tokenizer), number)
    codes = tokenizer.quantizer.codebook_size
    if not 0 <= code < codes:
        raise DataError(f"a code is a number from 0 to {codes - 1}, got {code}")
    tokens = picture.tokens.clone()
    tokens[number] = code
    return replace(picture, tokens=tokens, steps=decode_scales(tokenizer, tokens))


def put_back(
    tokenizer: TokenFlowTokenizer, picture: TokenPicture, number: int | None = None
) -> TokenPicture:
    """The picture with one of its tokens, or all, as they were encoded."""
    if number is not None:
        return swap(tokenizer, picture, number, int(picture.encoded[number]))
    steps = decode_scales(tokenizer, picture.encoded)
    return replace(picture, tokens=picture.encoded, steps=steps)
