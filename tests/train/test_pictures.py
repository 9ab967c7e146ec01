"""Picture files: one square for every command, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow_ext.train import captions, cli, evaluate, pictures


@pytest.mark.parametrize("sides", [(90, 70), (64, 200), (31, 33), (300, 17)])
def test_every_command_takes_the_same_square(tmp_path, sides):
    noise = np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    _, evaluated, _, _ = evaluate.Squares([tmp_path / "a.png"], 32)[0]
    expected = evaluate.to_float(evaluated)
    assert torch.equal(cli.read_square(tmp_path / "a.png", 32), expected)
    assert torch.equal(captions.Pictures(tmp_path, 32)[0].picture, expected)


@pytest.mark.parametrize("sides", [(1, 1), (1, 40), (30000, 1), (2, 9000), (1, 65000)])
def test_a_square_of_any_shape(sides):
    """Enlarged as a whole, the longest would be 256 x 16,640,000 pixels."""
    plain = np.array(pictures.to_square(Image.new("RGB", sides, (9, 99, 199)), 256))
    assert (plain == (9, 99, 199)).all()
    ends = np.zeros((*sides[::-1], 3), np.uint8)
    middle = tuple(slice(max(0, n // 2 - 20), n // 2 + 20) for n in sides[::-1])
    ends[middle] = 255
    square = np.array(pictures.to_square(Image.fromarray(ends), 64))
    assert square.shape == (64, 64, 3)
    assert (square == 255).all()
