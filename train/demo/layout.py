"""How a picture's tokens are arranged: scales, groups with an index each, rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.models.tokenizer.family_quantizer import FamilyQuantizer
from tokenflow_ext.train.data import DataError


@dataclass(frozen=True)
class Place:
    """Where a token stands: its scale and row and column there, from 0, the scale's sides, its
    group and its round."""

    scale: int
    row: int
    column: int
    height: int
    width: int
    group: int = 0
    round: int = 0

    def box(self, size: int) -> tuple[int, int, int, int]:
        """The part of a picture of ``size`` pixels that it covers: left, top, right, bottom."""
        return (
            self.column * size // self.width,
            self.row * size // self.height,
            -(-(self.column + 1) * size // self.width),
            -(-(self.row + 1) * size // self.height),
        )


@dataclass(frozen=True)
class Layout:
    """The tokens of a picture, numbered from 0: place by place, scale after scale; of a place group
    by group, and of a group round by round. So is the flattened tensor of a quantizer's indices.

    A step is a round of a scale: what all groups add at once.

    Attributes:
        scales: (height, width) of each.
        groups: with an index of their own; 1 with a shared one.
        depth: rounds of each scale.
        bits: information of all tokens.
        own: whether indices have a dimension for groups, though there be one.
    """

    scales: tuple[tuple[int, int], ...]
    groups: int = 1
    depth: int = 1
    bits: float = 0.0
    own: bool = False

    @classmethod
    def of(cls, tokenizer: TokenFlowTokenizer) -> Layout:
        """That of a tokenizer."""
        quantizer = tokenizer.quantizer
        if isinstance(quantizer, FamilyQuantizer):
            own = quantizer.index == "own"
            groups = len(quantizer.groups) if own else 1
            bits = quantizer.bits_per_image
            return cls(quantizer.scales, groups, quantizer.depth, bits, own)
        bits = quantizer.num_tokens * math.log2(quantizer.codebook_size)
        return cls(quantizer.scales, bits=bits)

    @property
    def places(self) -> int:
        """Places of all scales."""
        return sum(height * width for height, width in self.scales)

    @property
    def count(self) -> int:
        """Tokens of a picture."""
        return self.places * self.groups * self.depth

    @property
    def shape(self) -> tuple[int, ...]:
        """A picture's indices as its quantizer has them: L(, groups)(, depth)."""
        return (self.places, *(self.groups,) * self.own, *(self.depth,) * (self.depth > 1))

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(scale, round) of each step."""
        return [(scale, part) for scale in range(len(self.scales)) for part in range(self.depth)]

    def step_of(self, place: Place) -> int:
        """The step that a token is of."""
        return place.scale * self.depth + place.round

    def numbers(self, step: int, group: int) -> range:
        """The numbers of a group's tokens at a step, row by row."""
        scale, part = divmod(step, self.depth)
        before = sum(height * width for height, width in self.scales[:scale])
        height, width = self.scales[scale]
        every = self.groups * self.depth
        first = before * every + group * self.depth + part
        return range(first, first + height * width * every, every)

    def place(self, number: int) -> Place:
        """Where a token stands.

        Raises:
            DataError: there are not so many.
        """
        if not 0 <= number < self.count:
            raise DataError(f"a picture has {self.count} tokens, there is no {number}")
        left, inside = divmod(number, self.groups * self.depth)
        group, part = divmod(inside, self.depth)
        scale = 0
        while left >= math.prod(self.scales[scale]):
            left -= math.prod(self.scales[scale])
            scale += 1
        height, width = self.scales[scale]
        return Place(scale, left // width, left % width, height, width, group, part)

    def whole_steps(self, tokens: int) -> int:
        """How many steps the first so many tokens are.

        Raises:
            DataError: they are no whole scales.
        """
        for scale in range(len(self.scales) + 1):
            if tokens == Layout(self.scales[:scale], self.groups, self.depth).count:
                return scale * self.depth
        raise DataError(f"{tokens} tokens are no whole scales of {self.count}")

    def name(self, step: int) -> str:
        """A step's name: its scale's rows and columns, and its round where there are several."""
        scale, part = divmod(step, self.depth)
        height, width = self.scales[scale]
        of_round = f", round {part + 1}" if self.depth > 1 else ""
        return f"{height} × {width}{of_round}"
