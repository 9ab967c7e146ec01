"""Scalar quantization against its definition in plain PyTorch, in float64."""

from __future__ import annotations

import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.strategies import DEVICES, pyramids

from tokenflow_ext import scalar
from tokenflow_ext.codes import Entropy, Levels, Signs
from tokenflow_ext.scalar_quantizer import ScalarQuantizer
from tokenflow_ext.sign_entropy import sign_entropies


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


def written_out(
    h: torch.Tensor,
    code: Signs | Levels,
    groups: int,
    sizes: list[tuple[int, int]],
    rounds: list[int],
    slopes: list[float],
    flips: torch.Tensor | None,
    mode: str,
) -> tuple[torch.Tensor, ...]:
    """f^, and of each scale error, entropy and chance, with their gradient by autograd, by the
    definitions of the codes."""
    residual, total, first, losses = h, 0, 0, []
    for number, size, slope in zip(rounds, sizes, slopes, strict=True):
        rows = F.interpolate(residual, size, mode="area").flatten(2).mT
        if isinstance(code, Signs):
            value = 0.5**number * (code.dim**-0.5 if code.spherical else 1)
            z = rows
            if code.spherical:
                z = F.normalize(rows.unflatten(-1, (groups, -1)), dim=-1).flatten(-2)
            positive = rows > 0
            if flips is not None:
                positive = positive ^ flips[:, first : first + rows.shape[1]]
            q = value * (2 * positive.double() - 1)
        else:
            counts = torch.tensor(code.levels * groups, dtype=h.dtype)
            finer = counts**-number
            bounds = [fsq_bounded(rows / finer, counts, code.bound)]
            z = bounds[0] * finer
            q = (
                torch.stack(
                    [
                        fsq((rows / finer).detach()[..., d], int(count), code.bound)
                        for d, count in enumerate(counts)
                    ],
                    dim=-1,
                )
                * finer
            )
        p, other = torch.sigmoid(slope * z), torch.sigmoid(-slope * z)  # 1 - p would cancel
        entropy = torch.special.entr(p) + torch.special.entr(other)
        losses.append(((q - z).square().mean(), entropy.sum(-1).mean(), p.mean((0, 1))))
        up = functools.partial(upsampled, sizes=(size, h.shape[2:]), mode=mode)
        residual, total = residual - up(q), total + up(z + (q - z).detach())
        first += rows.shape[1]
    return total, *(torch.stack(parts) for parts in zip(*losses, strict=True))


def upsampled(rows: torch.Tensor, sizes: tuple, mode: str) -> torch.Tensor:
    """Maps of the second size of rows [B, L, D] of the first."""
    plane = rows.mT.unflatten(2, sizes[0])
    return F.interpolate(plane, sizes[1], mode=mode, align_corners=False)


def fsq_bounded(z: torch.Tensor, counts: torch.Tensor, bound: str) -> torch.Tensor:
    """The value of FSQ's definition before it is rounded."""
    if bound != "tanh":
        return z.tanh() if bound == "symmetric" else z.clamp(-1, 1)
    half, offset = (counts - 1) * 1.001 / 2, 0.5 * (counts % 2 == 0)
    return ((z + (offset / half).atanh()).tanh() * half - offset) / counts.div(2).floor()


CODES = [
    Signs(3),
    Signs(5, spherical=True),
    Signs(17, spherical=True, little_endian=False),
    Levels((5, 4, 3)),
    Levels((3, 2), "symmetric"),
    Levels((4, 7), "clamp"),
]


