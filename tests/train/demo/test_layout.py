"""How tokens are numbered: against the quantizer's own arrangement of its indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.demo.layout import Layout, Place

SIDES = ((1, 1), (2, 2), (4, 4))


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_numbers_and_places_agree(scales, groups, depth):
    layout = Layout(tuple(scales), groups, depth)
    seen = {}
    for step, (scale, part) in enumerate(layout.steps):
        for group in range(groups):
            numbers = layout.numbers(step, group)
            height, width = scales[scale]
            assert len(numbers) == height * width
            for at, number in enumerate(numbers):
                assert number not in seen
                seen[number] = Place(scale, at // width, at % width, height, width, group, part)
    assert sorted(seen) == list(range(layout.count))
    assert [layout.place(number) for number in range(layout.count)] == [
        seen[number] for number in range(layout.count)
    ]
    # As in the tensor [L, groups, depth] that the quantizer gives.
    shaped = np.arange(layout.count).reshape(layout.places, groups, depth)
    first = 0
    for step, (scale, part) in enumerate(layout.steps):
        count = scales[scale][0] * scales[scale][1]
        for group in range(groups):
            own = shaped[first : first + count, group, part]
            assert own.tolist() == list(layout.numbers(step, group))
        first += count * (part == depth - 1)


def test_places():
    layout = Layout(SIDES)
    assert layout.place(0) == Place(0, 0, 0, 1, 1)
    assert layout.place(3) == Place(1, 1, 0, 2, 2)
    assert layout.place(20) == Place(2, 3, 3, 4, 4)
    for number in (-1, 21):
        with pytest.raises(DataError, match="21 tokens"):
            layout.place(number)


def test_names_of_steps():
    assert [Layout(SIDES).name(step) for step in range(3)] == ["1 × 1", "2 × 2", "4 × 4"]
    rounds = Layout(((2, 3),), depth=2)
    assert [rounds.name(step) for step in range(2)] == ["2 × 3, round 1", "2 × 3, round 2"]


def test_boxes_cover_a_picture():
    covered = np.zeros((10, 10), int)
    for row in range(3):
        for column in range(3):
            left, top, right, bottom = Place(0, row, column, 3, 3).box(10)
            covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert Place(0, 0, 0, 1, 1).box(10) == (0, 0, 10, 10)
