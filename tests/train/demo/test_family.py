"""Tokenizers of the family on the page: groups, rounds, codes with a table and without."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILY, family_tokenizer

from tokenflow_ext import Levels
from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.demo import cards, grids, pictures
from tokenflow_ext.train.demo.codes import TableCodes
from tokenflow_ext.train.demo.digits import DigitCodes
from tokenflow_ext.train.demo.indices import codes_of
from tokenflow_ext.train.demo.layout import Layout
from tokenflow_ext.train.demo.patches import indices_of, step_rows
from tokenflow_ext.train.evaluation.preprocess import crops_of, to_float

NAMES = {
    "groups": ["semantic 1", "semantic 2", "pixel 1", "pixel 2"],
    "shared": [""],
    "unit signs": ["semantic 1", "semantic 2", "pixel 1", "pixel 2"],
}
WITHOUT_TABLE = ("signs", "unit signs", "levels")


@pytest.fixture(scope="module")
def tokenizers():
    """Each kind, made once."""
    return {kind: family_tokenizer(kind) for kind in FAMILY}


@pytest.fixture(scope="module")
def indices(tokenizers, images):
    data = crops_of(str(images), None, 16)
    return {kind: indices_of(one, data, kind) for kind, one in tokenizers.items()}


@pytest.fixture(scope="module")
def shown(tokenizers, images):
    image = Image.open(images / "picture1.png").convert("RGB")
    return {kind: pictures.encode(one, image) for kind, one in tokenizers.items()}


def pixels_of(images) -> torch.Tensor:
    data = crops_of(str(images), None, 16)
    return to_float(torch.stack([data[number][1] for number in range(len(data))]))


@pytest.mark.parametrize("kind", FAMILY)
def test_the_nearest_code_of_a_row_is_its_token(tokenizers, images, kind):
    """At every step, in every group: what patches are measured by is the quantizer's own."""
    tokenizer = tokenizers[kind]
    layout, codes = Layout.of(tokenizer), codes_of(tokenizer)
    with torch.no_grad():
        h = tokenizer.features(pixels_of(images))
        found = tokenizer.quantizer.encode(h)
    tokens = found.flatten(1)
    rows = step_rows(tokenizer, codes, h, found)
    right = []
    for group, step in itertools.product(range(layout.groups), range(len(layout.steps))):
        part = layout.steps[step][1]
        own = codes[group].find(rows[group][step].flatten(0, 1), part)
        right.append(own == tokens[:, list(layout.numbers(step, group))].flatten())
    # A tie or a near one may go the other way in another order of sums.
    assert torch.cat(right).double().mean() > 0.99


@pytest.mark.parametrize("kind", FAMILY)
def test_names_and_channels(tokenizers, kind):
    codes, quantizer = codes_of(tokenizers[kind]), tokenizers[kind].quantizer
    assert [one.name for one in codes] == NAMES.get(kind, ["semantic", "pixel"])
    assert tuple(map(len, codes)) == quantizer.codes_per_group
    ends = [0, *(one.columns.stop for one in codes)]
    assert [one.columns.start for one in codes] == ends[:-1]
    assert ends[-1] == quantizer.dim
    assert {type(one) for one in codes} == {DigitCodes if kind in WITHOUT_TABLE else TableCodes}


@pytest.mark.parametrize("kind", FAMILY)
def test_a_code_is_what_the_quantizer_adds(tokenizers, kind):
    """A code's row, for each round, against the codes that the quantizer decodes with."""
    tokenizer = tokenizers[kind]
    layout, codes, quantizer = Layout.of(tokenizer), codes_of(tokenizer), tokenizer.quantizer
    drawn = torch.Generator().manual_seed(0)
    sizes = torch.tensor(quantizer.codes_per_group)
    tokens = torch.rand(layout.places, layout.groups, layout.depth, generator=drawn)
    tokens = (tokens * sizes[:, None]).long()
    values = quantizer.indices_to_codes(tokens.reshape(1, *layout.shape))
    values = values.view(layout.places, layout.depth, quantizer.dim)
    for group, part in itertools.product(range(layout.groups), range(layout.depth)):
        one = codes[group]
        rows = torch.stack([one.row(code, part) for code in tokens[:, group, part].tolist()])
        own = values[:, part, one.columns]
        width = own.shape[1]
        expected = one.comparable(own)[:, :width] if isinstance(one, TableCodes) else own
        torch.testing.assert_close(rows[:, :width], expected)
        if rows.shape[1] > width:  # then all codes are of one length
            lengths = one.rows.norm(dim=1)
            torch.testing.assert_close(lengths, lengths.amax().expand_as(lengths))


