"""The patches of known pictures that are nearest to a code, and the use of codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import var_models
from tiny_models import image_tokenizer as two_branches

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.demo.indices import codes_of
from tokenflow_ext.train.demo.patches import PatchIndex, indices_of, step_rows
from tokenflow_ext.train.evaluation.clusters import nearest
from tokenflow_ext.train.evaluation.preprocess import crops_of, to_float


def build(tokenizer: TokenFlowTokenizer, folder, batch: int = 2) -> PatchIndex:
    data = crops_of(str(folder), None, tokenizer.config.image_size)
    [found] = indices_of(tokenizer, data, "mine", batch)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> TokenFlowTokenizer:
    return two_branches().eval()


@pytest.fixture(scope="module")
def index(tokenizer, images) -> PatchIndex:
    return build(tokenizer, images)


@pytest.mark.parametrize("make", [two_branches, var_models.var_tokenizer])
def test_the_nearest_code_of_a_scales_rows_is_its_token(make, images):
    """What makes a patch's distance to a code mean something: it is the quantizer's own."""
    tokenizer = make().eval()
    data = crops_of(str(images), None, tokenizer.config.image_size)
    pixels = to_float(torch.stack([data[number][1] for number in range(3)]))
    with torch.no_grad():
        h = tokenizer.features(pixels)
        tokens = tokenizer.quantizer.encode(h)
        [codes] = codes_of(tokenizer)
        [rows] = step_rows(tokenizer, [codes], h, tokens)
    found = torch.cat([torch.cdist(part, codes.rows).argmin(dim=2) for part in rows], dim=1)
    # A tie or a near one may go the other way in another order of sums.
    assert (found == tokens).double().mean() > 0.99


def test_the_index_does_not_depend_on_the_batch(tokenizer, images, index):
    other = build(tokenizer, images, batch=3)
    assert torch.equal(index.tokens, other.tokens)
    assert index.nearest(3, 2, 4) == other.nearest(3, 2, 4)


def test_nearest_patches_against_all_distances(tokenizer, index, images):
    data = index.images
    pixels = to_float(torch.stack([data[number][1] for number in range(3)]))
    with torch.no_grad():
        h = tokenizer.features(pixels)
        [steps] = step_rows(tokenizer, [index.codes], h, index.tokens)
        rows = steps[2].flatten(0, 1)
    order = torch.cdist(rows, index.codes.rows[5][None])[:, 0].argsort(stable=True)[:6].tolist()
    found = index.nearest(5, 2, 6)
    assert [p.picture * 9 + p.place.row * 3 + p.place.column for p in found] == order
    for patch in found:
        number = 5 + patch.place.row * 3 + patch.place.column  # after scales 1 and 2
        assert patch.code == index.tokens[patch.picture, number]
        assert (patch.place.scale, patch.place.height, patch.place.width) == (2, 3, 3)
    assert index.searched(2) == 27
    assert len(index.nearest(5, 0, 100)) == 3


def test_a_patchs_pixels(index):
    [patch] = index.nearest(1, 3, 1)
    whole = index.images[patch.picture][1].permute(1, 2, 0).numpy()
    row, column = patch.place.row * 4, patch.place.column * 4
    assert np.array_equal(index.pixels(patch), whole[row : row + 4, column : column + 4])


def test_usage(index):
    counted = np.bincount(index.tokens.numpy().ravel(), minlength=48)
    assert index.hits.tolist() == counted.tolist()
    assert index.usage.sum(dim=1).tolist() == [3, 12, 27, 48]
    code = int(index.tokens[0, 0])
    assert index.usage[0, code] == (index.tokens[:, 0] == code).sum()
    shares = [
        (index.tokens[:, a:b] == code).double().mean()
        for a, b in ((0, 1), (1, 5), (5, 14), (14, 30))
    ]
    assert index.step_of(code) == int(torch.stack(shares).argmax())


def test_clusters_are_those_of_the_analysis(tokenizer, index):
    assert [entry.by for entry in index.clusters] == ["joint", "semantic", "pixel"]
    pixels = to_float(torch.stack([index.images[number][1] for number in range(3)]))
    with torch.no_grad():
        h = tokenizer.features(pixels)
    for entry in index.clusters:
        assert torch.equal(entry.assigned, nearest(tokenizer, h, entry.by))
