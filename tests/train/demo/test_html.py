"""The pieces of the page: what they say, what can be clicked, what is escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import image_tokenizer

from tokenflow_ext.train.demo import cards, grids, html, pictures
from tokenflow_ext.train.demo.codes import hex_of
from tokenflow_ext.train.demo.patches import indices_of
from tokenflow_ext.train.evaluation.preprocess import crops_of


class Elements(HTMLParser):
    """The elements of a piece, and whether each that was opened was closed."""

    ALONE = frozenset({"img"})

    def __init__(self, piece: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(piece)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def tokenizer():
    return image_tokenizer().eval()


@pytest.fixture(scope="module")
def index(tokenizer, images):
    [found] = indices_of(tokenizer, crops_of(str(images), None, 16), "mine")
    return found


@pytest.fixture(scope="module")
def picture(tokenizer, images):
    return pictures.encode(tokenizer, Image.open(images / "picture0.png").convert("RGB"))


def test_a_picture_is_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    [image] = Elements(html.picture(pixels, 'a "quoted" <name>')).named("img")
    assert image["alt"] == 'a "quoted" <name>'
    code = image["src"].removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))), pixels)


def test_steps(index, picture):
    piece = grids.steps(
        [index.codes],
        index.layout,
        picture.tokens,
        picture.steps,
        picture.psnr,
        chosen=3,
        swapped=[7],
    )
    found = Elements(piece)
    tokens = found.named("button")
    assert [int(token["data-number"]) for token in tokens] == list(range(30))
    for token, code in zip(tokens, picture.tokens.tolist(), strict=True):
        assert token["style"] == f"background:{hex_of(index.codes, code)}"
        assert token["title"].startswith(f"code {code}, row ")
    assert [n for n, token in enumerate(tokens) if "tf-chosen" in token["class"]] == [3]
    assert [n for n, token in enumerate(tokens) if "tf-swapped" in token["class"]] == [7]
    assert tokens[3]["title"].endswith("row 2, column 1")
    assert len(found.named("img")) == 4
    assert [f"{value:.1f} dB" for value in picture.psnr] == re.findall(r"[\d.]+ dB", piece)


def test_the_first_scales_alone(index, picture):
    piece = grids.steps([index.codes], index.layout, picture.tokens[:5], picture.steps[:2])
    assert len(Elements(piece).named("button")) == 5
    assert " dB" not in piece


def test_what_a_picture_costs(index, picture):
    piece = grids.comparison(picture, [index.codes], index.layout)
    assert "<b>30 tokens</b>" in piece
    assert "<b>21 bytes</b>" in piece  # 30 * log2(48) / 8 = 20.9
    assert "are 768, 37 times" in piece  # 16 * 16 * 3
    assert len(Elements(piece).named("img")) == 2


def test_a_swapped_picture_is_shown_beside(tokenizer, index, picture):
    changed = pictures.swap(tokenizer, picture, 0, (int(picture.tokens[0]) + 1) % 48)
    assert len(Elements(grids.comparison(changed, [index.codes], index.layout)).named("img")) == 3


def test_no_difference_is_no_number(index, picture):
    import dataclasses

    same = dataclasses.replace(picture, original=picture.steps[-1])
    assert "<b>no difference</b>" in grids.comparison(same, [index.codes], index.layout)


def test_names_are_escaped():
    pixels = np.zeros((2, 2, 3), np.uint8)
    piece = html.examples([("<script>alert(1)</script>.png", pixels), ('"onload="x', pixels)])
    found = Elements(piece)
    assert found.named("script") == []
    assert [button["aria-label"] for button in found.named("button")] == [
        "<script>alert(1)</script>.png",
        '"onload="x',
    ]
    assert all(set(image) == {"src", "alt", "title"} for image in found.named("img"))


def test_a_code(index):
    code = int(index.hits.argmax())
    piece = cards.code_card(index, code, 2, " at 3 × 3")
    assert f"Code {code} at 3 × 3" in piece
    assert f"{int(index.hits[code])} of 90 tokens of 3 known pictures" in piece
    assert "27 patches of 3 pictures" in piece
    assert cards.LEFT_OVER in piece
    assert cards.LEFT_OVER not in cards.code_card(index, code, 0, "")
    assert len(Elements(piece).named("img")) == 16
    unused = int((index.hits == 0).nonzero()[0])
    assert "no token of 3 known pictures" in cards.code_card(index, unused, 0, "")


def test_neighbours(index):
    found = Elements(cards.neighbours(index, 4, 1))
    numbers = [int(button["data-number"]) for button in found.named("button")]
    assert numbers == index.codes.nearest(4, 8)


def test_the_map(index, monkeypatch):
    dots = Elements(cards.code_map(index, index.codes, chosen=9)).named("circle")
    assert sorted(int(dot["data-number"]) for dot in dots) == list(range(48))
    assert [dot["data-number"] for dot in dots if dot.get("class") == "tf-chosen"] == ["9"]
    assert all(0 <= float(dot[axis]) <= 100 for dot in dots for axis in ("cx", "cy"))
    monkeypatch.setattr(cards, "MOST_ON_MAP", 10)
    piece = cards.code_map(index, index.codes)
    assert "38 codes used least are left out" in piece
    shown = {int(dot["data-number"]) for dot in Elements(piece).named("circle")}
    assert len(shown) == 10
    left = torch.tensor([code for code in range(48) if code not in shown])
    assert index.hits[list(shown)].min() >= index.hits[left].max()


def test_usage(index):
    piece = cards.usage_plot(index)
    used = int((index.hits > 0).sum())
    assert f"{used} of 48 codes are used ({used / 48:.1%})" in piece
    [plot] = Elements(piece).named("polygon")
    heights = [float(pair.split(",")[1]) for pair in plot["points"].split()[1:-1]]
    assert heights == sorted(heights)  # the most used first
    assert heights[0] == 1.0