@pytest.mark.parametrize("kind", FAMILY)
def test_steps_are_the_tokenizers_own(tokenizers, shown, images, kind):
    tokenizer, picture = tokenizers[kind], shown[kind]
    layout = Layout.of(tokenizer)
    with torch.no_grad():
        tokens = tokenizer.encode(pixels_of(images)[1:2])
        assert torch.equal(picture.tokens, tokens[0].flatten())
        assert len(picture.tokens) == layout.count
        assert len(picture.steps) == len(layout.scales) * layout.depth
        for scale in range(len(layout.scales)):
            expected = to_uint8(tokenizer.decode(tokens, scale + 1)[0])[0]
            made = picture.steps[(scale + 1) * layout.depth - 1]
            assert (made.int() - expected.int()).abs().max() <= 1
        if len(layout.scales) == 1:  # a round adds its codes where they are
            codes = tokenizer.quantizer.indices_to_codes(tokens)[0].view(4, 4, layout.depth, -1)
            for part in range(layout.depth):
                f_hat = codes[:, :, : part + 1].double().sum(2).permute(2, 0, 1)[None].float()
                expected = to_uint8(tokenizer.decode_pixels(f_hat))[0]
                assert (picture.steps[part].int() - expected.int()).abs().max() <= 1
    error = ((picture.steps[-1].double() - picture.original) / 255).square().mean()
    assert picture.psnr[-1] == pytest.approx(-10 * np.log10(float(error)))


