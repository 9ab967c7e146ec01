"""Pictures as their tokens: decoded after each scale, swapped, put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow_ext.models import ConfigError, TokenFlowTokenizer
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.config import load_config
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.demo import pictures

SIDES = [(1, 1), (2, 2), (4, 4)]


@pytest.fixture(scope="module")
def tokenizer(image_tokenizer) -> TokenFlowTokenizer:
    return TokenFlowTokenizer.from_pretrained(image_tokenizer)


@pytest.fixture(scope="module")
def picture(tokenizer, images) -> pictures.TokenPicture:
    return pictures.encode(tokenizer, Image.open(images / "picture1.png").convert("RGB"))


def test_it_is_the_tokenizers_own(tokenizer, picture, images):
    original = read_square(images / "picture1.png", 32)[None]
    with torch.no_grad():
        tokens = tokenizer.encode(original)
        assert torch.equal(picture.tokens, tokens[0])
        assert picture.steps.shape == (3, 3, 32, 32)
        for upto in (1, 2, 3):
            expected = to_uint8(tokenizer.decode(tokens, upto)[0])
            difference = picture.steps[upto - 1].int() - expected[0].int()
            assert difference.abs().max() <= 1  # of a batch the last bits may differ
            measured = psnr(picture.steps[upto - 1 : upto], to_uint8(original)).item()
            assert picture.psnr[upto - 1] == pytest.approx(measured)
    assert torch.equal(picture.before, picture.steps[-1])
    assert picture.swapped == []


def test_only_the_last_step(tokenizer, picture):
    for count, scale in ((1, 0), (5, 1), (21, 2)):
        [last] = pictures.decode_scales(tokenizer, picture.tokens[:count], last=True)
        assert (last.int() - picture.steps[scale].int()).abs().max() <= 1


def test_places():
    assert pictures.place_of(SIDES, 0) == pictures.Place(0, 0, 0, 1, 1)
    assert pictures.place_of(SIDES, 3) == pictures.Place(1, 1, 0, 2, 2)
    assert pictures.place_of(SIDES, 20) == pictures.Place(2, 3, 3, 4, 4)
    for number in (-1, 21):
        with pytest.raises(DataError, match="21 tokens"):
            pictures.place_of(SIDES, number)


def test_boxes_cover_a_picture():
    covered = np.zeros((10, 10), int)
    for row in range(3):
        for column in range(3):
            left, top, right, bottom = pictures.Place(0, row, column, 3, 3).box(10)
            covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert pictures.Place(0, 0, 0, 1, 1).box(10) == (0, 0, 10, 10)


def test_a_swap_changes_what_comes_from_its_scale_on(tokenizer, picture):
    other = (int(picture.tokens[3]) + 1) % 64
    changed = pictures.swap(tokenizer, picture, 3, other)
    assert changed.swapped == [3]
    assert changed.tokens[3] == other
    assert torch.equal(changed.steps[0], picture.steps[0])
    assert not torch.equal(changed.steps[1], picture.steps[1])
    assert torch.equal(changed.before, picture.before)
    assert picture.swapped == []  # a session's earlier state is as it was
    twice = pictures.swap(tokenizer, changed, 7, (int(picture.tokens[7]) + 1) % 64)
    assert twice.swapped == [3, 7]
    assert pictures.put_back(tokenizer, twice, 3).swapped == [7]
    whole = pictures.put_back(tokenizer, twice)
    assert whole.swapped == []
    assert torch.equal(whole.steps, picture.steps)


@pytest.mark.parametrize(("number", "code"), [(21, 0), (-1, 0), (0, 64), (0, -1)])
def test_a_swap_of_what_there_is_not(tokenizer, picture, number, code):
    with pytest.raises(DataError):
        pictures.swap(tokenizer, picture, number, code)


def test_a_picture_that_is_not_finite(image_tokenizer, picture):
    broken = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    with torch.no_grad():
        broken.last_layer.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        pictures.decode_scales(broken, picture.tokens)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.quantizer.kind=family", r"asked to show mine.*'family'"),
        ("model.pixel.enabled=no", "mine has no tab in the demo: it decodes no pictures"),
    ],
)
def test_tokenizers_that_cannot_be_shown(micro, tmp_path, images, change, said):
    config = load_config(None, micro.overrides(tmp_path, images, change)).model
    with torch.device("meta"), pytest.raises(ConfigError, match=said):
        pictures.check_tokenizer(TokenFlowTokenizer(config), "mine")
