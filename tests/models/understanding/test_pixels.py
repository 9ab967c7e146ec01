"""Pixels are those of the release: Pillow's bicubic on 8 bits, padded squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from understanding_models import picture

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.understanding import squares
from tokenflow_ext.models.understanding.pixels import TokenFlowImageProcessor


def by_hand(image, side, pad):
    """As the description of the release says, pixel by pixel."""
    values = np.asarray(image)
    height, width, _ = values.shape
    if pad:
        longer = max(height, width)
        square = np.full((longer, longer, 3), int(0.5 * 255), np.uint8)
        top, left = (longer - height) // 2, (longer - width) // 2
        square[top : top + height, left : left + width] = values
        values = square
    resized = Image.fromarray(values).resize((side, side), Image.BICUBIC)
    return ((np.asarray(resized) / 255.0 - 0.5) / 0.5).transpose(2, 0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.booleans(), st.integers(0, 99)
)
def test_pixels_are_the_releases(width, height, side, pad, seed):
    image = picture(seed, width, height)
    found = TokenFlowImageProcessor(side, do_pad=pad)(image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, side, side)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), by_hand(image, side, pad), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 900))
def test_a_padded_picture_is_never_in_memory_whole(width, height, side, at_once):
    """The pixels are the same however many rows are padded at a time."""
    image = picture(3, width, height)
    made = []
    new = Image.new

    def counted(mode, size, *more):
        made.append(size[0] * size[1])
        return new(mode, size, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squares, "_AT_ONCE", at_once)
        patch.setattr(Image, "new", counted)
        found = squares.to_pixels(image, side, True)
    longer = max(width, height)
    assert max(made, default=0) <= max(at_once, longer, side * longer)
    np.testing.assert_allclose(found, by_hand(image, side, True), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.booleans())
def test_a_square_has_the_pictures_pixels(width, height, side, pad):
    processor, image = TokenFlowImageProcessor(side, do_pad=pad), picture(1, width, height)
    square = processor.square(image)
    assert square.size == (side, side)
    expected, found = (processor(x, return_tensors="pt")["pixel_values"] for x in (image, square))
    assert found.equal(expected)


def test_every_form_of_a_picture_is_the_same():
    image, processor = picture(), TokenFlowImageProcessor(16)
    values = np.asarray(image)
    forms = [
        image,
        values,
        values.transpose(2, 0, 1),
        torch.from_numpy(values.copy()),
        torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 255,
        image.convert("RGBA"),
    ]
    want = processor(image, return_tensors="pt")["pixel_values"]
    for form in forms:
        assert processor(form, return_tensors="pt")["pixel_values"].equal(want)
    several = processor([[forms[0]], [forms[1], forms[2]]], return_tensors="pt")["pixel_values"]
    assert several.equal(want.expand(3, -1, -1, -1))
    stacked = processor(np.stack([values, values]), return_tensors="pt")["pixel_values"]
    assert stacked.equal(want.expand(2, -1, -1, -1))


def test_transparent_is_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert TokenFlowImageProcessor(4)(clear, return_tensors="pt")["pixel_values"].eq(1).all()


def test_options_of_a_call():
    processor = TokenFlowImageProcessor(16)
    plain = TokenFlowImageProcessor(12, do_pad=False)
    found = processor(picture(), size=12, do_pad=False, return_tensors="np")["pixel_values"]
    want = plain(picture(), return_tensors="np")["pixel_values"]
    assert np.array_equal(found, want)


@pytest.mark.parametrize("size", [{"height": 3, "width": 4}, {"shortest_edge": 4}, "large", {}])
def test_a_size_that_is_no_square(size):
    with pytest.raises(ConfigError, match="size must be"):
        TokenFlowImageProcessor(size)


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4)), np.full((4, 4, 3), 2.0), np.full((4, 4, 3), -1.0), np.zeros((5, 4, 4))],
)
def test_what_is_no_picture(bad):
    with pytest.raises(ValueError, match="a picture must"):
        TokenFlowImageProcessor(8)(bad)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="do_flip"):
        TokenFlowImageProcessor(8)(picture(), do_flip=True)
