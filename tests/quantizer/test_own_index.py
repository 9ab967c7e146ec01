"""Several codebooks, each with an index of its own: the same numbers as one call for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.strategies import DEVICES, pyramids

from tokenflow_ext import MultiScaleQuantizer, ops

METRICS = ("l2", "dot")


def problem(
    groups: int, codes: int, dim: int, batch: int, side: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and codebooks whose magnitudes are far apart."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, groups * dim, side, side + 1, generator=generator, dtype=dtype)
    codebook = torch.randn(groups, codes, dim, generator=generator, dtype=dtype)
    codebook *= 10.0 ** torch.arange(groups).view(-1, 1, 1)
    return h, codebook


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 5),
    codes=st.integers(1, 600),
    dim=st.integers(1, 20),
    rows=st.integers(1, 130),
    l2_norm=st.booleans(),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 2**31),
)
def test_search(
    device: str,
    groups: int,
    codes: int,
    dim: int,
    rows: int,
    l2_norm: bool,
    metric: ops.Metric,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(groups, codes, dim, generator=generator).to(device)
    codebook *= 100.0 ** torch.arange(groups, device=device).view(-1, 1, 1)
    x = torch.randn(groups, rows, dim, generator=generator).to(device)
    found = ops.nearest_code(x, codebook, l2_norm=l2_norm, metric=metric)
    for part, rows_of, codes_of in zip(found, x, codebook, strict=True):
        alone = ops.nearest_code(rows_of, codes_of, l2_norm=l2_norm, metric=metric)
        assert torch.equal(part, alone)
        scores = scores_of(rows_of.double().cpu(), codes_of.double().cpu(), l2_norm, metric)
        chosen = scores.gather(1, part.cpu().unsqueeze(1)).squeeze(1)
        assert (chosen >= scores.amax(1) - 1e-12 * scores.abs().amax(1)).all()


def scores_of(rows: torch.Tensor, codes: torch.Tensor, l2_norm: bool, metric: str) -> torch.Tensor:
    if l2_norm:
        rows, codes = (torch.nn.functional.normalize(x, dim=1) for x in (rows, codes))
    if metric == "dot":
        return rows @ codes.T
    return -(rows.unsqueeze(1) - codes).square().sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    codes=st.integers(1, 700),
    dims=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    rows=st.integers(1, 100),
    l2_norm=st.booleans(),
    double=st.booleans(),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_inner_product(
    codes: int,
    dims: list[int],
    rows: int,
    l2_norm: bool,
    double: bool,
    spread: float,
    seed: int,
) -> None:
    """The largest product, the lowest index on a tie: exactly, of whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    codebook = torch.randint(-3, 4, (codes, sum(dims)), generator=generator).to(dtype)
    x = torch.randint(-3, 4, (rows, sum(dims)), generator=generator).to(dtype)
    weights = [2.0**-number for number in range(len(dims))]
    if l2_norm or spread:
        codebook = torch.randn(codes, sum(dims), generator=generator, dtype=dtype)
        lengths = torch.randn(codes, 1, generator=generator, dtype=dtype)
        codebook = codebook * 10 ** (spread * lengths)
    found = ops.nearest_code(x, codebook, dims, weights, l2_norm, metric="dot")
    products = torch.zeros(rows, codes, dtype=torch.float64)
    for part, code, weight in zip(
        x.double().split(dims, 1), codebook.double().split(dims, 1), weights, strict=True
    ):
        products += weight * scores_of(part, code, l2_norm, "dot")
    if not (l2_norm or spread):
        assert torch.equal(found, products.argmax(1))
        assert (products.gather(1, found.unsqueeze(1)).squeeze(1) == products.amax(1)).all()
    else:
        chosen = products.gather(1, found.unsqueeze(1)).squeeze(1)
        assert (chosen >= products.amax(1) - 1e-13 * products.abs().amax(1)).all()


