"""The fused residual loop against the reference: indices, values and all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.strategies import DEVICES, Problem, problems, pyramids
from torch import Tensor

from tokenflow_ext import ops, reference


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, exact: Tensor, floor: float, nudged: Sequence[Tensor] = ()
) -> None:
    """Our error against float64 is at most twice that of eager code in the same dtype.

    Args:
        nudged: `exact` of inputs whose last two bits are others. Where many digits cancel, as in
            the gradient of a short code that is nearly its row, eager code's error is a matter of
            luck (over many problems the median of ours is no larger), and these say what to expect.
    """
    scale = exact.abs().amax().item() if exact.numel() else 0.0
    bound = 2 * (eager.double() - exact).abs().amax().item() + floor * (scale + 1e-30)
    bound += 2 * max(((near - exact).abs().amax().item() for near in nudged), default=0.0)
    assert (ours.cpu().double() - exact).abs().amax().item() <= bound


def quantize_all(module, h: Tensor, codebook: Tensor, problem: Problem, sizes, dropped, **more):
    """The loop's results and its gradients for a fixed random weighting of its outputs."""
    h = h.detach().requires_grad_()
    codebook = codebook.detach().requires_grad_()
    result = module.multiscale_quantize(
        h, codebook, problem.dims, sizes, problem.weights, problem.l2_norm, dropped, **more
    )
    generator = torch.Generator().manual_seed(1)
    quantized_weight = torch.randn(result.quantized.shape, generator=generator).to(h)
    code_weight = torch.rand(len(sizes), generator=generator).to(h)
    row_weight = torch.rand(len(sizes), generator=generator).to(h)
    loss = (
        (result.quantized * quantized_weight).sum()
        + result.code_error @ code_weight
        + result.row_error @ row_weight
    )
    return result, torch.autograd.grad(loss, [h, codebook])


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=120)
@given(
    # A normalised group of one channel is a sign: its gradient is all rounding.
    problem=problems(largest_codebook=600, narrowest=2),
    sizes=pyramids,
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    drop=st.booleans(),
)
def test_matches_reference(device: str, problem: Problem, sizes, shape, drop: bool) -> None:
    batch, height, width = shape
    h = problem.randn(batch, sum(problem.dims), height, width)
    if not problem.l2_norm:
        h = h * problem.codebook.abs().amax().clamp(min=1e-3)
    codebook = problem.codebook
    drop = drop and len(sizes) > 1
    dropped = len(sizes) // 2 if drop else -1
    on_device = torch.tensor(dropped, device=device) if drop else None

    ours, our_grads = quantize_all(
        ops, h.to(device), codebook.to(device), problem, sizes, on_device
    )
    indices = ours.indices.cpu()
    # Follow our indices in float64 and in eager float32.
    exact, exact_grads = quantize_all(
        reference, h.double(), codebook.double(), problem, sizes, dropped, indices=indices
    )
    eager, eager_grads = quantize_all(
        reference, h, codebook, problem, sizes, dropped, indices=indices
    )
    nudged, near_rows, signs = [], [], torch.Generator().manual_seed(2)
    arguments = (problem.dims, sizes, problem.l2_norm)
    for _ in range(3):
        inputs = [
            x.double() * (1 + 2.0**-22 * torch.randn(x.shape, generator=signs).sign())
            for x in (h, codebook)
        ]
        nudged.append(quantize_all(reference, *inputs, problem, sizes, dropped, indices=indices))
        near_rows.append(reference.multiscale_rows(*inputs, indices, *arguments))

    assert torch.equal(ours.hits.cpu(), exact.hits)
    assert (ours.hits.sum() == (indices >= 0).sum()).all()
    assert torch.equal(ours.code_error, ours.row_error)
    floor = 3e-6
    for name in ("quantized", "code_error"):
        near = [getattr(result, name) for result, _ in nudged]
        mine, plain, true = (getattr(result, name) for result in (ours, eager, exact))
        assert_as_good_as_eager(mine, plain, true, floor, near)
    near_grads = zip(*(grads for _, grads in nudged), strict=True)
    for gradients in zip(our_grads, eager_grads, exact_grads, near_grads, strict=True):
        mine, plain, true, near = gradients
        assert_as_good_as_eager(mine, plain, true, floor, near)

    # Each choice, judged in float64 on the rows that the scale searched with.
    rows = ops.multiscale_rows(h.to(device), codebook.to(device), ours.indices, *arguments).cpu()
    true_rows = reference.multiscale_rows(h.double(), codebook.double(), indices, *arguments)
    eager_rows = reference.multiscale_rows(h, codebook, indices, *arguments)
    assert_as_good_as_eager(rows, eager_rows, true_rows, floor, near_rows)
    kept = (indices >= 0).flatten()
    codes = reference.normalize_groups(codebook.double(), problem.dims, problem.l2_norm)
    d = reference.distances(
        rows.double().flatten(0, 1)[kept], codes, problem.dims, problem.weights, l2_norm=False
    )
    chosen = d.gather(1, indices.flatten()[kept].unsqueeze(1)).squeeze(1)
    best = d.amin(dim=1)
    # rows are the normalised float32 ones here: their rounding moves a distance by its root.
    scale = rows.abs().amax().item() + codes.abs().amax().item()
    slack = 1e-6 * best + 1e-6 * scale * best.sqrt() * len(problem.dims) + 1e-12 * scale**2
    assert (chosen <= best + slack).all()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(
    problem=problems(largest_codebook=300),
    sizes=pyramids,
    batch=st.integers(1, 3),
    output_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_decode_matches_reference(device: str, problem, sizes, batch, output_size) -> None:
    tokens = sum(a * b for a, b in sizes)
    indices = torch.randint(
        0, problem.codebook.shape[0], (batch, tokens), generator=problem.generator
    )
    arguments = (problem.dims, sizes, output_size, problem.l2_norm)
    ours = ops.multiscale_decode(indices.to(device), problem.codebook.to(device), *arguments)
    exact = reference.multiscale_decode(indices, problem.codebook.double(), *arguments)
    eager = reference.multiscale_decode(indices, problem.codebook, *arguments)
    assert_as_good_as_eager(ours, eager, exact, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 3000),
    dim=st.integers(1, 50),
    segments=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_segment_sum_matches_reference(device: str, num_rows, dim, segments, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator)
    indices = torch.randint(-1, segments, (num_rows,), generator=generator)
    sums, counts = ops.segment_sum(rows.to(device), indices.to(device), segments)
    exact, true_counts = reference.segment_sum(rows.double(), indices, segments)
    assert torch.equal(counts.cpu(), true_counts)
    torch.testing.assert_close(sums.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    again, _ = ops.segment_sum(rows.to(device), indices.to(device), segments)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32768, 131072])
