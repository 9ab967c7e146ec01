"""Losses and gradients of scalar quantization against the definitions of the codes, in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.fsq import fsq, fsq_bounded
from quantizer.strategies import pyramids

from tokenflow_ext import scalar
from tokenflow_ext.codes import Levels, Signs
from tokenflow_ext.scalar_quantizer import ScalarQuantizer


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
