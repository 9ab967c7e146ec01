"""A picture as its tokens: encoded, decoded after each step, and with tokens swapped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.models.tokenizer.family_quantizer import FamilyQuantizer
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.image_files import to_square, to_tensor

from .layout import Layout


def decodes(tokenizer: TokenFlowTokenizer) -> bool:
    """Whether a tokenizer decodes pictures."""
    return tokenizer.config.pixel.enabled


def is_drawn(tokenizer: TokenFlowTokenizer, columns: slice) -> bool:
    """Whether pictures are drawn from any of these channels: those of the pixel branch are last."""
    return int(columns.stop) > sum(tokenizer.config.dims) - tokenizer.config.dims[-1]


@torch.no_grad()
def features_after(
    tokenizer: TokenFlowTokenizer, layout: Layout, indices: Tensor, step: int, grid: tuple[int, int]
) -> Tensor:
    """Quantized features [B, D, *grid] of a tokenizer's indices [B, ...] after a step."""
    scale, part = divmod(step, layout.depth)
    if isinstance(tokenizer.quantizer, FamilyQuantizer):
        return tokenizer.quantizer.decode(indices, scale + 1, grid, rounds=part + 1)
    return tokenizer.quantizer.decode(indices, scale + 1, grid)


@torch.no_grad()
def decode_steps(tokenizer: TokenFlowTokenizer, tokens: Tensor, last: bool = False) -> Tensor:
    """Pictures [S, 3, H, W] uint8 of tokens [N], after each of the S steps that they are of. All of
    them are decoded in one batch.

    Args:
        tokens: of all scales, or with one index of the first.
        last: only after the last of the steps, [1, 3, H, W].

    Raises:
        DataError: one is not finite.
    """
    layout, grid = Layout.of(tokenizer), (tokenizer.config.grid, tokenizer.config.grid)
    held = layout.whole_steps(len(tokens))
    indices = tokens.to(next(tokenizer.parameters()).device).view(1, -1, *layout.shape[1:])
    shown = range(held - 1 if last else 0, held)
    f_hat = [features_after(tokenizer, layout, indices, step, grid) for step in shown]
    images = tokenizer.decode_pixels(torch.cat(f_hat))
    if not images.isfinite().all():  # 8 bits would hide it
        raise DataError("the decoded picture is not finite")
    return to_uint8(images).cpu()


@dataclass(frozen=True)
class TokenPicture:
    """A picture, its tokens as the tokenizer gave them and as they are now.

    Attributes:
        original: uint8 [3, H, W].
        encoded: tokens [N] int64, see :class:`.layout.Layout`.
        tokens: the same with some swapped.
        steps: decoded after each step, uint8 [S, 3, H, W].
        before: the last of the steps, of the tokens as they were encoded.
    """

    original: Tensor
    encoded: Tensor
    tokens: Tensor
    steps: Tensor
    before: Tensor

    @property
    def psnr(self) -> list[float]:
        """In dB, after each step; infinite where nothing differs."""
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
    tokens = tokenizer.encode(pixels[None].to(device))[0].flatten().cpu()
    steps = decode_steps(tokenizer, tokens)
    return TokenPicture(to_uint8(pixels), tokens, tokens, steps, steps[-1])


def swap(
    tokenizer: TokenFlowTokenizer, picture: TokenPicture, number: int, code: int
) -> TokenPicture:
    """The picture with another code for one of its tokens.

    Raises:
        DataError: no such token or code.
    """
    codes = tokenizer.quantizer.codes_per_group[Layout.of(tokenizer).place(number).group]
    if not 0 <= code < codes:
        raise DataError(f"a code is a number from 0 to {codes - 1}, got {code}")
    tokens = picture.tokens.clone()
    tokens[number] = code
    return replace(picture, tokens=tokens, steps=decode_steps(tokenizer, tokens))


def put_back(
    tokenizer: TokenFlowTokenizer, picture: TokenPicture, number: int | None = None
) -> TokenPicture:
    """The picture with one of its tokens, or all, as they were encoded."""
    if number is not None:
        return swap(tokenizer, picture, number, int(picture.encoded[number]))
    steps = decode_steps(tokenizer, picture.encoded)
    return replace(picture, tokens=picture.encoded, steps=steps)
