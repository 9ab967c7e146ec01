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
    tables = scalar.Tables(*(table.to(device) for table in tables))
    h = torch.randn(2, dim, 5, 6, dtype=dtype, generator=generator).to(device).requires_grad_()
    rounds = [number % depth for number in range(len(sizes))]
    count = sum(a * b for a, b in sizes)
    flips = None
    if flip and kind == "signs":
        flips = (torch.rand(2, count, dim, generator=generator) < 0.3).to(device)
    found = scalar.quantize(h, tables, sizes, rounds=rounds, flips=flips, upsampling=mode)
    quantized, digits, rows = loop(h.detach(), tables, sizes, rounds, flips, mode)
    # A number next to a threshold may fall on either side where sums are in another order.
    near = (rows.unsqueeze(-2) - per_token(tables.thresholds, sizes, rounds)).abs().amin(-2)
    same = found.digits == digits
    if bool((same | (near > 1e-5)).all()) and bool(same.all()):
        torch.testing.assert_close(found.quantized, quantized, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rows, rows, rtol=1e-5, atol=1e-5)
    else:
        first = (~same).flatten(1).any(0).nonzero()[0, 0]
        assert near.flatten(1)[:, first].min() < 1e-4
    assert found.digits.dtype == torch.int16
    assert not found.quantized.requires_grad
    # The gradient: through the pooling of the rows, and through the upsampling of what is put
    # in the values' place.
    z = found.rows
    ours = scalar.straight_through(found.quantized, z * 2, sizes, upsampling=mode)
    grad = torch.randn(ours.shape, dtype=dtype, generator=generator).to(device)
    (got,) = torch.autograd.grad(ours, h, grad)
    x = h.detach().requires_grad_()
    pooled = [F.interpolate(x, size, mode="area") for size in sizes]
    up = [F.interpolate(2 * part, (5, 6), mode=mode, align_corners=False) for part in pooled]
    (wanted,) = torch.autograd.grad(torch.stack(up).sum(0), x, grad)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_rows(device: str, rounds: int, count: int) -> None:
    """The pyramid of one place, round by round."""
    tables = scalar.as_computed(
        scalar.levels([5, 4, 7], rounds=rounds), torch.float32, inclusive=True
    )
    tables = scalar.Tables(*(table.to(device) for table in tables))
    rows = torch.randn(count, 3, device=device)
    codes, digits = scalar.quantize_rows(rows, tables)
    assert codes.shape == digits.shape == (count, rounds, 3)
    if count:
        sizes = [(1, 1)] * rounds
        found = scalar.quantize(rows[..., None, None], tables, sizes, rounds=range(rounds))
        assert torch.equal(digits, found.digits)
        torch.testing.assert_close(codes.sum(1), found.quantized.flatten(1))
    with pytest.raises(RuntimeError, match="rows must have 2 dimensions"):
        scalar.quantize_rows(rows.unsqueeze(0), tables)


def per_token(
    tables: torch.Tensor, sizes: list[tuple[int, int]], rounds: list[int]
) -> torch.Tensor:
    return torch.cat(
        [tables[number].expand(a * b, -1, -1) for (a, b), number in zip(sizes, rounds, strict=True)]
    )


def test_gradients_of_the_transposes() -> None:
    flat = [1, 2, 3, 3, 4, 5]
    plane = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 31, 3, dtype=torch.float64, requires_grad=True)
    for bilinear in (False, True):
        up = lambda x, bilinear=bilinear: scalar.upsample_transpose(x, flat, bilinear)  # noqa: E731
        assert torch.autograd.gradcheck(up, (plane,))
        assert torch.autograd.gradgradcheck(up, (plane,))
    assert torch.autograd.gradcheck(lambda x: scalar.pool_transpose(x, flat, (4, 5)), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: scalar.pool_transpose(x, flat, (4, 5)), (rows,))


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
        assert scalar.quantize(h, tables, [(2, 2)]).digits.flatten().tolist() == [1, 2, 3, 4]
        lower = z.nextafter(torch.full_like(z, -2)).view(1, 1, 2, 2)
        assert scalar.quantize(lower, tables, [(2, 2)]).digits.flatten().tolist() == [0, 1, 2, 3]