def test_inner_product_of_rows_that_say_nothing() -> None:
    codebook = torch.randn(50, 8)
    rows = torch.zeros(3, 8)
    rows[1] = torch.nan
    rows[2, 0] = 3e38  # too long for scores in float32
    found = ops.nearest_code(rows, codebook, l2_norm=False, metric="dot")
    assert found.tolist() == [0, 0, int(codebook[:, 0].argmax())]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 4),
    codes=st.integers(1, 90),
    dim=st.integers(1, 7),
    sizes=pyramids,
    l2_norm=st.booleans(),
    metric=st.sampled_from(METRICS),
    dropped=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pyramid(
    device: str,
    groups: int,
    codes: int,
    dim: int,
    sizes: list[tuple[int, int]],
    l2_norm: bool,
    metric: ops.Metric,
    dropped: bool,
    seed: int,
) -> None:
    h, codebook = (
        x.to(device).requires_grad_()
        for x in problem(groups, codes, dim, 2, 4, seed, torch.float32)
    )
    drop = torch.tensor(len(sizes) - 1, device=device) if dropped else None
    out = ops.multiscale_quantize(h, codebook, [dim], sizes, None, l2_norm, drop, metric=metric)
    generator = torch.Generator(device).manual_seed(seed)
    seeds = [
        torch.randn(x.shape, generator=generator, device=device)
        for x in (out.quantized, out.code_error, out.row_error)
    ]
    grads = torch.autograd.grad(
        (out.quantized, out.code_error, out.row_error), [h, codebook], seeds
    )
    rows = ops.multiscale_rows(h, codebook, out.indices, [dim], sizes, l2_norm)
    if not dropped:
        decoded = ops.multiscale_decode(out.indices, codebook, [dim], sizes, (4, 5), l2_norm)
        torch.testing.assert_close(decoded, out.quantized.detach(), rtol=1e-5, atol=1e-4)
    for group in range(groups):
        part = slice(group * dim, (group + 1) * dim)
        x = h[:, part].detach().contiguous().requires_grad_()
        table = codebook[group].detach().requires_grad_()
        alone = ops.multiscale_quantize(x, table, [dim], sizes, None, l2_norm, drop, metric=metric)
        assert torch.equal(out.quantized[:, part], alone.quantized)
        for name in ("code_error", "row_error", "hits"):
            assert torch.equal(getattr(out, name)[group], getattr(alone, name))
        assert torch.equal(out.indices[:, group], alone.indices)
        expected = ops.multiscale_rows(x, table, alone.indices, [dim], sizes, l2_norm)
        assert torch.equal(rows[:, group], expected)
        wanted = torch.autograd.grad(
            (alone.quantized, alone.code_error, alone.row_error),
            [x, table],
            [seeds[0][:, part], seeds[1][group], seeds[2][group]],
        )
        assert torch.equal(grads[0][:, part], wanted[0])
        assert torch.equal(grads[1][group], wanted[1])


