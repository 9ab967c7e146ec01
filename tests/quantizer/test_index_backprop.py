"""IBQ's choice by tiles of scores, against the whole softmax written out in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext import index_backprop
from tokenflow_ext.index_backprop import choose


def written_out(
    rows: Tensor, codes: Tensor, indices: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 5 of arXiv 2412.02692, and the entropies of its section 3.3."""
    scores = rows @ codes.T
    soft = scores.softmax(1)
    hard = torch.nn.functional.one_hot(indices, len(codes)).to(rows.dtype)
    quantized = (hard + soft - soft.detach()) @ codes
    if temperature is None:
        return quantized, rows.new_zeros(()), rows.new_zeros(())
    log_p = (scores / temperature).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    return quantized, -(p * log_p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


def with_gradients(function, rows: Tensor, codes: Tensor, *more) -> list[Tensor]:
    """What a function gives, and the gradients of a sum of it."""
    rows, codes = rows.clone().requires_grad_(), codes.clone().requires_grad_()
    quantized, sample, codebook = function(rows, codes, *more)
    weights = torch.arange(1.0, 1 + quantized.numel()).view(quantized.shape).sin()
    loss = (quantized * weights.to(quantized)).sum() + 1.5 * sample - 0.7 * codebook
    return [quantized, sample, codebook, *torch.autograd.grad(loss, (rows, codes))]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 23),
    codes=st.integers(1, 40),
    dim=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0, 10.0]),  # of 10, most probabilities underflow
    temperature=st.sampled_from([None, 0.01, 0.5, 1.0]),
    chunk=st.sampled_from([1, 50, 400, 1 << 20]),
    tile=st.sampled_from([1, 7, 16, 2048]),
    seed=st.integers(0, 999),
)
def test_tiles_give_what_the_whole_gives(
    count, codes, dim, scale, temperature, chunk, tile, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    table = torch.randn(codes, dim, generator=generator, dtype=torch.float64)
    indices = torch.randint(codes, (count,), generator=generator)
    wanted = with_gradients(written_out, rows, table, indices, temperature)

    by_tiles = functools.partial(choose, temperature=temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_backprop, "CHUNK", chunk)
        patch.setattr(index_backprop, "TILE", tile)
        exact = with_gradients(by_tiles, rows, table, indices)
        torch.testing.assert_close(exact, wanted, rtol=1e-9, atol=1e-9)
        single, again = (
            [v.double() for v in with_gradients(by_tiles, rows.float(), table.float(), indices)]
            for _ in range(2)
        )
    assert all(map(torch.equal, single, again))
    if temperature is None or temperature >= 0.5:
        torch.testing.assert_close(single, wanted, rtol=2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_compiled_in_one_graph(monkeypatch, temperature) -> None:
    monkeypatch.setattr(index_backprop, "CHUNK", 200)
    monkeypatch.setattr(index_backprop, "TILE", 7)

    def loss(rows: Tensor, codes: Tensor) -> Tensor:
        found = choose(rows, codes, torch.zeros(5, dtype=torch.int64), temperature=temperature)
        return found.quantized.square().sum() + found.sample_entropy + found.codebook_entropy

    rows, codes = torch.randn(5, 3, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for own, other in zip(
        torch.autograd.grad(loss(rows, codes), (rows, codes)),
        torch.autograd.grad(compiled(rows, codes), (rows, codes)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((2, 3), (4, 5), (2,)), None, "must fit"),
        (((2, 3), (4, 3), (3,)), None, "must fit"),
        (((0, 3), (4, 3), (0,)), None, "N > 0"),
        (((2, 3), (4, 3), (2,)), 0.0, "temperature must be positive, got 0.0"),
        (((2, 3), (4, 3), (2,)), float("nan"), "temperature must be positive"),
    ],
)
def test_bad_input(shapes, temperature, message) -> None:
    rows, codes, indices = shapes
    with pytest.raises(ValueError, match=message):
        choose(
            torch.zeros(rows), torch.zeros(codes), torch.zeros(indices, dtype=torch.int64),
            temperature=temperature,
        )  # fmt: skip
