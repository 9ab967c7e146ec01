"""sample_top_k_top_p against the float64 distribution and Philox, both written another way."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler.philox import philox, uniform
from scipy import stats
from torch import Tensor

from tokenflow_ext import Draw, sample_top_k_top_p
from tokenflow_ext.reference import filtered_probabilities

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def exact(logits: Tensor, **arguments: Any) -> Tensor:
    """The distribution in float64, for the values that the kernel reads."""

    def wide(x: Tensor) -> Tensor:
        return x.double().masked_fill(x == torch.finfo(x.dtype).min, -torch.inf)

    if arguments.get("uncond") is not None:
        arguments["uncond"] = wide(arguments["uncond"])
    return filtered_probabilities(wide(logits), **arguments)


def assert_draws(
    draw: Draw,
    probabilities: Tensor,
    seed: int,
    tolerance: float,
    offset: int = 0,
    places: list[int] | None = None,
) -> None:
    """Every row's code is the inverse of the float64 distribution function at the row's random
    number, or the neighbour where that number is within `tolerance` of a step."""
    indices, probability = (part.flatten().cpu() for part in draw)
    rows = probabilities.flatten(0, -2).cpu()
    assert indices.shape == rows.shape[:1]
    running = rows.cumsum(-1)
    for row, (index, share) in enumerate(zip(indices.tolist(), probability, strict=True)):
        u = uniform(seed, places[row] if places else offset + row)
        before = running[row, index - 1] if index else 0.0
        after = running[row, index]
        assert before - tolerance <= u <= after + tolerance, f"row {row}: {before} {u} {after}"
        assert abs(share - rows[row, index]) <= tolerance * rows[row, index] + tolerance**2


# ------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 50, 600, 1999])
def test_is_the_inverse_distribution_function(
    device: str, top_k: int, top_p: float, guided: bool
) -> None:
    # Not so fine that float32 could put a boundary of top-k or top-p elsewhere.
    logits = (randn(40, 2000, seed=1, scale=2) * 256).round() / 256
    uncond = (randn(40, 2000, seed=2, scale=2) * 256).round() / 256 if guided else None
    arguments = {"top_k": top_k, "top_p": top_p, "temperature": 0.75, "guidance": 2.5}
    probabilities = exact(logits, uncond=uncond, **arguments)
    draw = sample_top_k_top_p(
        logits.to(device),
        uncond=uncond.to(device) if guided else None,
        seed=77,
        offset=5,
        return_probability=True,
        **arguments,
    )
    # A code at top-p's boundary may fall to the other side by rounding: it has at most this much.
    edge = 0.0
    if 0 < top_p < 1:
        kept = probabilities > 0
        edge = float(probabilities.masked_fill(~kept, 1).amin(-1).max())
    assert_draws(draw, probabilities, 77, 2e-5 + edge, offset=5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", [1, 2, 15, 16, 17, 127, 128, 129, 1000, 4099, 32768, 128256])
def test_sizes_and_dtypes(device: str, codes: int, dtype: torch.dtype) -> None:
    logits = randn(3, codes, seed=codes, scale=3).to(dtype)
    top_k = min(100, codes)
    draw = sample_top_k_top_p(logits.to(device), top_k=top_k, seed=3, return_probability=True)
    assert_draws(draw, exact(logits, top_k=top_k), 3, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.7},
        {"top_k": 20, "top_p": 0.6},
        {"top_k": 20, "top_p": 0.9, "temperature": 2.0},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    ],
    ids=str,
)
def test_frequencies(device: str, arguments: dict[str, Any]) -> None:
    """Chi-square over 200,000 draws of one row, and nothing outside of the support."""
    draws = 200_000
    logits = randn(64, seed=9, scale=1.5)
    rows = logits.to(device).expand(draws, 64)  # one row's memory
    counts = sample_top_k_top_p(rows, seed=1, **arguments).cpu().bincount(minlength=64)
    expected = exact(logits, **arguments) * draws
    assert (counts[expected == 0] == 0).all()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [0, 3, 6, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.77, 1.0])
def test_ties(device: str, top_k: int, top_p: float) -> None:
    """Logits of five values: ties at the k-th place stay, at top-p's boundary the lower index goes
    first."""
    logits = torch.randint(-2, 3, (300, 40), generator=torch.Generator().manual_seed(4)).float()
    logits[0] = 0
    # Weights that are powers of two: sums and shares are exact in the kernel and in float64.
    logits = logits * torch.tensor(2.0, dtype=torch.float64).log().float()
    probabilities = exact(logits.double().round(decimals=5), top_k=top_k, top_p=top_p)
    draw = sample_top_k_top_p(
        logits.to(device), top_k=top_k, top_p=top_p, seed=8, return_probability=True
    )
    chosen = probabilities.gather(1, draw.indices.cpu().unsqueeze(1)).squeeze(1)
    smallest = probabilities.masked_fill(probabilities == 0, 1).amin(1)
    assert ((chosen > 0) | (top_p > 0)).all()
    assert_draws(draw, probabilities, 8, 1e-5 + (float(smallest.max()) if top_p else 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_at_the_boundary_of_top_p(device: str) -> None:
    """Eight equal codes and p = 0.5: the sum of the first four is exactly 1 - p, so they go."""
    logits = torch.zeros(4000, 8, device=device)
    drawn = sample_top_k_top_p(logits, top_p=0.5, seed=0)
    assert drawn.unique().tolist() == [4, 5, 6, 7]
    drawn = sample_top_k_top_p(logits, top_p=0.51, seed=0)
    assert drawn.unique().tolist() == [3, 4, 5, 6, 7]
    drawn = sample_top_k_top_p(logits, top_p=1e-9, seed=0)
    assert drawn.unique().tolist() == [7]
    drawn = sample_top_k_top_p(logits, top_k=3, seed=0)  # all tie with the third
    assert drawn.unique().tolist() == list(range(8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax(device: str, dtype: torch.dtype) -> None:
    logits = randn(50, 300, seed=6).to(dtype)  # half precision: ties
    logits[1] = -0.0
    logits[1, 7:9] = 0.0  # no larger
    logits[2, 5:] = -torch.inf
    draw = sample_top_k_top_p(logits.to(device), top_k=1, return_probability=True)
    assert torch.equal(draw.indices.cpu(), logits.float().argmax(-1))
    assert draw.indices[1] == 0
    assert (draw.probability == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_extremes(device: str) -> None:
    logits = torch.full((6, 1000), -torch.inf)
    logits[0, 999] = -3.0e38  # all but one code masked
    logits[1, [3, 500]] = torch.tensor([1.0e38, -1.0e38])
    logits[2] = 3.0e38  # equal and huge
    logits[3] = -3.4e38
    logits[3, 10] = 3.4e38  # the difference is not a float32
    logits[4] = torch.arange(1000) * 1e-42  # subnormal
    logits[5] = torch.arange(1000) * -40.0  # weights of 2^-58 and less
    draws = logits.to(device).repeat(200, 1)
    for arguments in ({}, {"top_k": 600}, {"top_p": 0.8}, {"top_k": 600, "top_p": 0.8}):
        drawn = sample_top_k_top_p(draws, seed=2, **arguments).view(200, 6).cpu()
        assert (drawn[:, 0] == 999).all()
        assert (drawn[:, 1] == 3).all()
        assert len(drawn[:, 2].unique()) > 100
        assert (drawn[:, 3] == 10).all()
        assert len(drawn[:, 4].unique()) > 100
        assert (drawn[:, 5] == 0).all()


MASKS = {
    torch.float32: (-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min),
    torch.bfloat16: (-torch.inf, torch.finfo(torch.bfloat16).min),
    torch.float16: (-torch.inf, torch.finfo(torch.float16).min),
}


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_masked_codes_are_never_drawn(device: str, data: st.DataObject) -> None:
    """Whatever the mask, where it is and what is done to the logits; the rest is drawn from as if
    the masked codes were not there."""
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, codes = 40, data.draw(st.sampled_from([2, 5, 16, 50, 129, 700]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    cond = (torch.randn(rows, codes, generator=generator) * 16).round().div(8).to(dtype)
    uncond = (torch.randn(rows, codes, generator=generator) * 8).round().div(8).to(dtype)
    # Sums of few bits: what is a tie in float64 is one in float32.
    guidance = data.draw(st.sampled_from([0.0, 0.25, 1.0, 3.0, 7.5, 1e4, -0.5, -1.0, -2.5]))
    masked = torch.rand(rows, codes, generator=generator) < data.draw(st.floats(0.1, 0.95))
    masked[:, data.draw(st.integers(0, codes - 1))] = False  # something to draw
    where = data.draw(st.sampled_from(["cond", "uncond", "both"]))
    if where != "uncond":
        cond[masked] = data.draw(st.sampled_from(MASKS[dtype]))
    if where != "cond":
        uncond[masked] = data.draw(st.sampled_from(MASKS[dtype]))
    arguments = {
        "guidance": guidance,
        "top_k": data.draw(st.sampled_from([0, 1, 3, codes])),
        "top_p": data.draw(st.sampled_from([0.0, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 1e-9])),
        "temperature": data.draw(st.sampled_from([1.0, 0.7, 1e-30, 1e-300, 50.0])),
    }
    draw = sample_top_k_top_p(
        cond.to(device),
        uncond=uncond.to(device),
        seed=5,
        check=data.draw(st.booleans()),
        return_probability=True,
        **arguments,
    )
    if where == "uncond" and guidance == 0:
        masked[:] = False
    assert not masked[torch.arange(rows), draw.indices.cpu()].any()
    if guidance < 100 and arguments["temperature"] > 0.1:  # else float32's rounding of z is felt
        wide = [x.double().masked_fill(masked, -torch.inf) for x in (cond, uncond)]
        wide[1].masked_fill_(masked, 0.0)
        assert_draws(draw, exact(wide[0], uncond=wide[1], **arguments), 5, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [0.0, 3.0, -2.0])
def test_a_row_of_masked_codes(device: str, dtype: torch.dtype, guidance: float) -> None:
    """An error that names the row, or index 0 with probability 0."""
    for mask in MASKS[dtype]:
        logits, uncond = randn(3, 40, seed=1).to(dtype), randn(3, 40, seed=2).to(dtype)
        logits[1, :20] = mask
        (uncond if guidance else logits)[1, 20:] = mask
        logits, uncond = logits.to(device), uncond.to(device)
        arguments = {"uncond": uncond, "guidance": guidance, "seed": 1, "top_k": 7}
        with pytest.raises(RuntimeError, match="nothing but masked codes in row 1"):
            sample_top_k_top_p(logits, check=True, **arguments)
        draw = sample_top_k_top_p(logits, check=False, return_probability=True, **arguments)
        assert draw.indices[1] == 0
        assert draw.probability[1] == 0
        assert (draw.probability[::2] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 1.6e38])
@pytest.mark.parametrize("guidance", [0.0, 0.4, 7.5, 300.0, -8.5])
def test_any_magnitude(device: str, size: float, guidance: float) -> None:
    """Logits up to the largest float32, and a temperature of their size: z does not overflow."""
    steps = torch.randint(-2, 3, (2, 60, 50), generator=torch.Generator().manual_seed(3)).float()
    logits, uncond = (steps * size).unbind()
    temperature = size * max(1.0, abs(guidance))
    arguments = {"guidance": guidance, "temperature": temperature}
    probabilities = exact(logits, uncond=uncond, **arguments)
    for filters in ({}, {"top_k": 20}, {"min_p": 0.05}):
        if filters:
            probabilities = exact(logits, uncond=uncond, **arguments, **filters)
        draw = sample_top_k_top_p(
            logits.to(device),
            uncond=uncond.to(device),
            seed=4,
            return_probability=True,
            **arguments,
            **filters,
        )
        assert_draws(draw, probabilities, 4, 1e-4)
    # At temperature 1 only the largest is left of logits so far apart.
    if size >= 1:
        largest = sample_top_k_top_p(
            logits.to(device), uncond=uncond.to(device), guidance=guidance, top_k=1
        )
        z = logits.double() if guidance == 0 else (1 + guidance) * logits.double()
        z = z - guidance * uncond.double()
        kept = z.gather(1, largest.cpu().unsqueeze(1)).squeeze(1)
        assert ((z.amax(1) - kept) <= 1e-6 * z.abs().amax(1)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("min_p", [1e-12, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 1, 40, 1999])
def test_min_p(device: str, top_k: int, top_p: float, min_p: float) -> None:
    logits = (randn(30, 2000, seed=1, scale=2) * 256).round() / 256
    arguments = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 0.75}
    probabilities = exact(logits, **arguments)
    draw = sample_top_k_top_p(logits.to(device), seed=7, return_probability=True, **arguments)
    # As in test_is_the_inverse_distribution_function, for top-p's boundary.
    edge = float(probabilities.masked_fill(probabilities == 0, 1).amin(-1).max()) if top_p else 0.0
    assert_draws(draw, probabilities, 7, 2e-5 + edge)
    assert (probabilities.gather(1, draw.indices.cpu().unsqueeze(1)) > 0).all() or top_p


@pytest.mark.parametrize("device", DEVICES)
def test_min_p_of_each_row_and_at_its_boundary(device: str) -> None:
    """Weights 1, 1/2, 1/4 ... to the bit: a code at just min_p stays."""
    logits = -torch.arange(8) * torch.tensor(2.0, dtype=torch.float64).log()
    logits = logits.float().to(device).expand(3000, 8)
    for min_p, stay in [(1.0, 1), (0.51, 1), (0.49999, 2), (0.25 - 1e-6, 3), (0.0, 8), (-3.0, 8)]:
        drawn = sample_top_k_top_p(logits, min_p=min_p, seed=1)
        assert drawn.unique().tolist() == list(range(stay))
    min_p = torch.tensor([0.49999, 0.0, 1.0], device=device).repeat(1000)
    drawn = sample_top_k_top_p(logits, min_p=min_p, seed=1).view(1000, 3)
    assert [len(drawn[:, i].unique()) for i in range(3)] == [2, 8, 1]
    ties = torch.zeros(2000, 5, device=device)
    assert len(sample_top_k_top_p(ties, min_p=1.0, seed=1).unique()) == 5


@pytest.mark.parametrize("device", DEVICES)
def test_more_codes_asked_for_than_there_are(device: str) -> None:
    logits = randn(50, 64).to(device)
    off = sample_top_k_top_p(logits, seed=1, top_p=0.9)
    for top_k in (65, 1200, 2**31 - 1, torch.tensor(2**31 - 1, device=device)):
        assert torch.equal(off, sample_top_k_top_p(logits, seed=1, top_p=0.9, top_k=top_k))
    for top_k in (2**31, 2**63 - 1, 2**63, 2**100):
        with pytest.raises(ValueError, match=f"top_k must be at most .* got {top_k}"):
            sample_top_k_top_p(logits, top_k=top_k, check=False)


@pytest.mark.parametrize("device", DEVICES)
def test_guidance_keeps_masked_codes_masked(device: str) -> None:
    logits, uncond = randn(100, 64, seed=1), randn(100, 64, seed=2)
    logits[:, ::2] = -torch.inf
    uncond[:, ::2] = -torch.inf
    drawn = sample_top_k_top_p(
        logits.to(device), uncond=uncond.to(device), guidance=3.0, top_p=0.9, seed=1
    )
    assert (drawn % 2 == 1).all()
    # Without guidance the unconditional logits are not looked at.
    uncond[:] = torch.nan
    unguided = sample_top_k_top_p(logits.to(device), uncond=uncond.to(device), seed=1)
    assert torch.equal(unguided, sample_top_k_top_p(logits.to(device), seed=1))


@pytest.mark.parametrize("device", DEVICES)
def test_an_argument_for_each_row(device: str) -> None:
    rows, codes = 24, 500
    logits, uncond = randn(rows, codes, seed=1), randn(rows, codes, seed=2)
    generator = torch.Generator().manual_seed(5)
    arguments = {
        "top_k": torch.randint(0, 60, (rows,), generator=generator),
        "top_p": torch.rand(rows, generator=generator, dtype=torch.float64) * 1.2 - 0.2,
        "min_p": torch.rand(rows, generator=generator) * 0.2 - 0.1,
        "temperature": torch.rand(rows, generator=generator) + 0.5,
        "guidance": torch.randint(0, 3, (rows,), generator=generator).float(),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "offset": torch.randint(0, 2**40, (rows,), generator=generator),
    }
    arguments["top_p"].clamp_(max=1.0)
    on_device = {name: value.to(device) for name, value in arguments.items()}
    logits_, uncond_ = logits.to(device), uncond.to(device)
    together = sample_top_k_top_p(logits_, uncond=uncond_, return_probability=True, **on_device)
    for row in range(rows):
        alone = sample_top_k_top_p(
            logits_[row],
            uncond=uncond_[row],
            return_probability=True,
            **{name: value[row].item() for name, value in arguments.items()},
        )
        assert alone.indices.shape == ()
        assert torch.equal(alone.indices, together.indices[row])
        assert torch.equal(alone.probability, together.probability[row])
    # One for each may be broadcast; one of a single row, too.
    k = torch.tensor([[3], [9]], device=device)
    pairs = sample_top_k_top_p(logits_.view(2, 12, codes), top_k=k, seed=1)
    assert torch.equal(pairs[1], sample_top_k_top_p(logits_[12:], top_k=9, seed=1, offset=12))
    assert torch.equal(pairs[:1], sample_top_k_top_p(logits_[None, :12], top_k=k[:1], seed=1))
    with pytest.raises(ValueError, match="top_k must be one number or one for each"):
        sample_top_k_top_p(logits_, top_k=torch.ones(7, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="top_k must hold integers"):
        sample_top_k_top_p(logits_, top_k=torch.ones(rows, device=device))


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_strides_and_slices(device: str, data: st.DataObject) -> None:
    """Any view of rows gives what a copy gives, and nothing outside the slice is read."""
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    codes = data.draw(st.integers(1, 300))
    before, after = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    last = data.draw(st.integers(1, tokens))
    whole = torch.full((2 * batch, tokens, before + codes + after), torch.nan, dtype=dtype)
    vocab = (before, before + codes)
    whole[:, -last:, before : before + codes] = randn(2 * batch, last, codes, seed=codes).to(dtype)
    if data.draw(st.booleans()):  # the codes of a row apart
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    cond, uncond = whole.to(device)[:, -last:].chunk(2)
    arguments = {
        "top_k": data.draw(st.integers(0, codes)),
        "top_p": data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        "guidance": data.draw(st.sampled_from([0.0, 1.5])),
        "seed": 11,
    }
    drawn = sample_top_k_top_p(cond, uncond=uncond, vocab=vocab, **arguments)
    assert drawn.shape == (batch, last)
    copy, uncond_copy = (x[..., vocab[0] : vocab[1]].clone().contiguous() for x in (cond, uncond))
    assert torch.equal(drawn, sample_top_k_top_p(copy, uncond=uncond_copy, **arguments))
    out = torch.empty_like(drawn)
    assert sample_top_k_top_p(copy, uncond=uncond_copy, out=out, **arguments) is out
    assert torch.equal(drawn, out)


def test_more_dimensions() -> None:
    logits = randn(2, 3, 4, 5, 60)
    drawn = sample_top_k_top_p(logits, top_k=9, seed=1)
    assert drawn.shape == (2, 3, 4, 5)
    assert torch.equal(drawn.flatten(), sample_top_k_top_p(logits.view(-1, 60), top_k=9, seed=1))
    swapped = logits.transpose(0, 2)
    assert torch.equal(
        sample_top_k_top_p(swapped, seed=1), sample_top_k_top_p(swapped.clone(), seed=1)
    )
    assert sample_top_k_top_p(torch.empty(0, 7)).shape == (0,)


# ------------------------------------------------------------------ random numbers


def test_philox_known_answers() -> None:
    """The vectors published with the generator (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    for counter, key, answer in [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        assert philox(counter, key) == answer


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_do_not_know_the_batch(device: str) -> None:
    logits = randn(64, 3000, seed=3).to(device)
    whole = sample_top_k_top_p(logits, top_k=500, top_p=0.9, seed=5, offset=100)
    for first in range(0, 64, 13):
        part = logits[first : first + 13]
        drawn = sample_top_k_top_p(part, top_k=500, top_p=0.9, seed=5, offset=100 + first)
        assert torch.equal(drawn, whole[first : first + 13])
    other = sample_top_k_top_p(logits, top_k=500, top_p=0.9, seed=6, offset=100)
    assert (other != whole).any()
    # The same number as a tensor; one a row makes every row a stream of its own.
    as_tensor = torch.tensor(5, device=device)
    assert torch.equal(
        whole,
        sample_top_k_top_p(
            logits, top_k=500, top_p=0.9, seed=as_tensor, offset=torch.tensor(100, device=device)
        ),
    )
    rows = logits[:1].expand(64, -1)
    alike = sample_top_k_top_p(rows, seed=torch.full((64,), 5, device=device), offset=3)
    assert len(alike.unique()) == 1


def test_seeds_are_64_bits() -> None:
    logits = randn(100, 50)
    drawn = sample_top_k_top_p(logits, seed=2**64 - 3)
    assert torch.equal(drawn, sample_top_k_top_p(logits, seed=-3))
    assert (drawn != sample_top_k_top_p(logits, seed=2**63 - 3)).any()
    with pytest.raises(ValueError, match="seed must be one number or one for each row"):
        sample_top_k_top_p(logits.view(10, 10, 50), seed=torch.zeros(10, 1, dtype=torch.int64))
    # Modulo 2^64, and so is the place in the stream.
    for seed in (2**64 - 3, -3 - 2**64, 5 * 2**64 - 3):
        assert torch.equal(drawn, sample_top_k_top_p(logits, seed=seed))
    assert torch.equal(
        sample_top_k_top_p(logits, seed=1, offset=2**64 - 1),
        sample_top_k_top_p(logits, seed=1, offset=-1),
    )


def test_integers_and_numbers_of_any_kind() -> None:
    logits = randn(100, 50)
    plain = sample_top_k_top_p(logits, seed=7, offset=3, top_k=9, top_p=0.5, vocab=(2, 40))
    numpy = sample_top_k_top_p(
        logits,
        seed=np.int64(7),
        offset=np.uint8(3),
        top_k=np.int32(9),
        top_p=np.float32(0.5),
        temperature=np.int16(1),
        vocab=np.array([2, 40]),
    )
    assert torch.equal(plain, numpy)
    seed = np.random.default_rng(1).integers(2**63)
    assert torch.equal(
        sample_top_k_top_p(logits, seed=seed), sample_top_k_top_p(logits, seed=int(seed))
    )
    large = np.uint64(2**64 - 3)
    assert torch.equal(sample_top_k_top_p(logits, seed=large), sample_top_k_top_p(logits, seed=-3))
    for dtype in (torch.int32, torch.uint8, torch.uint64):
        tensor = torch.tensor(7, dtype=dtype)
        drawn = sample_top_k_top_p(logits, seed=tensor)
        assert torch.equal(drawn, sample_top_k_top_p(logits, seed=7))


def test_seeds_do_not_know_the_threads() -> None:
    logits, threads = randn(37, 5000, seed=3), torch.get_num_threads()
    expected = sample_top_k_top_p(logits, top_k=700, top_p=0.8, seed=1)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(expected, sample_top_k_top_p(logits, top_k=700, top_p=0.8, seed=1))
    finally:
        torch.set_num_threads(threads)


def test_default_seed_comes_from_torch() -> None:
    logits = randn(200, 100)
    torch.manual_seed(3)
    first, second = sample_top_k_top_p(logits), sample_top_k_top_p(logits)
    assert (first != second).any()
    torch.manual_seed(3)
    assert torch.equal(first, sample_top_k_top_p(logits))
    generator = torch.Generator().manual_seed(8)
    state = torch.get_rng_state()
    drawn = sample_top_k_top_p(logits, generator=generator)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, sample_top_k_top_p(logits, generator=generator.manual_seed(8)))


_ONE_SET = """
import sys, torch
from tokenflow_ext import build_info, sample_top_k_top_p
assert build_info()["cpu_instruction_set"] == sys.argv[1], build_info()
generator = torch.Generator().manual_seed(0)
drawn = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for codes in (100, 3001):
        logits = (torch.randn(50, codes, generator=generator) * 2).to(dtype)
        uncond = torch.randn(50, codes, generator=generator).to(dtype)
        logits[:, 3::7] = torch.finfo(dtype).min
        uncond[:, 2::5] = -torch.inf
        for k, p, more in ((0, 0.0, {}), (20, 0.0, {}), (0, 0.7, {}), (90, 0.8, {}), (1, 0.0, {}),
                           (90, 0.9, {"min_p": 0.1}), (0, 0.0, {"min_p": 0.02})):
            got = sample_top_k_top_p(logits, uncond=uncond, guidance=1.7, temperature=0.9, top_k=k,
                                     top_p=p, seed=4, return_probability=True, **more)
            drawn += [got.indices.tolist(), got.probability.tolist()]
print(drawn)
"""


def test_every_instruction_set_draws_the_same() -> None:
    """Bit for bit, probabilities included."""
    from tokenflow_ext import build_info

    best = build_info()["cpu_instruction_set"]
    x86 = ["portable", "avx2", "avx512", "avx512_vnni", "amx"]
    sets = ["portable", "dotprod"] if best == "dotprod" else x86
    here = sets.index(best)
    if here == 0:
        pytest.skip("this machine has one instruction set")
    results = {
        name: subprocess.run(
            [sys.executable, "-P", "-c", _ONE_SET, name],
            env={**os.environ, "TOKENFLOW_CPU": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in sets[: here + 1]
    }
    assert len(set(results.values())) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", [33, 4096, 32768, 200_000])
def test_cuda_draws_what_the_cpu_draws(codes: int, dtype: torch.dtype) -> None:
    logits, uncond = randn(20, codes, seed=1).to(dtype), randn(20, codes, seed=2).to(dtype)
    logits[:, 1::9], uncond[:, 3::9] = torch.finfo(dtype).min, -torch.inf
    for top_k, top_p, min_p in [
        *((0, 0.0, 0.0), (30, 0.0, 0.0), (0, 0.8, 0.0), (30, 0.8, 0.0), (1, 0.0, 0.0)),
        *((codes // 2, 0.5, 0.0), (0, 0.0, 0.1), (30, 0.8, 0.2)),
    ]:
        arguments = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": 9}
        arguments |= {"guidance": 2.2, "temperature": 0.8}
        cpu = sample_top_k_top_p(logits, uncond=uncond, return_probability=True, **arguments)
        cuda = sample_top_k_top_p(
            logits.cuda(), uncond=uncond.cuda(), return_probability=True, **arguments
        )
        assert torch.equal(cpu.indices, cuda.indices.cpu())
        assert torch.equal(cpu.probability, cuda.probability.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_replays_draw_anew() -> None:
    logits = randn(128, 4096).cuda()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    sample_top_k_top_p(logits, top_k=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        from_generator = sample_top_k_top_p(logits, top_k=100)
        from_seed = sample_top_k_top_p(logits, top_k=100, seed=seed)
    graph.replay()
    first = from_generator.clone(), from_seed.clone()
    seed.add_(1)
    graph.replay()
    assert (first[0] != from_generator).any()
    assert (first[1] != from_seed).any()
    assert torch.equal(from_seed, sample_top_k_top_p(logits, top_k=100, seed=1))


# ------------------------------------------------------------------ what makes no sense


def bad_rows() -> tuple[Tensor, dict[str, Any]]:
    """Rows of which every other one is as it should be."""
    logits = randn(16, 50, seed=1)
    arguments = {
        "top_k": torch.full((16,), 5),
        "top_p": torch.full((16,), 0.9, dtype=torch.float64),
        "min_p": torch.full((16,), 0.01),
        "temperature": torch.ones(16),
        "seed": 3,
    }
    logits[1, 7] = torch.nan
    logits[3] = -torch.inf
    logits[5, [2, 9]] = torch.inf
    logits[7] = torch.nan
    arguments["top_k"][9] = 2**31
    arguments["top_p"][11] = 1.5
    arguments["min_p"][12] = 1.5
    arguments["temperature"][13] = 0.0
    arguments["temperature"][15] = torch.nan
    return logits, arguments


@pytest.mark.parametrize("device", DEVICES)
def test_defined_results(device: str) -> None:
    logits, arguments = bad_rows()
    good = {**arguments, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 1.0}
    draw = sample_top_k_top_p(
        logits.to(device),
        check=False,
        return_probability=True,
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()},
    )
    indices, probability = draw.indices.cpu(), draw.probability.cpu()
    assert ((indices >= 0) & (indices < 50)).all()
    clean = logits.nan_to_num(0.0, 0.0, 0.0)
    expected = sample_top_k_top_p(clean, **good)
    as_good = [row for row in range(0, 16, 2) if row != 12]
    assert torch.equal(indices[as_good], expected[as_good]), "a bad row changed its neighbours"
    masked = sample_top_k_top_p(logits[1].nan_to_num(-torch.inf), **{**good, "offset": 1})
    assert indices[1] == masked  # a NaN is a masked code
    assert indices[3] == 0  # nothing to draw
    assert probability[3] == 0
    assert indices[5] in (2, 9)  # +infinity takes all
    assert probability[5] in (0.5, 1.0)
    assert indices[7] == 0
    assert probability[7] == 0
    off = sample_top_k_top_p(logits[9], top_p=0.9, min_p=0.01, seed=3, offset=9)
    assert indices[9] == off  # a k of 2^31 is off
    off = sample_top_k_top_p(logits[11], top_k=5, min_p=0.01, seed=3, offset=11)
    assert indices[11] == off
    assert indices[12] == sample_top_k_top_p(logits[12], top_k=5, top_p=0.9, seed=3, offset=12)
    assert indices[13] == logits[13].argmax()
    assert indices[15] == logits[15].argmax()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (1, "logits must not hold a NaN, got one in row 1"),
        (3, "logits must leave a code to draw, got nothing but masked codes in row 3"),
        (5, r"logits must not hold \+infinity.* in row 5"),
        (7, "logits must not hold a NaN, got one in row 7"),
        (9, r"top_k must be at most 2\*\*31 - 1, got more in row 9"),
        (11, "top_p must be at most 1, got more or a NaN in row 11"),
        (12, "min_p must be at most 1, got more or a NaN in row 12"),
        (13, "temperature must be positive and finite, got another in row 13"),
        (15, "temperature must be positive and finite, got another in row 15"),
    ],
)
def test_checks(device: str, row: int, message: str) -> None:
    logits, arguments = bad_rows()
    good_logits = randn(16, 50, seed=1)
    good_logits[row] = logits[row]
    good = {
        "top_k": torch.full((16,), 5),
        "top_p": torch.full((16,), 0.9, dtype=torch.float64),
        "min_p": torch.full((16,), 0.01),
        "temperature": torch.ones(16),
    }
    for name, value in good.items():
        value[row] = arguments[name][row]
    good = {name: value.to(device) for name, value in good.items()}
    with pytest.raises(RuntimeError, match=message):
        sample_top_k_top_p(good_logits.to(device), check=True, **good)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=message):
            sample_top_k_top_p(good_logits, **good)


def test_bad_arguments() -> None:
    logits = randn(4, 50)
    for arguments, message in [
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0 of float"),
        ({"top_k": True}, "top_k must be an integer, got True of bool"),
        ({"top_k": torch.ones(4, device="meta", dtype=torch.int64)}, "top_k must be on the device"),
        ({"top_p": 1.1}, "top_p must be at most 1"),
        ({"top_p": "0.9"}, "top_p must be a number, got '0.9' of str"),
        ({"top_p": torch.ones(4, dtype=torch.bool)}, "top_p must hold numbers, got torch.bool"),
        ({"min_p": 1.1}, "min_p must be at most 1"),
        ({"min_p": float("nan")}, "min_p must be at most 1"),
        ({"min_p": None}, "min_p must be a number, got None"),
        ({"min_p": torch.ones(3)}, "min_p must be one number or one for each"),
        ({"temperature": torch.ones(4, device="meta")}, "temperature must be on the device"),
        ({"guidance": 1j}, "guidance must be a number"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5 of float"),
        ({"seed": True}, "seed must be an integer, got True of bool"),
        ({"seed": "7"}, "seed must be an integer"),
        ({"seed": torch.ones(4)}, "seed must hold integers, got torch.float32"),
        ({"seed": torch.ones(4, dtype=torch.bool)}, "seed must hold integers, got torch.bool"),
        ({"seed": torch.ones((), device="meta", dtype=torch.int64)}, "seed must be on the device"),
        ({"offset": np.float64(2)}, "offset must be an integer"),
        ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator exclude each other"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"uncond": logits, "guidance": float("nan")}, "guidance must be finite"),
        ({"uncond": logits.half()}, "uncond must have the dtype of logits"),
        ({"out": torch.empty(4)}, "out must be int64"),
        ({"uncond": logits[:2]}, "uncond must have the shape of logits"),
        ({"uncond": logits.to("meta")}, "uncond must have .* lie on cpu, got .* on meta"),
        ({"uncond": logits.numpy()}, "uncond must be a tensor, got ndarray"),
        ({"vocab": (3, 3)}, r"vocab must be a slice .* got \(3, 3\)"),
        ({"vocab": (0, 51)}, "vocab must be a slice"),
        ({"vocab": (0, 20.5)}, "vocab must be a slice"),
        ({"vocab": (0, 20, 30)}, "vocab must be a slice"),
        ({"vocab": 20}, "vocab must be a slice"),
        ({"out": torch.empty(4, dtype=torch.int64, device="meta")}, "out must be int64 .* on cpu"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed must be one number or one for each"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            sample_top_k_top_p(logits, **arguments)
    for bad, message in [
        (logits.double(), "logits must be float32, bfloat16 or float16"),
        (torch.empty(4, 0), "logits must have 1 to"),
        (torch.tensor(1.0), "logits must have a dimension"),
        (logits.numpy(), "logits must be a tensor, got ndarray"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            sample_top_k_top_p(bad)


# ------------------------------------------------------------------ torch.library


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    logits = randn(2, 3, 50).to(device)
    seeds = torch.arange(6, device=device)
    operator = torch.ops.tokenflow_ext.sample_top_k_top_p.default
    number = (5, None, 0.9, None, 0.1, None, 1.0, None, 2.0, None, 7, None, 0, None, False)
    torch.library.opcheck(operator, (logits, logits.flip(-1), *number))
    torch.library.opcheck(operator, (logits, None, *number[:11], seeds, 0, None, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device: str) -> None:
    logits, uncond = randn(8, 100, seed=1).to(device), randn(8, 100, seed=2).to(device)
    seed = torch.tensor(4, device=device)

    def step(logits: Tensor, uncond: Tensor, seed: Tensor) -> Tensor:
        return sample_top_k_top_p(
            logits * 2, uncond=uncond, guidance=1.5, top_k=20, min_p=0.1, vocab=(10, 90), seed=seed
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, uncond, seed), step(logits, uncond, seed))
    drawing = torch.compile(
        lambda x: sample_top_k_top_p(x, top_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert drawing(logits).shape == (8,)
    # Numbers that change, so that they are symbols in the graph.
    numbers = torch.compile(
        lambda x, k, p, seed: sample_top_k_top_p(x, top_k=k, top_p=p, seed=seed),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for k, p, number in ((5, 0.5, 1), (9, 0.8, 2), (120, 0.9, 3)):
        assert torch.equal(
            numbers(logits, k, p, number), sample_top_k_top_p(logits, top_k=k, top_p=p, seed=number)
        )