def test_infinities_and_nan() -> None:
    tables = scalar.as_computed(scalar.levels([3, 6]), torch.float32, inclusive=True)
    h = torch.tensor([torch.inf, -torch.inf, torch.nan, 0]).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    digits = scalar.quantize(h.contiguous(), tables, [(2, 2)]).digits
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
    found = scalar.sign_entropies(z, value=0.5, clamp=clamp)
    torch.testing.assert_close((found.per_sample, found.codebook), (sample, codebook))
    wanted = torch.autograd.grad(sample - 0.7 * codebook, z, retain_graph=True)
    got = torch.autograd.grad(found.per_sample - 0.7 * found.codebook, z)
    torch.testing.assert_close(got, wanted)
    # The bound of the sum of channels: exact where channels are independent.
    bound = scalar.sign_entropies(z, value=0.5, factorized=True)
    assert bound.codebook >= -torch.special.xlogy(mean, mean).sum() - 1e-9
    if dim == 1:
        torch.testing.assert_close(bound.codebook, -torch.special.xlogy(mean, mean).sum())


def test_entropies_of_certain_choices_are_finite() -> None:
    z = torch.tensor([[50.0, -50.0], [0.0, 1e-8]]).requires_grad_()
    found = scalar.sign_entropies(z)
    (grad,) = torch.autograd.grad(found.per_sample + found.codebook, z)
    assert grad.isfinite().all()
    with pytest.raises(ValueError, match=r"2\^25 codes are too many"):
        scalar.sign_entropies(torch.zeros(2, 25))
    assert scalar.sign_entropies(torch.zeros(2, 25), factorized=True).codebook > 17


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
    counts, rounds = (5, 4, 3), 3
    z = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    tables = scalar.as_computed(
        scalar.levels(counts, bound=bound, rounds=rounds), z.dtype, inclusive=True
    )
    codes, _ = scalar.quantize_rows(z, tables)
    finer = torch.tensor(counts, dtype=z.dtype) ** torch.arange(rounds).unsqueeze(1)
    left = z.unsqueeze(1) - (codes.cumsum(1) - codes)
    soft = (scalar.bounded(left * finer, counts, bound) / finer).sum(1)
    weight = torch.randn_like(soft)
    gradients = []
    for value in (scalar.through_rounds(z, codes, counts, bound), soft):
        (first,) = torch.autograd.grad((value * weight).sum(), z, create_graph=True)
        once = torch.autograd.grad((value * weight).sum(), z, retain_graph=True)[0]
        torch.testing.assert_close(once, first.detach())
        second = torch.zeros_like(z)
        if bound != "clamp":
            (second,) = torch.autograd.grad(first.square().sum(), z)
        gradients.append((first.detach(), second))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        scalar.through_rounds(z, codes, counts, bound).detach(), codes.sum(1)
    )


def test_tables_are_made_once_and_not_copied() -> None:
    cache, like = scalar.TableCache(functools.partial(scalar.signs, 3), False), torch.zeros(1)
    assert cache.like(like) is cache.like(like)
    copied = pickle.loads(pickle.dumps(cache))
    assert not copied._made
    assert torch.equal(copied.like(like).values, cache.like(like).values)


def test_rows_side_by_side() -> None:
    for rows, dim in ((8192, 5), (331, 5), (12, 200), (0, 3), (7, 1)):
        lines = scalar.side_by_side(rows, dim)
        assert rows % lines == 0
        assert lines == 1 or lines * dim <= 160
    assert scalar.side_by_side(8192, 5) == 32


def test_compiled() -> None:
    quantizer = ScalarQuantizer(Signs(8), scales=(1, 2, 4), entropy=Entropy(0.1)).eval()
    h = torch.randn(2, 8, 4, 4)
    quantizer.tables(h)
    expected = quantizer(h)
    got = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(h)
    torch.testing.assert_close(tuple(got[:4]), tuple(expected[:4]))


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
    ],
)
def test_bad_operator_arguments(change: dict, message: str) -> None:
    arguments = {
        "h": torch.zeros(1, 2, 2, 2),
        "thresholds": torch.zeros(1, 1, 2),
        "values": torch.zeros(1, 2, 2),
        "flips": None,
        "sizes": [2, 2],
        "rounds": [0],
        "bilinear": False,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tokenflow_ext.scalar_quantize(*(arguments | change).values())