def test_second_derivatives() -> None:
    h, codebook = (x.requires_grad_() for x in problem(2, 5, 3, 1, 3, 0, torch.float64))

    def errors(h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        out = ops.multiscale_quantize(h, codebook, [3], [(3, 4)], None, False)
        return out.code_error.sum() + 2 * out.row_error.sum()

    assert torch.autograd.gradcheck(
        lambda h: torch.autograd.grad(
            ops.multiscale_quantize(h, codebook, [3], [(3, 4)], None, False).row_error.sum(),
            h,
            create_graph=True,
        ),
        (h,),
    )
    assert torch.isfinite(
        torch.autograd.grad(
            torch.autograd.grad(errors(h, codebook), h, create_graph=True)[0].square().sum(),
            [h, codebook],
        )[0]
    ).all()


def modules(**options: object) -> tuple[MultiScaleQuantizer, list[MultiScaleQuantizer]]:
    """A quantizer of three groups, and one for each of them with the same codes."""
    torch.manual_seed(3)
    all_groups = MultiScaleQuantizer(20, (4, 4, 4), (2, 3), index="own", scale_drop=0, **options)
    singles = []
    for codebook in all_groups.codebooks:
        single = MultiScaleQuantizer(20, (4,), (2, 3), scale_drop=0, **options)
        with torch.no_grad():
            single.codebooks[0].copy_(codebook)
        singles.append(single)
    return all_groups, singles


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("metric", METRICS)
def test_module(update: str, metric: str) -> None:
    ours, singles = modules(codebook_update=update, metric=metric)
    for _ in range(3):
        h = torch.randn(5, 12, 3, 3)
        parts = [single(x.contiguous()) for single, x in zip(singles, h.chunk(3, 1), strict=True)]
        out = ours(h)
        assert torch.equal(out.indices, torch.stack([part.indices for part in parts], 1))
        for name in ("vq_loss", "commitment_loss"):
            mean = torch.stack([getattr(part, name) for part in parts]).mean()
            torch.testing.assert_close(getattr(out, name), mean)
        for number, values in enumerate(zip(*(part.usage for part in parts), strict=True)):
            torch.testing.assert_close(out.usage[number], torch.stack(values))
    decoded = [single.decode(part.indices) for single, part in zip(singles, parts, strict=True)]
    assert torch.equal(ours.decode(out.indices), torch.cat(decoded, 1))
    # An image with a NaN, in whichever group, is left out of the statistics of all.
    hits = ours.window_hits.sum(1)
    h[1, 2] = torch.nan
    ours(h)
    assert int(ours.skipped_rows) == 3 * 13
    assert (ours.window_hits.sum(1) - hits).tolist() == [4 * 13] * 3
    assert all(codebook.isfinite().all() for codebook in ours.codebooks)


def test_tokens() -> None:
    ours, singles = modules()
    ours.eval()
    h = torch.randn(2, 12, 3, 3)
    indices = ours.encode(h)
    parts = [single.eval().encode(x) for single, x in zip(singles, h.chunk(3, 1), strict=True)]
    assert torch.equal(indices, torch.stack(parts, 1))
    for method in ("codes", "next_scale_inputs"):
        expected = [
            getattr(single, method)(part) for single, part in zip(singles, parts, strict=True)
        ]
        assert torch.equal(getattr(ours, method)(indices), torch.cat(expected, -1))
    first = indices[..., :4]
    expected = torch.cat(
        [single.decode(part[:, :4]) for single, part in zip(singles, parts, strict=True)], 1
    )
    assert torch.equal(ours.decode(first), expected)
    assert [part.shape for part in ours.split(indices)] == [(2, 3, 4), (2, 3, 9)]
    nearest = ours.nearest(ours.codes(indices))
    assert torch.equal(nearest, indices)
    rows = torch.cat([s.rows(x) for s, x in zip(singles, h.chunk(3, 1), strict=True)], 1)
    assert torch.equal(ours.rows(h), rows)


def test_kmeans_and_restart() -> None:
    ours, _ = modules()
    features = torch.randn(400, 12)
    with torch.no_grad():
        before = ours.nearest(features.unsqueeze(0))
        errors = (ours.codes(before)[0] - ours._normalize(features)).square().mean()
    ours.init_kmeans(features)
    after = ours.codes(ours.nearest(features.unsqueeze(0)))[0] - ours._normalize(features)
    assert after.square().mean() < 0.6 * errors
    assert ours.usage_ema.shape == (3, 20)
    ours.usage_ema.copy_(torch.ones(3, 20))
    ours.usage_ema[1, 4] = 0
    # Dead by its own group's mean, however much another group is used.
    ours.usage_ema[2] = 1e-3
    kept = [codebook.clone() for codebook in ours.codebooks]
    assert ours.restart_dead_codes(features) == 1
    changed = [
        (codebook != old).any(1).nonzero().flatten().tolist()
        for codebook, old in zip(ours.codebooks, kept, strict=True)
    ]
    assert changed == [[], [4], []]


def test_state_dict_and_repr() -> None:
    ours, _ = modules(metric="dot")
    assert "index=own, metric=dot" in repr(ours)
    other, _ = modules(metric="dot")
    other.load_state_dict(ours.state_dict())
    assert ours.state_dict()["usage_ema"].shape == (3, 20)


def test_compiled() -> None:
    ours, _ = modules()
    h = torch.randn(2, 12, 3, 3)
    expected = ours.eval()(h)
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(h)
    torch.testing.assert_close(tuple(got[:4]), tuple(expected[:4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (4, 5), "index": "own"}, r"index='own' needs dims of one width.*\(4, 5\)"),
        ({"dims": (4, 4), "index": "own", "weights": (1, 1)}, "no weights"),
        ({"index": "each"}, "index must be 'shared' or 'own', got 'each'"),
        ({"metric": "cosine"}, "metric must be one of l2, squared_l2, dot, got 'cosine'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(10, **{"scales": (2,), **options})


def test_bad_tokens() -> None:
    ours, _ = modules()
    with pytest.raises(
        ValueError, match=r"indices must have shape \[B, 3, L\], B > 0, got \(2, 2, 13\)"
    ):
        ours.decode(torch.zeros(2, 2, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 3, 4\] at scale 0"):
        ours.accumulate(None, torch.zeros(2, 3, 5, dtype=torch.int64), 0)


@pytest.mark.parametrize(
    ("rows", "codebook", "message"),
    [
        ((3, 4), (2, 5, 4), "rows must have 3 dimensions"),
        ((3, 7, 4), (2, 5, 4), "rows must have as many entries as codebook, 2"),
        ((2, 7, 4), (2, 0, 4), "codebook must have at least one row"),
        ((2, 7, 4), (1, 2, 5, 4), "rows must have 2 dimensions"),
        ((7, 4), (4,), "codebook must have 2 or 3 dimensions"),
    ],
)
def test_bad_shapes(rows: tuple, codebook: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.nearest_code(torch.randn(rows), torch.randn(codebook))


def test_bad_features() -> None:
    with pytest.raises(RuntimeError, match="h must have as many times as there are codebooks"):
        ops.multiscale_quantize(torch.randn(1, 4, 2, 2), torch.randn(2, 5, 4), [4], [(2, 2)])
    codebook = torch.randn(2, 5, 4)
    codebook[1, 2] = torch.inf
    with pytest.raises(RuntimeError, match=r"codebook must be finite.* row 7"):
        ops.multiscale_quantize(torch.randn(1, 8, 2, 2), codebook, [4], [(2, 2)])
    with pytest.raises(RuntimeError, match="metric must be 0 to 2, got 3"):
        torch.ops.tokenflow_ext.nearest_code(
            torch.randn(2, 3), torch.randn(2, 3), [3], [1.0], True, 3
        )
