"""Scalar quantization against its definition in plain PyTorch, in float64."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.fsq import fsq, fsq_bounded
from quantizer.strategies import DEVICES, pyramids

from tokenflow_ext import scalar


def loop(
    h: torch.Tensor,
    tables: scalar.Tables,
    sizes: list[tuple[int, int]],
    rounds: list[int],
    flips: torch.Tensor | None,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """f^, digits and rows, line by line."""
    residual, total, digits, rows, first = h, torch.zeros_like(h), [], [], 0
    for size, number in zip(sizes, rounds, strict=True):
        z = F.interpolate(residual, size, mode="area").flatten(2).mT
        digit = (z.unsqueeze(-2) > tables.thresholds[number]).sum(-2)
        if flips is not None:
            digit = digit ^ flips[:, first : first + z.shape[1]].long()
        q = tables.values[number].expand(len(h), -1, -1).gather(1, digit)
        u = F.interpolate(q.mT.unflatten(2, size), h.shape[2:], mode=mode, align_corners=False)
        residual, total = residual - u, total + u
        digits.append(digit)
        rows.append(z)
        first += z.shape[1]
    return total, torch.cat(digits, 1), torch.cat(rows, 1)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    sizes=pyramids,
    dim=st.integers(1, 9),
    depth=st.integers(1, 3),
    kind=st.sampled_from(["signs", *scalar.BOUNDS]),
    mode=st.sampled_from(["bicubic", "bilinear"]),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pyramid(
    device: str,
    sizes: list[tuple[int, int]],
    dim: int,
    depth: int,
    kind: str,
    mode: str,
    flip: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "signs":
        tables = scalar.signs(dim, value=0.3, rounds=depth)
    else:
        counts = torch.randint(3, 9, (dim,), generator=generator).tolist()
        tables = scalar.levels(counts, bound=kind, rounds=depth)
    dtype = torch.float32 if device == "cuda" else torch.float64
    tables = scalar.as_computed(tables, dtype, inclusive=kind != "signs")
    tables = tables.each(lambda table: table.to(device))
    h = torch.randn(2, dim, 5, 6, dtype=dtype, generator=generator).to(device).requires_grad_()
    rounds = [number % depth for number in range(len(sizes))]
    count = sum(a * b for a, b in sizes)
    flips = None
    if flip and kind == "signs":
        flips = (torch.rand(2, count, dim, generator=generator) < 0.3).to(device)
    counts = (tables.values.shape[1],) * dim
    found = scalar.quantize(
        h, tables, sizes, counts=counts, rounds=rounds, flips=flips, upsampling=mode
    )
    quantized, digits, rows = loop(h.detach(), tables, sizes, rounds, flips, mode)
    # A number next to a threshold may fall on either side where sums are in another order.
    near = (rows.unsqueeze(-2) - per_token(tables.thresholds, sizes, rounds)).abs().amin(-2)
    same = scalar.unpack_digits(found.indices.squeeze(1), counts) == digits
    if bool((same | (near > 1e-5)).all()) and bool(same.all()):
        torch.testing.assert_close(found.quantized, quantized, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rows, rows, rtol=1e-5, atol=1e-5)
    else:
        first = (~same).flatten(1).any(0).nonzero()[0, 0]
        assert near.flatten(1)[:, first].min() < 1e-4
    # The gradient: through the pooling of the rows and the upsampling of what stands in the
    # values' place, here the rows.
    grad = torch.randn(h.shape, dtype=dtype, generator=generator).to(device)
    by_rows = torch.randn(found.rows.shape, dtype=dtype, generator=generator).to(device)
    (got,) = torch.autograd.grad((found.quantized, found.rows), h, (grad, by_rows))
    x = h.detach().requires_grad_()
    pooled = [F.interpolate(x, size, mode="area") for size in sizes]
    up = [F.interpolate(part, (5, 6), mode=mode, align_corners=False) for part in pooled]
    flat = torch.cat([part.flatten(2).mT for part in pooled], dim=1)
    (wanted,) = torch.autograd.grad((torch.stack(up).sum(0), flat), x, (grad, by_rows))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_rows(device: str, rounds: int, count: int) -> None:
    """The pyramid of one place, round by round."""
    counts = [5, 4, 7]
    tables = scalar.as_computed(
        scalar.levels(counts, rounds=rounds), torch.float32, inclusive=True
    ).each(lambda table: table.to(device))
    rows = torch.randn(count, 3, device=device)
    found = scalar.quantize_rows(rows, tables, counts=counts, keep_codes=True)
    assert found.quantized.shape == rows.shape
    assert found.indices.shape == (count, rounds)
    assert found.codes.shape == (count, rounds, 3)
    torch.testing.assert_close(found.codes.sum(1), found.quantized)
    if count:
        sizes = [(1, 1)] * rounds
        wanted = scalar.quantize(
            rows[..., None, None], tables, sizes, counts=counts, rounds=range(rounds)
        )
        assert torch.equal(found.indices, wanted.indices.squeeze(1))
        torch.testing.assert_close(found.quantized, wanted.quantized.flatten(1))
    bare = scalar.quantize_rows(rows.view(1, count, 3), tables)
    assert torch.equal(bare.quantized.squeeze(0), found.quantized)
    assert bare.indices.numel() == bare.codes.numel() == 0


def per_token(
    tables: torch.Tensor, sizes: list[tuple[int, int]], rounds: list[int]
) -> torch.Tensor:
    return torch.cat(
        [tables[number].expand(a * b, -1, -1) for (a, b), number in zip(sizes, rounds, strict=True)]
    )


@pytest.mark.parametrize("bound", scalar.BOUNDS)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 17, 256])
@pytest.mark.parametrize("rounds", [1, 3])
def test_levels(bound: scalar.Bound, count: int, rounds: int) -> None:
    if bound == "tanh" and count == 2:
        with pytest.raises(ValueError, match="2 levels need another bound than 'tanh'"):
            scalar.levels([3, 2])
        return
    tables = scalar.as_computed(
        scalar.levels([count], bound=bound, rounds=rounds), torch.float64, inclusive=True
    )
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    for number in range(rounds):
        finer = float(count) ** -number
        digit = sum((z * finer > at).long() for at in tables.thresholds[number, :, 0])
        values = tables.values[number, digit, 0]
        expected = fsq(z, count, bound) * finer
        different = (values - expected).abs() > 1e-12
        # Only where tanh rounds a number onto the next level.
        assert different.sum() <= 2
    assert digit.min() == 0
    assert digit.max() == count - 1
    wanted = fsq_bounded(z.unsqueeze(1), torch.tensor([count]).double(), bound)
    torch.testing.assert_close(scalar.bounded(z.unsqueeze(1), [count], bound), wanted)


def test_a_clamped_number_at_a_threshold_is_of_the_upper_level() -> None:
    for dtype in (torch.float32, torch.float64):
        tables = scalar.as_computed(scalar.levels([5], bound="clamp"), dtype, inclusive=True)
        z = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=dtype)
        h = z.view(1, 1, 2, 2)
        indices = scalar.quantize(h, tables, [(2, 2)], counts=[5]).indices
        assert indices.flatten().tolist() == [1, 2, 3, 4]
        lower = z.nextafter(torch.full_like(z, -2)).view(1, 1, 2, 2)
        indices = scalar.quantize(lower, tables, [(2, 2)], counts=[5]).indices
        assert indices.flatten().tolist() == [0, 1, 2, 3]


def test_infinities_and_nan() -> None:
    tables = scalar.as_computed(scalar.levels([3, 6]), torch.float32, inclusive=True)
    h = torch.tensor([torch.inf, -torch.inf, torch.nan, 0]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    indices = scalar.quantize(h.contiguous(), tables, [(2, 2)], counts=[6, 6]).indices
    digits = scalar.unpack_digits(indices.squeeze(1), [6, 6])
    assert digits[0].T.tolist() == [[2, 0, 0, 1], [5, 0, 0, 3]]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    little=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_digits_and_indices(counts: list[int], little: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.stack(
        [torch.randint(count, (4, 3), generator=generator) for count in counts], -1
    )
    indices = scalar.pack_digits(digits.short(), counts, little_endian=little)
    expected = torch.zeros(4, 3, dtype=torch.int64)
    order = range(len(counts)) if little else reversed(range(len(counts)))
    place = 1
    for channel in order:
        expected += place * digits[..., channel]
        place *= counts[channel]
    assert torch.equal(indices, expected)
    assert torch.equal(scalar.unpack_digits(indices, counts, little_endian=little), digits)


def test_groups_and_bad_digits() -> None:
    digits = torch.randint(0, 3, (2, 5, 8), dtype=torch.int16)
    packed = scalar.pack_groups(digits, [3, 4])
    parts = [scalar.pack_digits(part, [3, 4]) for part in digits.split(2, dim=-1)]
    assert torch.equal(packed, torch.stack(parts, 1))
    with pytest.raises(
        ValueError, match=r"digits must have 3 in the last dimension, got \(2, 5, 8"
    ):
        scalar.pack_digits(digits, [2, 2, 2])
    with pytest.raises(RuntimeError, match="digits must have whole groups of 3 channels"):
        scalar.pack_groups(digits, [2, 2, 2])
    with pytest.raises(RuntimeError, match="digits must be int16"):
        torch.ops.tokenflow_ext.pack_digits(digits.long(), [1, 3])


def test_63_bits() -> None:
    digits = torch.ones(1, 63, dtype=torch.int16)
    indices = scalar.pack_digits(digits, [2] * 63)
    assert int(indices) == 2**63 - 1
    assert torch.equal(scalar.unpack_digits(indices, [2] * 63), digits.long())
    with pytest.raises(ValueError, match="64 channels of up to 2 values make indices beyond 63"):
        scalar.pack_digits(torch.ones(1, 64), [2] * 64)


def test_tables_are_made_once_and_not_copied() -> None:
    cache, like = scalar.TableCache(functools.partial(scalar.signs, 3), False), torch.zeros(1)
    assert cache.like(like) is cache.like(like)
    copied = pickle.loads(pickle.dumps(cache))
    assert not copied._made
    assert torch.equal(copied.like(like).values, cache.like(like).values)


def test_compiled_rows() -> None:
    torch._dynamo.reset()
    tables = scalar.as_computed(scalar.levels([5, 4]), torch.float32, inclusive=True)
    rows = torch.randn(2, 7, 2, requires_grad=True)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return scalar.quantize_rows(rows, tables, counts=[5, 4], stand_in="tanh").quantized

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(rows)
    torch.testing.assert_close(got, run(rows))
    gradients = [torch.autograd.grad(out.square().sum(), rows) for out in (got, run(rows))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": torch.zeros(1, 1, 3)}, r"thresholds must have shape .*, 2\]"),
        ({"values": torch.zeros(1, 3, 2)}, "values must be one more than thresholds"),
        ({"rounds": [1]}, "rounds must be 0 to 0, got 1 at position 0"),
        ({"rounds": [0, 0]}, "rounds must name one of each of 1 scales, got 2"),
        ({"flips": torch.zeros(1, 4, 3, dtype=torch.bool)}, r"flips must have shape \[1, 4, 2\]"),
        ({"flips": torch.zeros(1, 4, 2)}, "flips must be bool"),
        ({"thresholds": torch.zeros(1, 1, 2).double()}, "thresholds must have the dtype of h"),
        ({"stand_in": 4}, "stand_in must be 0 to 3, got 4"),
        ({"stand_in": 2}, "curves must be given where stand_in is 2 or 3"),
        ({"curves": torch.zeros(1, 4, 2)}, "curves must be given where stand_in is 2 or 3"),
        (
            {"stand_in": 3, "curves": torch.zeros(1, 3, 2)},
            r"curves must have shape \[1, 4, 2\], got \[1, 3, 2\]",
        ),
        ({"slopes": [1.0, 2.0]}, "slopes must be none or one of each of 1 scales, got 2"),
        ({"places": []}, "places must be 1 to 63, got 0"),
        ({"places": [1, 2, 4]}, "h must have whole groups of 3 channels, got 2"),
    ],
)
def test_bad_operator_arguments(change: dict, message: str) -> None:
    arguments = {
        "h": torch.zeros(1, 2, 2, 2),
        "thresholds": torch.zeros(1, 1, 2),
        "values": torch.zeros(1, 2, 2),
        "curves": None,
        "flips": None,
        "sizes": [2, 2],
        "rounds": [0],
        "bilinear": False,
        "places": [1, 2],
        "stand_in": 0,
        "slopes": [],
        "errors": False,
        "keep_rows": False,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tokenflow_ext.scalar_quantize(*(arguments | change).values())


def test_bad_rows() -> None:
    tables = (torch.zeros(1, 1, 2), torch.zeros(1, 2, 2), None)
    rows, operator = torch.zeros(3, 2), torch.ops.tokenflow_ext.scalar_rows
    with pytest.raises(RuntimeError, match=r"thresholds must have shape .*, 3\], got"):
        operator(torch.zeros(3, 3), *tables, [], 0, False)
    with pytest.raises(RuntimeError, match="stand_in of rows must be 0, 2 or 3, got 1"):
        operator(rows, *tables, [], 1, False)
    with pytest.raises(RuntimeError, match="places must be none or one of each of 2 channels"):
        operator(rows, *tables, [1], 0, False)
    with pytest.raises(RuntimeError, match="rows must be float32 or float64"):
        operator(rows.half(), *tables, [], 0, False)
    with pytest.raises(RuntimeError, match="1 dimension or more"):
        operator(torch.zeros(()), *tables, [], 0, False)
