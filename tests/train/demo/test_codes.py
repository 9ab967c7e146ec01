"""Codes as things to look at: distances, colours, the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from tokenflow_ext import MultiScaleQuantizer, nearest_code
from tokenflow_ext.train.demo.codes import TableCodes, colours, hex_of, principal_components


def quantizer(l2_norm: bool = True, weights=(1.0, 3.0)) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(
        codebook_size=60, dims=(6, 3), scales=(1, 2, 4), weights=weights, l2_norm=l2_norm
    )


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 3.0), (2.0, 0.5)])
def test_the_nearest_comparable_code_is_the_quantizers(l2_norm, weights):
    model = quantizer(l2_norm, weights)
    rows = torch.randn(200, 9)
    codebook = model.joint_codebook()
    codes = TableCodes(model)
    found = codes.find(codes.comparable(rows))
    assert torch.equal(found, nearest_code(rows, codebook, (6, 3), weights, l2_norm))
    assert torch.equal(found, model.nearest(rows[None])[0, 0])


def test_principal_components_are_those_of_scikit_learn():
    rows = torch.randn(50, 7) @ torch.randn(7, 7)
    ours, theirs = principal_components(rows, 3).numpy(), PCA(3).fit_transform(rows.double())
    for one, other in zip(ours.T, theirs.T, strict=True):
        np.testing.assert_allclose(one * np.sign(one @ other), other, atol=1e-6)
        assert one[np.abs(one).argmax()] > 0


def test_few_channels_and_few_codes():
    assert torch.equal(
        principal_components(torch.randn(5, 1), 3)[:, 1:], torch.zeros(5, 2).double()
    )
    assert colours(torch.zeros(1, 4)).shape == (1, 3)
    assert colours(torch.randn(4, 2)).dtype == np.uint8


def test_near_codes_have_near_colours():
    """Of codes on a line, neighbours differ less than codes that were drawn at random."""
    line = torch.linspace(0, 1, 200)[:, None] * torch.randn(1, 8) + 1e-3 * torch.randn(200, 8)
    found = colours(line).astype(float)
    lightness = found @ [0.2126, 0.7152, 0.0722]
    near = np.abs(np.diff(lightness)).mean()
    shuffled = np.abs(np.diff(np.random.default_rng(0).permutation(lightness))).mean()
    assert near < 0.5 * shuffled
    assert len(np.unique(found, axis=0)) > 190  # colours tell codes apart


def test_codes_of_a_quantizer():
    model = quantizer()
    codes = TableCodes(model)
    assert len(codes) == 60
    assert codes.places.shape == (60, 2)
    assert codes.places.min() == 0
    assert codes.places.max() == 1
    assert hex_of(codes, 3) == "#{:02x}{:02x}{:02x}".format(*codes.colours[3])
    distances = torch.cdist(codes.rows, codes.rows)[7]
    expected = [code for code in distances.argsort().tolist() if code != 7]
    assert codes.nearest(7, 5) == expected[:5]
    assert codes.nearest(7, 1000) == expected
    assert codes.similar(7, 2) == [(code, str(code)) for code in expected[:2]]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_comparable_code_has_the_largest_inner_product(l2_norm):
    torch.manual_seed(1)
    model = MultiScaleQuantizer(
        50, (4, 4), (2,), l2_norm=l2_norm, index="own", metric="dot", scale_drop=0.0
    )
    with torch.no_grad():  # of very different lengths
        for table in model.codebooks:
            table.copy_(torch.randn(50, 4) * torch.rand(50, 1) * 3)
    rows = torch.randn(300, 8)
    for book in range(2):
        codes = TableCodes(model, book, slice(4 * book, 4 * book + 4))
        own, table = rows[:, codes.columns].double(), model.codebooks[book].detach().double()
        if l2_norm:
            table = table / table.norm(dim=1, keepdim=True)
        expected = (own @ table.T).argmax(dim=1)
        found = codes.find(codes.comparable(rows[:, codes.columns]))
        assert torch.equal(found, expected)