@settings(max_examples=60, deadline=None)
@given(
    sizes=pyramids,
    code=st.sampled_from(CODES),
    groups=st.integers(1, 3),
    depth=st.integers(1, 2),
    mode=st.sampled_from(["bicubic", "bilinear"]),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradient(
    sizes: list[tuple[int, int]],
    code: Signs | Levels,
    groups: int,
    depth: int,
    mode: str,
    flip: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """In both dtypes against the definitions in float64."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = ScalarQuantizer(code, groups, depth=depth)
    signs = isinstance(code, Signs)
    exact = torch.randn(2, quantizer.dim, 5, 6, dtype=torch.float64, generator=generator)
    h = exact.to(dtype).requires_grad_()
    exact = h.detach().double().requires_grad_()
    rounds = [number % depth for number in range(len(sizes))]
    slopes = [0.3 + 2 * number for number in range(len(sizes))]
    flips = None
    if flip and signs:
        count = sum(a * b for a, b in sizes)
        flips = torch.rand(2, count, quantizer.dim, generator=generator) < 0.3
    found = scalar.quantize(
        h,
        quantizer.tables(h),
        sizes,
        counts=code.counts,
        rounds=rounds,
        flips=flips,
        upsampling=mode,
        stand_in=quantizer._stand_in,
        slopes=slopes if signs else (),
        errors=True,
    )
    wanted = written_out(exact, code, groups, sizes, rounds, slopes, flips, mode)
    got = (found.quantized, found.error, found.entropy, found.chance)
    if not signs:
        got, wanted = got[:2], wanted[:2]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    if not torch.allclose(got[0].double(), wanted[0], rtol=1e-3, atol=1e-3):
        assert dtype == torch.float32  # a number next to a threshold fell on the other side
        return
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(tuple(part.double() for part in got), wanted)
    seeds = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in wanted]
    (gradient,) = torch.autograd.grad(got, h, [part.to(dtype) for part in seeds])
    close(gradient.double(), torch.autograd.grad(wanted, exact, seeds)[0])


def test_entropies_near_certainty() -> None:
    """Of logits of any size, in float32 against float64; what is certain has no gradient."""
    logits = torch.cat([torch.logspace(-8, 3, 400), torch.tensor([0.0, torch.inf, 3e38])])
    h = torch.cat([logits, -logits]).view(1, 1, 1, -1).requires_grad_()
    tables = scalar.as_computed(scalar.signs(1), torch.float32, inclusive=False)
    for number, x in enumerate(h.detach().flatten().double().tolist()):
        value = h.detach()[..., number : number + 1].requires_grad_()
        found = scalar.quantize(value, tables, [(1, 1)], counts=[2], slopes=[1.0])
        u = math.exp(-abs(x))
        entropy = math.log1p(u) + (abs(x) * u / (1 + u) if math.isfinite(x) else 0)
        assert found.entropy.item() == pytest.approx(entropy, rel=1e-6, abs=1e-35)
        assert found.chance.item() == pytest.approx(1 / (1 + math.exp(min(-x, 700))), rel=1e-6)
        (grad,) = torch.autograd.grad(found.entropy.sum() + found.chance.sum(), value)
        slope = u / (1 + u) ** 2 * (1 - max(-1e30, min(x, 1e30)))
        assert grad.item() == pytest.approx(slope, rel=2e-6, abs=1e-34)
    nan = scalar.quantize(
        torch.full((1, 1, 1, 1), torch.nan), tables, [(1, 1)], counts=[2], slopes=[1.0]
    )
    assert nan.entropy.isnan()
    assert nan.chance.isnan()


@pytest.mark.parametrize("code", CODES)
def test_gradcheck(code: Signs | Levels) -> None:
    """First and second derivatives. With one scale nothing is held back."""
    quantizer = ScalarQuantizer(code, 2)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, quantizer.dim, 2, 3, dtype=torch.float64, generator=generator)
    h.requires_grad_()

    def losses(h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = scalar.quantize(
            h,
            quantizer.tables(h),
            [(2, 3)],
            counts=code.counts,
            stand_in=quantizer._stand_in,
            slopes=[0.7] if isinstance(code, Signs) else (),
            errors=True,
        )
        # Values themselves are steps: what comes to h through them is checked by its derivative.
        return found.rows, *(part for part in found[3:] if part.numel())

    assert torch.autograd.gradcheck(losses, (h,))
    assert torch.autograd.gradgradcheck(losses, (h,))
    weight = torch.randn(h.shape, dtype=torch.float64, generator=generator)

    def passed(h: torch.Tensor) -> torch.Tensor:
        found = scalar.quantize(
            h, quantizer.tables(h), [(2, 3)], counts=code.counts, stand_in=quantizer._stand_in
        )
        return torch.autograd.grad(found.quantized, h, weight, create_graph=True)[0]

    if quantizer._stand_in in ("unit", "tanh"):
        assert torch.autograd.gradcheck(passed, (h,))


@pytest.mark.parametrize("bound", scalar.BOUNDS)
def test_gradcheck_of_rows(bound: scalar.Bound) -> None:
    tables = scalar.as_computed(
        scalar.levels((5, 4), bound=bound, rounds=2), torch.float64, inclusive=True
    )
    rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def gradient(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = scalar.quantize_rows(rows, tables, stand_in=scalar.stand_in_of(bound))
        return torch.autograd.grad(found.quantized, rows, weight, create_graph=True)[0]

    weight = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient, (rows, weight))
    assert torch.autograd.gradgradcheck(gradient, (rows, weight))


def test_mapped() -> None:
    """torch.func: each entry by itself, with its gradient."""
    tables = scalar.as_computed(scalar.signs(4), torch.float64, inclusive=False)
    h = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)

    def loss(h: torch.Tensor) -> torch.Tensor:
        found = scalar.quantize(
            h, tables, [(1, 1), (3, 3)], counts=[2] * 4, stand_in="unit", slopes=[1.0, 2.0]
        )
        return found.quantized.square().sum() + found.entropy.sum() - found.chance.square().sum()

    grad = torch.func.grad(loss)
    mapped = torch.func.vmap(grad)(h)
    torch.testing.assert_close(mapped, torch.stack([grad(entry) for entry in h]))
    rows = torch.randn(3, 5, 4, dtype=torch.float64)
    sums = torch.func.vmap(lambda x: scalar.quantize_rows(x, tables).quantized)(rows)
    assert torch.equal(sums, scalar.quantize_rows(rows, tables).quantized)


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


# --- levels and signs ---------------------------------------------------------------------------


def fsq(z: torch.Tensor, count: int, bound: str) -> torch.Tensor:
    """The value of FSQ's definition, in float64."""
    if bound == "tanh":
        half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
        bounded = torch.tanh(z + math.atanh(offset / half)) * half - offset
        return bounded.round() / (count // 2)
    bounded = z.tanh() if bound == "symmetric" else z.clamp(-1, 1)
    return 2 / (count - 1) * ((count - 1) * (bounded + 1) / 2 + 0.5).floor() - 1


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


# --- entropies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("clamp", [False, True])
def test_entropies(dim: int, clamp: bool) -> None:
    """Against the softmax over all codes, with gradients."""
    torch.manual_seed(dim)
    z = (0.05 * torch.randn(40, dim, dtype=torch.float64)).requires_grad_()
    bits = torch.arange(2**dim).unsqueeze(1) >> torch.arange(dim) & 1
    codes = 0.5 * (2 * bits - 1).double()
    log_p = F.log_softmax(2 * z @ codes.T / 0.01, dim=1)
    sample = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0)
    log = mean.clamp(min=1e-5).log() if clamp else (mean + 1e-5).log()
    codebook = -(mean * log).sum()
    found = sign_entropies(z, value=0.5, clamp=clamp)
    torch.testing.assert_close((found.per_sample, found.codebook), (sample, codebook))
    wanted = torch.autograd.grad(sample - 0.7 * codebook, z, retain_graph=True)
    got = torch.autograd.grad(found.per_sample - 0.7 * found.codebook, z)
    torch.testing.assert_close(got, wanted)
    # The bound of the sum of channels: exact where channels are independent.
    bound = sign_entropies(z, value=0.5, factorized=True)
    assert bound.codebook >= -torch.special.xlogy(mean, mean).sum() - 1e-9
    if dim == 1:
        torch.testing.assert_close(bound.codebook, -torch.special.xlogy(mean, mean).sum())


def test_entropies_of_certain_choices_are_finite() -> None:
    z = torch.tensor([[50.0, -50.0], [0.0, 1e-8]]).requires_grad_()
    found = sign_entropies(z)
    (grad,) = torch.autograd.grad(found.per_sample + found.codebook, z)
    assert grad.isfinite().all()
    bound = sign_entropies(z, factorized=True)
    assert torch.autograd.grad(bound.codebook, z)[0].isfinite().all()
    entropy = Entropy(1.0, factorized=True)
    quantizer = ScalarQuantizer(Signs(2), scales=(1,), entropy=entropy)
    h = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(quantizer(h).entropy_loss, h)
    assert grad.abs().max() < 1e-30
    with pytest.raises(ValueError, match=r"2\^25 codes are too many"):
        sign_entropies(torch.zeros(2, 25))
    assert sign_entropies(torch.zeros(2, 25), factorized=True).codebook > 17


# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [Signs(4), Signs(4, spherical=True, little_endian=False), Levels((5, 4, 3, 7))]
)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module(code: Signs | Levels, depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = ScalarQuantizer(code, 2, (1, 3, 5), depth=depth, upsampling="bilinear")
    h = torch.randn(3, 8, 5, 5).to(dtype).requires_grad_()
    out = quantizer(h)
    assert out.quantized.dtype == dtype
    assert out.indices.shape == (3, 2, depth * 35)
    assert torch.equal(quantizer.encode(h), out.indices)
    exact = {torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    decoded = quantizer.decode(out.indices)
    torch.testing.assert_close(decoded, out.quantized.detach().float(), rtol=exact, atol=exact)
    codes = quantizer.codes(out.indices)
    assert torch.equal(quantizer.nearest(codes), out.indices)
    out.quantized.sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    upto = torch.stack(quantizer.maps(codes, (5, 5))[: 2 * depth]).sum(0)
    torch.testing.assert_close(quantizer.decode(out.indices, upto=2), upto)
    inputs = quantizer.next_scale_inputs(out.indices)
    assert inputs.shape == (3, 34, 8)
    torch.testing.assert_close(inputs[:, -25:], upto.flatten(2).mT)
    assert int(quantizer.usage_window().hits.sum()) == out.indices.numel()
    assert int(quantizer.usage_window().hits.sum()) == 0


def test_spherical_gradient_and_losses() -> None:
    """One scale: against BSQ written out."""
    torch.manual_seed(1)
    quantizer = ScalarQuantizer(Signs(6, spherical=True), scales=(4,), beta=0.5, entropy=Entropy(2))
    h = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    x = h.detach().clone().requires_grad_()
    z = F.normalize(x, dim=1)
    q = torch.where(z > 0, 6**-0.5, -(6**-0.5)).to(z.dtype)
    expected = z + (q - z).detach()
    bits = torch.arange(64).unsqueeze(1) >> torch.arange(6) & 1
    codes = 6**-0.5 * (2 * bits - 1).double()
    p = F.softmax(2 * z.permute(0, 2, 3, 1).reshape(-1, 6) @ codes.T / 0.01, dim=1)
    entropy = torch.special.entr(p).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    commitment = 0.5 * (z - q.detach()).square().mean()
    out = quantizer(h)
    torch.testing.assert_close(out.quantized, expected)
    torch.testing.assert_close(out.commitment_loss, commitment)
    torch.testing.assert_close(out.entropy_loss, 2 * entropy)
    seed = torch.randn_like(x)
    wanted = torch.autograd.grad((expected * seed).sum() + commitment + 2 * entropy, x)
    got = torch.autograd.grad(
        (out.quantized * seed).sum() + out.commitment_loss + out.entropy_loss, h
    )
    torch.testing.assert_close(got, wanted)
    assert quantizer.eval()(h).entropy_loss == 0


def test_level_gradient() -> None:
    """One scale and two rounds: against residual FSQ written out."""
    torch.manual_seed(2)
    quantizer = ScalarQuantizer(Levels((5, 4), "symmetric"), scales=(3,), depth=2, beta=0)
    h = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    x = h.detach().clone().requires_grad_()
    counts = torch.tensor([5.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    residual, total = x, 0
    for number in range(2):
        finer = counts**-number
        bounded = (residual / finer).tanh()
        rounded = 2 / (counts - 1) * ((counts - 1) * (bounded + 1) / 2 + 0.5).floor() - 1
        code = (bounded + (rounded - bounded).detach()) * finer
        residual, total = residual - code.detach(), total + code
    out = quantizer(h)
    torch.testing.assert_close(out.quantized, total)
    seed = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(out.quantized, h, seed), torch.autograd.grad(total, x, seed)
    )


def test_flips() -> None:
    quantizer = ScalarQuantizer(Signs(8), scales=(1, 2, 4), flips=0.5)
    h = torch.randn(4, 8, 4, 4)
    assert not torch.equal(quantizer(h).indices, quantizer(h).indices)
    out = quantizer(h)  # what is flipped is what is decoded
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    quantizer.eval()
    assert torch.equal(quantizer(h).indices, quantizer(h).indices)


@pytest.mark.parametrize("bound", scalar.BOUNDS)
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_gradient_of_rounds(bound: scalar.Bound, rows: int) -> None:
    """Of every round that of its bound at what the rounds before left, first and second."""
    counts, rounds = torch.tensor([5.0, 4, 3], dtype=torch.float64), 3
    z = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    tables = scalar.as_computed(
        scalar.levels((5, 4, 3), bound=bound, rounds=rounds), z.dtype, inclusive=True
    )
    found = scalar.quantize_rows(z, tables, stand_in=scalar.stand_in_of(bound), keep_codes=True)
    codes = found.codes
    finer = counts ** torch.arange(rounds).unsqueeze(1)
    left = z.unsqueeze(1) - (codes.cumsum(1) - codes)
    soft = (fsq_bounded(left * finer, counts, bound) / finer).sum(1)
    weight = torch.randn_like(soft)
    gradients = []
    for value in (found.quantized, soft):
        (first,) = torch.autograd.grad((value * weight).sum(), z, create_graph=True)
        once = torch.autograd.grad((value * weight).sum(), z, retain_graph=True)[0]
        torch.testing.assert_close(once, first.detach())
        second = torch.zeros_like(z)
        if bound != "clamp":
            (second,) = torch.autograd.grad(first.square().sum(), z)
        gradients.append((first.detach(), second))
    torch.testing.assert_close(*gradients)


def test_tables_are_made_once_and_not_copied() -> None:
    cache, like = scalar.TableCache(functools.partial(scalar.signs, 3), False), torch.zeros(1)
    assert cache.like(like) is cache.like(like)
    copied = pickle.loads(pickle.dumps(cache))
    assert not copied._made
    assert torch.equal(copied.like(like).values, cache.like(like).values)


@pytest.mark.parametrize("factorized", [False, True])
def test_compiled(factorized: bool) -> None:
    """Without graph breaks, forward and backward."""
    torch._dynamo.reset()
    entropy = Entropy(0.1, factorized=factorized)
    quantizer = ScalarQuantizer(Signs(8, spherical=True), scales=(1, 2, 4), entropy=entropy)
    h = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantizer.tables(h)
    compiled = torch.compile(lambda h: tuple(quantizer(h)[:4]), backend="aot_eager", fullgraph=True)
    expected, got = tuple(quantizer(h)[:4]), compiled(h)
    torch.testing.assert_close(got, expected)
    gradients = [
        torch.autograd.grad(out[0].square().sum() + out[2] + out[3], h) for out in (got, expected)
    ]
    torch.testing.assert_close(*gradients)


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


def test_exported() -> None:
    quantizer = ScalarQuantizer(Levels((5, 4)), scales=(1, 2)).eval()
    h = torch.randn(2, 2, 4, 4)
    quantizer.tables(h)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(quantizer, (h,), dynamic_shapes={"h": {0: batch}})
    h = torch.randn(5, 2, 4, 4)
    assert torch.equal(program.module()(h).indices, quantizer(h).indices)


def test_as_many_threads_as_there_are() -> None:
    """The same bits with one thread and with several, from any split of the maps."""
    quantizer = ScalarQuantizer(
        Signs(7, spherical=True), 2, (1, 3, 8), entropy=Entropy(1, factorized=True)
    )
    h = torch.randn(5, 14, 8, 8, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = quantizer(h)
            total = out.quantized.sum() + out.commitment_loss + out.entropy_loss
            found.append((*out[:4], *torch.autograd.grad(total, h)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": Levels((3, 3)), "entropy": Entropy(1)}, "only Signs have an entropy"),
        ({"code": Levels((3, 3)), "flips": 0.1}, "only Signs have an entropy and flips"),
        ({"code": Signs(3), "flips": 1.5}, r"flips must be in \[0, 1\], got 1.5"),
        ({"code": Signs(3), "groups": 0}, "groups must be at least 1"),
        ({"code": Signs(3), "depth": 0}, "depth must be at least 1"),
        ({"code": Signs(3), "scales": ()}, "scales must hold"),
        ({"code": Signs(3), "upsampling": "nearest"}, "upsampling must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalarQuantizer(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Signs(64), "dim of Signs must be 1 to 63"),
        (lambda: Levels((1, 3)), "levels must hold one or more numbers from 2"),
        (lambda: Levels(()), "levels must hold one or more numbers"),
        (lambda: Levels((3,), "sigmoid"), "bound must be one of tanh, symmetric, clamp"),
        (lambda: Levels((32768,) * 5), r"at most 2\^63 codes"),
        (lambda: Entropy(1, temperature=0), "temperature must be positive"),
    ],
)
def test_bad_codes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_tokens_and_features() -> None:
    quantizer = ScalarQuantizer(Levels((3, 3)), scales=(2,))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 1, 4\]"):
        quantizer.decode(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 9\), got 0 to 9"):
        quantizer.decode(torch.tensor([[[0, 1, 2, 9]]]))
    with pytest.raises(ValueError, match="upto must be 1 to 1"):
        quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int64), upto=2)
    with pytest.raises(ValueError, match="rounds must be 1 to 1, got 2"):
        quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int64), rounds=2)
    with pytest.raises(ValueError, match=r"h must have shape \[B, 2, H, W\]"):
        quantizer(torch.zeros(1, 3, 2, 2))
    with pytest.raises(TypeError, match="floating-point"):
        quantizer(torch.zeros(1, 2, 2, 2, dtype=torch.int64))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(1, 3, 2)}, r"rows must have shape \[1, 4, 2\]"),
        ({"grad_quantized": torch.zeros(1, 2, 2)}, r"grad_quantized must have shape \[1, 2, 2, 2"),
        ({"grad_rows": torch.zeros(1, 4, 2).double()}, "grad_rows must have the dtype of rows"),
        ({"grad_error": torch.zeros(2)}, r"grad_error must have shape \[1\]"),
        ({"slopes": [1.0]}, "grad_entropy and grad_chance must be given where slopes are"),
        ({"grad_entropy": torch.zeros(1)}, "grad_entropy and grad_chance must be given"),
        ({"group": 3}, "group must divide 2, got 3"),
    ],
)
def test_bad_arguments_of_the_gradient(change: dict, message: str) -> None:
    arguments = {
        "rows": torch.zeros(1, 4, 2),
        "thresholds": torch.zeros(1, 1, 2),
        "values": torch.zeros(1, 2, 2),
        "curves": None,
        "flips": None,
        "grad_quantized": None,
        "grad_rows": None,
        "grad_error": None,
        "grad_entropy": None,
        "grad_chance": None,
        "sizes": [2, 2],
        "height": 2,
        "width": 2,
        "rounds": [0],
        "bilinear": False,
        "group": 2,
        "stand_in": 0,
        "slopes": [],
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tokenflow_ext.scalar_quantize_backward(*(arguments | change).values())


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
