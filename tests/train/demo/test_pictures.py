"""Pictures as their tokens: decoded after each scale, swapped, put back."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.metrics import psnr, to_uint8
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.demo import pictures


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
        [last] = pictures.decode_steps(tokenizer, picture.tokens[:count], last=True)
        assert (last.int() - picture.steps[scale].int()).abs().max() <= 1


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
        pictures.decode_steps(broken, picture.tokens)


def test_a_part_of_a_scale_is_not_decoded(tokenizer, picture):
    with pytest.raises(DataError, match="7 tokens are no whole scales of 21"):
        pictures.decode_steps(tokenizer, picture.tokens[:7])
