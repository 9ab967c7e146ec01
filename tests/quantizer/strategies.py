"""Random quantizer problems for the property tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Problem(NamedTuple):
    """A codebook of several groups and what is asked of it."""

    dims: list[int]
    weights: list[float]
    l2_norm: bool
    codebook: Tensor
    generator: torch.Generator

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


@st.composite
def problems(draw: st.DrawFn, largest_codebook: int = 3000, narrowest: int = 1) -> Problem:
    """Groups, weights, normalisation and a random codebook, sometimes of repeated rows."""
    dims = draw(st.lists(st.integers(narrowest, 24), min_size=1, max_size=4))
    weights = draw(
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=len(dims), max_size=len(dims))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(1, largest_codebook))
    codebook = torch.randn(size, sum(dims), generator=generator) * draw(
        st.sampled_from([1e-3, 1.0, 50.0])
    )
    if draw(st.booleans()):  # ties: every code stands twice somewhere
        codebook = codebook[torch.randint(0, max(1, size // 2), (size,), generator=generator)]
    return Problem(dims, weights, draw(st.booleans()), codebook, generator)


sides = st.tuples(st.integers(1, 7), st.integers(1, 7))
pyramids = st.lists(sides, min_size=1, max_size=5)
