"""Pictures with questions about them, as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenflow_ext.train.data import to_tensor

SIDE = 192
_GREEN, _RED, _GREY = (0, 110, 0), (170, 0, 0), (90, 90, 90)
_LINE, _WIDTH = 16, 29  # pixels, and characters a line


def answer_cards(images: Tensor, said: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """Pictures, and a card for each with question, answer and truth.

    Args:
        images: [B, 3, S, S] in [-1, 1].
        said: for each (question, the model's answer, the true one).

    Returns:
        Two of [B, 3, 192, 192] in [-1, 1]; pictures are resized.
    """
    if images.shape[-1] < SIDE:
        shown = F.interpolate(images.float(), (SIDE, SIDE), mode="nearest")
    else:
        shown = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return shown, torch.stack([to_tensor(_card(*entry)) for entry in said])


def _card(question: str, answer: str, truth: str) -> Image.Image:
    card = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(card), ImageFont.load_default()
    colour = _GREEN if answer.strip() == truth.strip() else _RED
    top = 6
    for text, ink in (
        (question, (0, 0, 0)),
        (f"answer: {answer or '(nothing)'}", colour),
        (f"truth: {truth}", _GREY),
    ):
        lines = textwrap.wrap(text, _WIDTH)[:4] or [""]
        for line in lines:
            # The font that Pillow comes with has no other letters.
            draw.text((6, top), line.encode("latin-1", "replace").decode("latin-1"), ink, font)
            top += _LINE
        top += _LINE // 2
    return card