@pytest.mark.parametrize("kind", FAMILY)
def test_a_swap_changes_what_comes_from_its_step_on(tokenizers, shown, kind):
    tokenizer, picture = tokenizers[kind], shown[kind]
    layout = Layout.of(tokenizer)
    group, step = layout.groups - 1, len(layout.steps) - 1  # the pixel branch is the last
    number = layout.numbers(step, group)[5]
    most = tokenizer.quantizer.codes_per_group[group]
    other = (int(picture.tokens[number]) + most // 2) % most
    changed = pictures.swap(tokenizer, picture, number, other)
    assert changed.swapped == [number]
    assert torch.equal(changed.steps[:-1], picture.steps[:-1])
    assert not torch.equal(changed.steps[-1], picture.steps[-1])
    with torch.no_grad():
        indices = picture.tokens.clone().view(1, *layout.shape)
        indices.view(layout.places, layout.groups, layout.depth)[-11, group, -1] = other
        expected = to_uint8(tokenizer.decode(indices)[0])[0]
    assert (changed.steps[-1].int() - expected.int()).abs().max() <= 1
    assert torch.equal(pictures.put_back(tokenizer, changed).steps, picture.steps)
    with pytest.raises(DataError, match=f"from 0 to {most - 1}, got {most}"):
        pictures.swap(tokenizer, picture, number, most)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_group_that_draws_nothing_is_told(tokenizers, shown, kind):
    """Of each group, whether other codes for all of its tokens change the picture."""
    tokenizer, picture = tokenizers[kind], shown[kind]
    layout, codes = Layout.of(tokenizer), codes_of(tokenizer)
    for group, one in enumerate(codes):
        tokens = picture.tokens.clone().view(layout.places, layout.groups, layout.depth)
        tokens[:, group] = (tokens[:, group] + len(one) // 2) % len(one)
        changed = pictures.decode_steps(tokenizer, tokens.flatten())[-1]
        draws = not torch.equal(changed, picture.steps[-1])
        assert pictures.is_drawn(tokenizer, one.columns) == draws
        assert ("of the semantic branch" in grids.effect(picture, not draws)) != draws


@pytest.mark.parametrize("kind", FAMILY)
def test_usage_is_counted_by_group_and_step(tokenizers, indices, images, kind):
    layout = Layout.of(tokenizers[kind])
    with torch.no_grad():
        tokens = tokenizers[kind].encode(pixels_of(images)).numpy()
    shaped = tokens.reshape(3, layout.places, layout.groups, layout.depth)
    for group, index in enumerate(indices[kind]):
        counted = np.bincount(shaped[:, :, group].ravel(), minlength=len(index.codes))
        assert index.hits.tolist() == counted.tolist()
        first = np.bincount(
            shaped[:, : np.prod(layout.scales[0]), group, 0].ravel(), minlength=len(index.codes)
        )
        assert index.usage[0].tolist() == first.tolist()
        [clusters] = index.clusters
        assert len(clusters.assigned) == 3
    table = cards.usage_table(indices[kind])
    index = indices[kind][-1]
    used = (index.hits > 0).double().mean()
    shares = index.hits.double() / index.hits.sum()
    perplexity = float(torch.exp(-torch.xlogy(shares, shares).sum()))
    cells = re.findall(r"<td>(.*?)</td>", table)[-3 - len(layout.steps) * (len(layout.steps) > 1) :]
    assert cells[:3] == [f"{len(index.codes):,}", f"{used:.1%}", f"{perplexity:,.1f}"]


@pytest.mark.parametrize("kind", ["groups", "rounds", "unit signs", "levels"])
def test_nearest_patches_of_a_group_at_a_round(tokenizers, indices, images, kind):
    """Against the distances to the values that the quantizer decodes a code to at that round."""
    tokenizer, layout = tokenizers[kind], Layout.of(tokenizers[kind])
    with torch.no_grad():
        h = tokenizer.features(pixels_of(images))
        found = tokenizer.quantizer.encode(h)
    group, step = layout.groups - 1, len(layout.steps) - 1
    index = indices[kind][group]
    scale, part = layout.steps[step]
    height, width = layout.scales[scale]
    code = len(index.codes) // 3
    tokens = torch.zeros(layout.places, layout.groups, layout.depth, dtype=torch.int64)
    tokens[-1, group, part] = code
    values = tokenizer.quantizer.indices_to_codes(tokens.view(1, *layout.shape))
    value = values.view(layout.places, layout.depth, -1)[-1, part, index.codes.columns]
    if isinstance(index.codes, TableCodes):
        value = index.codes.comparable(value)
    rows = step_rows(tokenizer, [index.codes], h, found)[0][step].flatten(0, 1)
    order = (rows - value).double().norm(dim=1).argsort(stable=True)[:5].tolist()
    shaped = found.view(3, layout.places, layout.groups, layout.depth)
    nearest = index.nearest(code, step, 5)
    places = [(one.picture, one.place.row, one.place.column) for one in nearest]
    assert places == [
        (at // (height * width), at % (height * width) // width, at % width) for at in order
    ]
    for one in nearest:
        place = one.place.row * width + one.place.column - height * width
        assert one.code == shaped[one.picture, place, group, part]
        assert (one.place.scale, one.place.group, one.place.round) == (scale, group, part)


@pytest.mark.parametrize("kind", FAMILY)
def test_all_tokens_can_be_clicked(indices, shown, kind):
    picture, codes = shown[kind], [index.codes for index in indices[kind]]
    layout = indices[kind][0].layout
    piece = grids.steps(codes, layout, picture.tokens, picture.steps, picture.psnr, chosen=7)
    buttons = dict(re.findall(r'data-number="(\d+)" title="code (\d+),', piece))
    assert {int(number): int(code) for number, code in buttons.items()} == dict(
        enumerate(picture.tokens.tolist())
    )
    assert piece.count("tf-chosen") == 1
    assert piece.count("<img") == len(layout.steps)
    assert ("The groups of a place have no order" in piece) == (len(codes) > 1)
    for one in codes:
        assert not one.name or piece.count(f"<small>{one.name}</small>") == len(layout.steps)
    costs = grids.comparison(picture, codes, layout)
    assert f"<b>{layout.count} tokens</b>" in costs
    bits = sum(np.log2(len(one)) for one in codes) * layout.places * layout.depth
    assert f"<b>{int(np.ceil(bits / 8 - 1e-9)):,} bytes</b>" in costs


@pytest.mark.parametrize("kind", WITHOUT_TABLE)
def test_digits(tokenizers, kind):
    codes = codes_of(tokenizers[kind])[-1]
    every = torch.arange(len(codes))
    digits = codes.digits(every)
    assert torch.equal(codes.code_of(digits), every)
    assert digits.amax(dim=0).tolist() == [count - 1 for count in codes.code.counts]
    assert torch.equal(codes.find(codes.rows_of(every)), every)
    code = len(codes) // 2
    similar = [other for other, _ in codes.similar(code, 1000)]
    steps = (digits - digits[code]).abs().sum(dim=1)
    assert sorted(similar) == (steps == 1).nonzero().flatten().tolist()
    names = [name for _, name in codes.similar(code, 1000)]
    for other, name in zip(similar, names, strict=True):
        [channel] = (digits[other] != digits[code]).nonzero().flatten().tolist()
        assert name == f"channel {channel + 1}: {codes.shown(channel, int(digits[other, channel]))}"


@pytest.mark.parametrize("kind", WITHOUT_TABLE)
def test_what_has_no_table_shows_its_channels_and_says_so(indices, kind):
    for index in indices[kind]:
        codes = index.codes
        tokens = np.repeat(np.arange(len(codes)), index.hits.numpy())
        digits = codes.digits(torch.from_numpy(tokens)).numpy()
        piece = cards.plane(index, int(index.hits.argmax()))
        assert f"There is no map of the codes: {codes.word}s have no table" in piece
        assert "<circle" not in piece
        bars = re.findall(r'<i title="(.*?): ([\d.]+)% of the tokens"', piece)
        expected, bits = [], 0.0
        for channel, count in enumerate(codes.code.counts):
            often = np.bincount(digits[:, channel], minlength=count) / len(digits)
            expected += [
                (codes.shown(channel, digit), f"{100 * share:.1f}")
                for digit, share in enumerate(often)
            ]
            bits -= sum(share * np.log2(share) for share in often if share)
        assert bars == expected
        assert f"{bits:.1f} of {codes.code.bits:.1f} bits are used" in piece
        offered = [int(code) for code in re.findall(r'data-number="(\d+)"', piece)]
        assert len(offered) == min(24, int((index.hits > 0).sum()))
        assert index.hits[offered].min() >= index.hits.sort(descending=True).values[:24][-1]
        changed = cards.neighbours(index, offered[0], 0)
        assert f"Change one {codes.word}" in changed
        card = cards.code_card(index, offered[0], 0, "")
        shown = re.findall(r'<span title="channel \d+">(.*?)</span>', card)
        own = codes.digits(torch.tensor(offered[:1]))[0].tolist()
        assert shown == [codes.shown(channel, digit) for channel, digit in enumerate(own)]


def test_unit_signs_are_compared_by_direction(tokenizers):
    """And a code's row has unit length, as the quantizer has it."""
    unit, plain = (codes_of(tokenizers[kind])[0] for kind in ("unit signs", "signs"))
    rows = torch.randn(20, len(unit.code.counts))
    torch.testing.assert_close(unit.comparable(5 * rows), unit.comparable(rows))
    torch.testing.assert_close(unit.comparable(rows).norm(dim=1), torch.ones(20))
    assert float(unit.row(3).norm()) == pytest.approx(1)
    wide = torch.randn(20, len(plain.code.counts))
    assert torch.equal(plain.comparable(wide), wide)


def test_how_digits_are_read(tokenizers):
    levels, signs = codes_of(tokenizers["levels"])[0], codes_of(tokenizers["signs"])[0]
    assert isinstance(levels.code, Levels)
    minus = "\N{MINUS SIGN}"
    assert [levels.shown(0, digit) for digit in range(5)] == [
        minus + "2",
        minus + "1",
        "0",
        "+1",
        "+2",
    ]
    assert [signs.shown(0, digit) for digit in range(2)] == [minus, "+"]


@pytest.mark.parametrize("kind", WITHOUT_TABLE)
def test_colours_without_a_table(indices, kind):
    """Codes that are used differ in colour; a step in one channel is a smaller change than most."""
    codes = indices[kind][-1].codes
    used = indices[kind][-1].hits.nonzero().flatten()
    colours = codes.colours_of(used).astype(float)
    assert len(np.unique(colours, axis=0)) > len(used) // 2
    every = codes.colours_of(torch.arange(len(codes))).astype(float)
    near = np.mean(
        [
            np.abs(every[code] - every[other]).mean()
            for code in used.tolist()
            for other, _ in codes.similar(code, 100)
        ]
    )
    far = np.abs(every[:, None] - every[None]).mean()
    assert near < far


@pytest.mark.parametrize("kind", ["groups", "rounds"])
def test_what_has_a_table_has_a_map(indices, kind):
    for index in indices[kind]:
        piece = cards.plane(index, 3)
        assert piece.count("<circle") == len(index.codes)
        assert "Similar codes" in cards.neighbours(index, 3, 0)