def test_the_papers_pyramids(device: str, size: int) -> None:
    """XL's fifteen scales with the paper's codebook and the largest of its study."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(s, s) for s in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)]
    problem = Problem([32, 8], [1.0, 1.0], True, torch.randn(size, 40, generator=generator), None)
    h = torch.randn(1, 40, 27, 27, generator=generator)
    ours, grads = quantize_all(ops, h.to(device), problem.codebook.to(device), problem, sizes, None)
    exact, exact_grads = quantize_all(
        reference,
        h.double(),
        problem.codebook.double(),
        problem,
        sizes,
        -1,
        indices=ours.indices.cpu(),
    )
    torch.testing.assert_close(ours.quantized.cpu().double(), exact.quantized, rtol=1e-5, atol=1e-5)
    for mine, true in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [-80, -43, -24, -20, 24, 60, 110])
def test_results_scale_with_the_input(device: str, power: int) -> None:
    """Without l2_norm a power of two changes no token, and no digit of what is linear."""
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(2, 12, 8, 8, generator=generator)
    codebook = torch.randn(256, 12, generator=generator)
    grad = torch.randn(2, 12, 8, 8, generator=generator).to(device)

    def run(scale: float) -> tuple[ops.QuantizeResult, tuple[Tensor, ...]]:
        inputs = [(x * scale).to(device).requires_grad_() for x in (h, codebook)]
        sizes = [(1, 1), (2, 2), (3, 5), (8, 8)]
        result = ops.multiscale_quantize(*inputs, [8, 4], sizes, [1.0, 0.25], l2_norm=False)
        # The losses are squares, whose gradients are linear; weighted as the rest is.
        total = (result.quantized * grad).sum() * scale
        total = total + result.code_error.sum() + result.row_error.sum()
        return result, torch.autograd.grad(total, inputs)

    scale = 2.0**power
    one, one_grads = run(1.0)
    other, grads = run(scale)
    assert torch.equal(other.indices, one.indices)
    assert torch.equal(other.quantized, one.quantized * scale)
    for got, expected in zip(grads, one_grads, strict=True):
        assert torch.equal(got, expected * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_averages_of_the_largest_numbers(device: str) -> None:
    """A bin's sum is beyond float32, its average is not."""
    largest = torch.finfo(torch.float32).max
    h = torch.full((1, 2, 4, 6), 0.75 * largest, device=device)
    h[:, 1] *= -1
    codebook = torch.tensor([[0.0, 0.0], [0.5, -0.5], [0.75, -0.75]], device=device) * largest
    result = ops.multiscale_quantize(h, codebook, [2], [(1, 1), (2, 3)], l2_norm=False)
    assert result.indices.tolist() == [[2] + 6 * [0]]
    rows = ops.multiscale_rows(h, codebook, result.indices, [2], [(1, 1), (2, 3)], l2_norm=False)
    torch.testing.assert_close(rows[0, 0], codebook[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-19, 1e19, 1e25, 3e37])
