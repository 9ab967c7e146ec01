"""sample_top_k_top_p against the float64 distribution and Philox, both written another way."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

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
    if arguments.get("uncond") is not None:
        arguments["uncond"] = arguments["uncond"].double()
    return filtered_probabilities(logits.double(), **arguments)


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
        sample_top_k_top_p(logits_, top_k=torch.ones(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="top_k must hold integers"):
        sample_top_k_top_p(logits_, top_k=torch.ones(rows))


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
        for k, p in ((0, 0.0), (20, 0.0), (0, 0.7), (90, 0.8), (1, 0.0)):
            got = sample_top_k_top_p(logits, uncond=uncond, guidance=1.7, temperature=0.9, top_k=k,
                                     top_p=p, seed=4, return_probability=True)
            drawn += [got.indices.tolist(), got.probability.tolist()]
print(drawn)
"""


def test_every_instruction_set_draws_the_same() -> None:
    """Bit for bit, probabilities included."""
    from tokenflow_ext import build_info

    sets = ["portable", "avx2", "avx512", "avx512_vnni"]
    here = sets.index(build_info()["cpu_instruction_set"])
    if here == 0:
        pytest.skip("this machine has one instruction set")
    results = {
        name: subprocess.run(
            [sys.executable, "-c", _ONE_SET, name],
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
    for top_k, top_p in [(0, 0.0), (30, 0.0), (0, 0.8), (30, 0.8), (1, 0.0), (codes // 2, 0.5)]:
        arguments = {"top_k": top_k, "top_p": top_p, "guidance": 2.2, "temperature": 0.8, "seed": 9}
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
        "temperature": torch.ones(16),
        "seed": 3,
    }
    logits[1, 7] = torch.nan
    logits[3] = -torch.inf
    logits[5, [2, 9]] = torch.inf
    logits[7] = torch.nan
    arguments["top_k"][9] = 51
    arguments["top_p"][11] = 1.5
    arguments["temperature"][13] = 0.0
    arguments["temperature"][15] = torch.nan
    return logits, arguments


@pytest.mark.parametrize("device", DEVICES)
def test_defined_results(device: str) -> None:
    logits, arguments = bad_rows()
    good = {**arguments, "top_k": 5, "top_p": 0.9, "temperature": 1.0}
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
    assert torch.equal(indices[::2], expected[::2]), "a bad row changed its neighbours"
    masked = sample_top_k_top_p(logits[1].nan_to_num(-torch.inf), **{**good, "offset": 1})
    assert indices[1] == masked  # a NaN is a masked code
    assert indices[3] == 0  # nothing to draw
    assert probability[3] == 0
    assert indices[5] in (2, 9)  # +infinity takes all
    assert probability[5] in (0.5, 1.0)
    assert indices[7] == 0
    assert probability[7] == 0
    off = sample_top_k_top_p(logits[9], top_p=0.9, seed=3, offset=9)
    assert indices[9] == off  # k > V is off
    assert indices[11] == sample_top_k_top_p(logits[11], top_k=5, seed=3, offset=11)
    assert indices[13] == logits[13].argmax()
    assert indices[15] == logits[15].argmax()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (1, "logits must not hold a NaN, got one in row 1"),
        (3, "logits must leave a code to draw, got nothing but -infinity in row 3"),
        (5, r"logits must not hold \+infinity.* in row 5"),
        (7, "logits must not hold a NaN, got one in row 7"),
        (9, "top_k must be at most the number of codes, got more in row 9"),
        (11, "top_p must be at most 1, got more or a NaN in row 11"),
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
        ({"top_k": 51}, "top_k must be at most the number of codes"),
        ({"top_p": 1.1}, "top_p must be at most 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"uncond": logits, "guidance": float("nan")}, "guidance must be finite"),
        ({"uncond": logits.half()}, "uncond must have the dtype of logits"),
        ({"out": torch.empty(4)}, "out must be int64"),
        ({"uncond": logits[:2]}, "uncond must have the shape of logits"),
        ({"vocab": (3, 3)}, r"vocab must be a slice .* got \(3, 3\)"),
        ({"vocab": (0, 51)}, "vocab must be a slice"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed must be one number or one for each"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            sample_top_k_top_p(logits, **arguments)
    for bad, message in [
        (logits.double(), "logits must be float32, bfloat16 or float16"),
        (torch.empty(4, 0), "logits must have 1 to"),
        (torch.tensor(1.0), "logits must have a dimension"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            sample_top_k_top_p(bad)


# ------------------------------------------------------------------ torch.library


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    logits = randn(2, 3, 50).to(device)
    seeds = torch.arange(6, device=device)
    operator = torch.ops.tokenflow_ext.sample_top_k_top_p.default
    number = (5, None, 0.9, None, 1.0, None, 2.0, None, 7, None, 0, None, False)
    torch.library.opcheck(operator, (logits, logits.flip(-1), *number))
    torch.library.opcheck(operator, (logits, None, *number[:9], seeds, 0, None, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device: str) -> None:
    logits, uncond = randn(8, 100, seed=1).to(device), randn(8, 100, seed=2).to(device)
    seed = torch.tensor(4, device=device)

    def step(logits: Tensor, uncond: Tensor, seed: Tensor) -> Tensor:
        return sample_top_k_top_p(
            logits * 2, uncond=uncond, guidance=1.5, top_k=20, vocab=(10, 90), seed=seed
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, uncond, seed), step(logits, uncond, seed))
    drawing = torch.compile(
        lambda x: sample_top_k_top_p(x, top_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert drawing(logits).shape == (8,)