def test_normalised_pyramids_of_any_size(device: str, size: float) -> None:
    """Lengths whose squares float32 does not hold, against the same numbers in float64."""
    generator = torch.Generator().manual_seed(8)
    h = torch.randn(2, 6, 4, 4, generator=generator) * size
    codebook = torch.randn(64, 6, generator=generator) * size
    arguments = ([4, 2], [(2, 2), (4, 4)])
    got = ops.multiscale_quantize(h.to(device), codebook.to(device), *arguments)
    exact = reference.multiscale_quantize(
        h.double(), codebook.double(), *arguments, indices=got.indices.cpu()
    )
    torch.testing.assert_close(got.quantized.cpu().double(), exact.quantized, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.code_error.cpu().double(), exact.code_error, rtol=1e-5, atol=0)
    chosen = reference.multiscale_quantize(h.double(), codebook.double(), *arguments).indices
    if size > 1e-12:  # shorter rows are divided by that, and are all but zero beside unit codes
        assert torch.equal(got.indices.cpu(), chosen)


def test_same_bits_in_every_run() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 40, 8, 8, generator=generator)
    problem = Problem([32, 8], [1.0, 1.0], True, torch.randn(900, 40, generator=generator), None)
    sizes = [(1, 1), (4, 4), (8, 8)]
    first, first_grads = quantize_all(ops, h, problem.codebook, problem, sizes, None)
    for _ in range(3):
        again, again_grads = quantize_all(ops, h, problem.codebook, problem, sizes, None)
        for a, b in zip([*first, *first_grads], [*again, *again_grads], strict=True):
            assert torch.equal(a, b)


def test_a_batch_gives_what_its_images_give() -> None:
    h = torch.randn(5, 40, 6, 6)
    codebook = torch.randn(300, 40)
    sizes = [(1, 1), (3, 3), (6, 6)]
    joint = ops.multiscale_quantize(h, codebook, [32, 8], sizes)
    for b in range(5):
        alone = ops.multiscale_quantize(h[b : b + 1], codebook, [32, 8], sizes)
        assert torch.equal(alone.indices[0], joint.indices[b])
        assert torch.equal(alone.quantized[0], joint.quantized[b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 7, 4, 4)}, r"h must have sum\(dims\) = 8 channels, got shape \[2, 7"),
        ({"h": torch.zeros(0, 8, 4, 4)}, "batch must not be empty, got 0"),
        ({"h": torch.zeros(2, 8, 0, 4)}, "height and width must be 1 to"),
        ({"h": torch.zeros(2, 8, 4)}, "h must have 4 dimensions"),
        ({"h": torch.zeros(2, 8, 4, 4).long()}, "h must be float32 or float64"),
        ({"sizes": []}, "sizes must hold"),
        ({"sizes": [(0, 1)]}, "sizes must be 1 to .* got 0 x 1 at scale 0"),
        ({"sizes": [(1, 1)] * 65}, "sizes must hold .* 64 scales"),
        ({"dropped": torch.tensor(0.5)}, "dropped must be one int64"),
        ({"codebook": torch.full((5, 8), torch.inf)}, "codebook must be finite"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {
        "h": torch.randn(2, 8, 4, 4),
        "codebook": torch.randn(5, 8),
        "dims": [8],
        "sizes": [(1, 1), (2, 2)],
    }
    with pytest.raises(RuntimeError, match=message):
        ops.multiscale_quantize(**{**arguments, **change})


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**62)])
def test_indices_out_of_range_are_refused(bad: int) -> None:
    codebook = torch.randn(5, 8)
    indices = torch.zeros(2, 5, dtype=torch.int64)
    indices[1, 3] = bad
    with pytest.raises(
        RuntimeError, match=rf"indices must be in \[0, 5\), got {bad} at position 8"
    ):
        ops.multiscale_decode(indices, codebook, [8], [(1, 1), (2, 2)], (4, 4))
    with pytest.raises(RuntimeError, match="indices must be int64, got Int"):
        ops.multiscale_decode(indices.int(), codebook, [8], [(1, 1), (2, 2)], (4, 4))
    if bad != -1:
        with pytest.raises(RuntimeError, match=r"indices must be in \[-1, 5\)"):
            ops.segment_sum(torch.randn(10, 2), indices.flatten(), 5)
