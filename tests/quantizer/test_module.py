"""MultiScaleQuantizer: its outputs, its state, the care of its codebook, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.strategies import DEVICES, pyramids

from tokenflow_ext import CodebookUsage, MultiScaleQuantizer, reference
from tokenflow_ext.var import VarQuantizer


def make(size: int = 50, **options) -> MultiScaleQuantizer:
    return MultiScaleQuantizer(size, (4, 2), (1, 2, 4), **{"scale_drop": 0.0, **options})


def test_defaults_are_the_papers() -> None:
    quantizer = MultiScaleQuantizer(64)
    assert [tuple(c.shape) for c in quantizer.codebooks] == [(64, 32), (64, 8)]
    assert quantizer.num_tokens == 561
    assert MultiScaleQuantizer(4, scales=(1, 2, 4, 6, 8, 10, 12, 14, 16)).num_tokens == 817
    xl = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
    assert MultiScaleQuantizer(4, scales=xl).num_tokens == 2227


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=40)
@given(
    scales=pyramids,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8)),
    seed=st.integers(0, 1000),
)
def test_losses_and_usage_are_those_of_the_definition(device, scales, shape, seed) -> None:
    torch.manual_seed(seed)
    batch, height, width = shape
    quantizer = MultiScaleQuantizer(
        40, (3, 2), scales, beta=0.5, weights=(1, 0.5), scale_drop=0.0
    ).to(device)
    h = torch.randn(batch, 5, height, width, device=device)
    out = quantizer(h)
    expected = reference.multiscale_quantize(
        h.double(),
        quantizer.joint_codebook().double(),
        (3, 2),
        scales,
        (1, 0.5),
        indices=out.indices,
    )
    torch.testing.assert_close(out.quantized.double(), expected.quantized, rtol=1e-4, atol=1e-5)
    loss = expected.code_error.mean().float()
    torch.testing.assert_close(out.vq_loss, loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.commitment_loss, 0.5 * loss, rtol=1e-4, atol=1e-6)
    assert torch.equal(out.usage.hits, torch.bincount(out.indices.flatten(), minlength=40))
    p = out.usage.hits.double() / out.indices.numel()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    torch.testing.assert_close(out.usage.perplexity.double(), entropy.exp(), rtol=1e-5, atol=0)
    assert out.usage.share == (out.usage.hits > 0).float().mean()


@pytest.mark.parametrize("shape", [(5, 9), (4, 4), (7, 3)])
def test_tokens_decode_to_what_forward_returned(shape: tuple[int, int]) -> None:
    quantizer = MultiScaleQuantizer(50, (4, 2), (1, (2, 3), (5, 4))).eval()
    h = torch.randn(3, 6, *shape)
    out = quantizer(h)
    indices = quantizer.encode(h)
    assert torch.equal(indices, out.indices)
    torch.testing.assert_close(quantizer.decode(indices, size=shape), out.quantized)
    parts = quantizer.split(indices)
    assert [p.shape[1] for p in parts] == [1, 6, 20]
    assert torch.equal(torch.cat(parts, dim=1), indices)
    # The first few scales, asked for by number or given alone.
    two = quantizer.decode(indices, upto=2, size=shape)
    assert torch.equal(two, quantizer.decode(indices[:, :7], size=shape))
    one = quantizer.decode(indices, upto=1, size=shape)
    code = quantizer.codes(indices[:, 0])[..., None, None]
    torch.testing.assert_close(one, code.expand(-1, -1, *shape))
    assert quantizer.decode(indices).shape == (3, 6, 5, 4)


def test_one_scale_is_plain_vector_quantization() -> None:
    quantizer = MultiScaleQuantizer(50, (4, 2), (6,), scale_drop=0.0)
    h = torch.randn(2, 6, 6, 6)
    out = quantizer(h)
    rows = h.permute(0, 2, 3, 1).flatten(0, 2)
    nearest = reference.nearest_code(
        rows.double(), quantizer.joint_codebook().double(), (4, 2), (1, 1)
    )
    assert torch.equal(out.indices.flatten(), nearest)
    codes = quantizer.codes(nearest).view(2, 6, 6, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(out.quantized, codes)


def test_rows_in_the_place_of_codes() -> None:
    """Codes given as rows are the tokens' sums; means are halfway between those of their tokens."""
    quantizer = make().eval()
    one, other = torch.randint(0, 50, (2, 3, 21))
    rows = quantizer.codes(one)
    torch.testing.assert_close(quantizer.decode_rows(rows), quantizer.decode(one))
    size = (7, 5)
    torch.testing.assert_close(
        quantizer.decode_rows(rows, size), quantizer.decode(one, size=size), rtol=1e-4, atol=1e-5
    )
    mean = (rows + quantizer.codes(other)) / 2
    halfway = (quantizer.decode(one) + quantizer.decode(other)) / 2
    torch.testing.assert_close(quantizer.decode_rows(mean), halfway)
    f_hat = quantizer.accumulate(None, one[:, :1], 0)
    torch.testing.assert_close(quantizer.accumulate(None, rows[:, :1], 0), f_hat)
    torch.testing.assert_close(
        quantizer.accumulate(f_hat, rows[:, 1:5], 1), quantizer.accumulate(f_hat, one[:, 1:5], 1)
    )
    for wrong in (rows[:, :20], rows[..., :5], rows[0]):
        with pytest.raises(ValueError, match=r"rows must have shape \[B, 21, 6\]"):
            quantizer.decode_rows(wrong)
    with pytest.raises(ValueError, match=r"rows must have shape \[B, 4, 6\] at scale 1"):
        quantizer.accumulate(f_hat, rows[:, 1:4], 1)


def test_accumulate_carries_from_scale_to_scale() -> None:
    quantizer = make().eval()
    indices = torch.randint(0, 50, (2, 21))
    codes = reference.normalize_groups(quantizer.joint_codebook(), (4, 2))
    f_hat = torch.zeros(2, 6, 1, 1)
    expected = []
    for side, following, first in ((1, 2, 0), (2, 4, 1), (4, None, 5)):
        part = codes[indices[:, first : first + side**2]]
        f_hat = f_hat + part.view(2, side, side, 6).permute(0, 3, 1, 2)
        if following:
            f_hat = F.interpolate(f_hat, following, mode="bicubic", align_corners=False)
            expected.append(f_hat)
    first = quantizer.accumulate(None, indices[:, :1], 0)
    second = quantizer.accumulate(first, indices[:, 1:5], 1)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(second, expected[1])
    torch.testing.assert_close(quantizer.accumulate(second, indices[:, 5:], 2), f_hat)
    inputs = quantizer.next_scale_inputs(indices)
    torch.testing.assert_close(inputs[:, :4], expected[0].flatten(2).mT)
    torch.testing.assert_close(inputs[:, 4:], expected[1].flatten(2).mT)


def test_scale_drop() -> None:
    quantizer = make(scale_drop=1.0)
    h = torch.randn(2, 6, 4, 4)
    seen = set()
    for _ in range(20):
        out = quantizer(h)
        dropped = [s for s, part in enumerate(quantizer.split(out.indices)) if (part < 0).all()]
        assert len(dropped) == 1
        seen.update(dropped)
        kept = reference.multiscale_quantize(
            h, quantizer.joint_codebook(), (4, 2), quantizer.scales, dropped=dropped[0]
        )
        torch.testing.assert_close(out.quantized, kept.quantized)
        torch.testing.assert_close(out.vq_loss, kept.code_error.sum() / 2)
        assert out.usage.hits.sum() == (out.indices >= 0).sum()
    assert seen == {1, 2}, "every scale but the first is dropped in turn"
    assert (quantizer.eval()(h).indices >= 0).all()
    share = sum((make(scale_drop=0.3)(h).indices < 0).any().item() for _ in range(300)) / 300
    assert 0.15 < share < 0.45


def test_running_statistics() -> None:
    quantizer = make(usage_decay=0.9)
    expected, window = torch.zeros(50), torch.zeros(50, dtype=torch.int64)
    for _ in range(4):
        hits = quantizer(torch.randn(2, 6, 4, 4)).usage.hits
        expected = 0.9 * expected + 0.1 * hits
        window += hits
    torch.testing.assert_close(quantizer.usage_ema, expected)
    quantizer.eval()(torch.randn(2, 6, 4, 4))
    torch.testing.assert_close(quantizer.usage_ema, expected, msg="evaluation leaves no trace")
    usage = quantizer.usage_window()
    assert torch.equal(usage.hits, window)
    assert usage.share == (window > 0).float().mean()
    assert quantizer.usage_window().hits.sum() == 0


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dims", [(4, 2), (6,)])
def test_ema_codebook(l2_norm: bool, dims: tuple[int, ...]) -> None:
    quantizer = MultiScaleQuantizer(
        50, dims, (1, 2, 4), codebook_update="ema", usage_decay=0.8, l2_norm=l2_norm, scale_drop=0.0
    )
    size, sums = torch.zeros(50), torch.zeros(50, 6)
    h = torch.randn(2, 6, 4, 4, requires_grad=True)
    for _ in range(3):
        before = quantizer.joint_codebook().clone()
        out = quantizer(h)
        rows = reference.multiscale_rows(
            h.detach(), before, out.indices, dims, quantizer.scales, l2_norm
        ).flatten(0, 1)
        step, hits = reference.segment_sum(rows, out.indices.flatten(), 50)
        size, sums = 0.8 * size + 0.2 * hits, 0.8 * sums + 0.2 * step
        means = reference.normalize_groups(sums / size.clamp(min=1e-12).unsqueeze(1), dims, l2_norm)
        expected = torch.where(size.unsqueeze(1) > 1e-5, means, before)
        torch.testing.assert_close(quantizer.joint_codebook(), expected)
        assert out.vq_loss == 0
        (out.quantized.sum() + out.commitment_loss).backward()
    assert all(not p.requires_grad for p in quantizer.codebooks)
    assert h.grad is not None


def test_kmeans_finds_clusters() -> None:
    torch.manual_seed(0)
    centres = reference.normalize_groups(torch.randn(20, 6), (4, 2))
    features = centres.repeat(30, 1) + 0.01 * torch.randn(600, 6)
    quantizer = make(20)
    before = nearest_distance(quantizer, features)
    quantizer.init_kmeans(features, iterations=20)
    after = nearest_distance(quantizer, features)
    assert after < 0.2 * before
    norms = [codebook.norm(dim=1) for codebook in quantizer.codebooks]
    torch.testing.assert_close(norms, [torch.ones(20)] * 2)
    quantizer.init_kmeans(features[:7], iterations=2)  # fewer rows than codes
    assert torch.isfinite(quantizer.joint_codebook()).all()


def nearest_distance(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> float:
    d = reference.distances(features, quantizer.joint_codebook(), (4, 2), (1, 1))
    return d.amin(dim=1).mean().item()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_restart_of_dead_codes(update: str) -> None:
    quantizer = make(200, codebook_update=update)
    h = torch.randn(4, 6, 4, 4)
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook[100:] = codebook[:1]  # never the lowest index of a tie: dead
    for _ in range(3):
        quantizer(h)
    dead = quantizer.usage_ema < 0.05 * quantizer.usage_ema.mean()
    assert dead.sum() > 50
    kept = quantizer.joint_codebook()[~dead].clone()
    rows = quantizer.rows(h)
    moved = quantizer.restart_dead_codes(rows)
    assert moved == dead.sum()
    assert torch.equal(quantizer.joint_codebook()[~dead], kept)
    restarted = quantizer.joint_codebook()[dead].detach()
    distance = (restarted.unsqueeze(1) - rows).abs().amax(dim=2).amin(dim=1)
    assert distance.max() < 1e-5, "every restarted code is one of the features"
    assert (quantizer.usage_ema[dead] > 0).all()
    share = quantizer(h).usage.share
    assert share > 0.25
    assert quantizer.restart_dead_codes(rows, threshold=0.0) == 0
    if update == "ema":  # sums were reset with the codes, or this step would undo the restart
        means = quantizer.codebook_sums / quantizer.usage_ema.unsqueeze(1)
        live = quantizer.usage_ema > 1e-5
        torch.testing.assert_close(
            reference.normalize_groups(means, (4, 2))[live], quantizer.joint_codebook()[live]
        )


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_copies_pickles_and_state(update: str) -> None:
    quantizer = make(codebook_update=update, atomic_codebook_gradient=True)
    h = torch.randn(2, 6, 4, 4)
    quantizer(h)
    fresh = make(codebook_update=update)
    fresh.load_state_dict(quantizer.state_dict())
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    saved = make(codebook_update=update)
    saved.load_state_dict(torch.load(buffer, weights_only=True))
    twins = (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh, saved)
    # How the gradient is summed belongs to the module, not to its state.
    assert [twin.atomic_codebook_gradient for twin in twins] == [True, True, False, False]
    expected = quantizer(h)
    for twin in twins:
        for a, b in zip(twin(h)[:4], expected[:4], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(twin.state_dict().values(), quantizer.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_half_modules_keep_their_statistics() -> None:
    quantizer = make().half()
    assert quantizer.codebooks[0].dtype == torch.float16
    assert quantizer.usage_ema.dtype == torch.float32
    out = quantizer(torch.randn(2, 6, 4, 4).half())
    assert out.quantized.dtype == torch.float16
    assert torch.isfinite(out.vq_loss)


def test_no_allocation_grows_with_the_distance_matrix() -> None:
    """The profiler sees every tensor; none is near N x K."""
    quantizer = MultiScaleQuantizer(20000, (32, 8), (16, 16)).eval()
    h = torch.randn(4, 40, 16, 16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        quantizer(h)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 2 * 20000 * 40
    assert largest < 4 * 2048 * 20000 / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"dims": ()}, "dims must hold"),
        ({"dims": (4, 0)}, r"dims must hold .*\(4, 0\)"),
        ({"scales": ()}, "scales must hold"),
        ({"scales": (1, 0)}, "scales must hold"),
        ({"weights": (1.0,)}, "weights must hold 2 finite numbers"),
        ({"weights": (1.0, -1.0)}, "weights must hold 2 finite numbers"),
        ({"weights": (1.0, float("nan"))}, "weights must hold 2 finite numbers"),
        ({"codebook_update": "adam"}, "codebook_update must be 'gradient' or 'ema', got 'adam'"),
        ({"usage_decay": 1.5}, r"usage_decay must be in \[0, 1\], got 1.5"),
        ({"scale_drop": -0.1}, r"scale_drop must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(**{"codebook_size": 8, "dims": (4, 2), "scales": (1, 2), **arguments})


@pytest.mark.parametrize(
    ("h", "error", "message"),
    [
        (torch.zeros(0, 6, 4, 4), ValueError, r"h must have shape .* got \(0, 6, 4, 4\)"),
        (torch.zeros(2, 5, 4, 4), ValueError, r"h must have shape \[B, 6, H, W\].*\(2, 5, 4, 4\)"),
        (torch.zeros(2, 6, 4), ValueError, "h must have shape"),
        (torch.zeros(2, 6, 0, 4), ValueError, "h must have shape"),
        (torch.zeros(2, 6, 4, 4, dtype=torch.int64), TypeError, "h must be a floating-point"),
        (torch.zeros(2, 6, 4, 4, dtype=torch.complex64), TypeError, "h must be a floating-point"),
    ],
)
def test_bad_features_are_refused(h: torch.Tensor, error: type, message: str) -> None:
    quantizer = make()
    for call in (quantizer, quantizer.encode):
        with pytest.raises(error, match=message):
            call(h)
    assert quantizer.usage_ema.sum() == 0, "nothing was counted"


def test_a_codebook_that_is_not_finite_is_refused() -> None:
    quantizer = make()
    with torch.no_grad():
        quantizer.codebooks[1][7, 0] = torch.nan
    h = torch.randn(1, 6, 4, 4)
    with pytest.raises(RuntimeError, match=r"codebook must be finite.*row 7"):
        quantizer(h)
    with pytest.raises(ValueError, match=r"codebooks\[1\] must be finite"):
        quantizer(h, check=True)
    with pytest.raises(RuntimeError, match="codebook must be finite"):
        quantizer.decode(torch.zeros(1, 21, dtype=torch.int64))


def test_bad_tokens_are_refused() -> None:
    quantizer = make()
    good = torch.zeros(2, 21, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"indices must be int64, got torch\.int32"):
        quantizer.decode(good.int())
    with pytest.raises(ValueError, match=r"indices must have shape \[B, L\]"):
        quantizer.decode(good[0])
    with pytest.raises(ValueError, match=r"indices must hold the tokens of the first scales .* 20"):
        quantizer.decode(good[:, :20])
    with pytest.raises(ValueError, match="upto must be 1 to 3"):
        quantizer.decode(good, upto=4)
    with pytest.raises(ValueError, match="upto must be 1 to 1 for 1 tokens, got 2"):
        quantizer.decode(good[:, :1], upto=2)
    for bad in (-1, 50):
        indices = good.clone()
        indices[1, 2] = bad
        with pytest.raises(RuntimeError, match=rf"indices must be in \[0, 50\), got {bad}"):
            quantizer.decode(indices)
        with pytest.raises(ValueError, match=r"indices must be in \[0, 50\)"):
            quantizer.decode(indices, check=True)
    with pytest.raises(ValueError, match="scale must be 0 to 2, got 3"):
        quantizer.accumulate(None, good[:, :1], 3)
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 4\] at scale 1"):
        quantizer.accumulate(None, good[:, :1], 1)
    with pytest.raises(ValueError, match="f_hat must have shape"):
        quantizer.accumulate(torch.zeros(2, 6, 1, 1), good[:, 1:5], 1)
    with pytest.raises(ValueError, match="features must have shape"):
        quantizer.init_kmeans(torch.zeros(0, 6))


def test_usage_of_nothing() -> None:
    usage = CodebookUsage.from_hits(torch.zeros(5, dtype=torch.int64))
    assert usage.share == 0
    assert usage.perplexity == 1


def _state(quantizer: MultiScaleQuantizer) -> dict[str, torch.Tensor]:
    kept = {**quantizer.state_dict(), "window_hits": quantizer.window_hits}
    return {name: value.clone() for name, value in kept.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"l2_norm": False}])
@pytest.mark.parametrize("kind", ["gradient", "ema", "var"])
def test_features_that_are_not_finite_leave_no_trace(device, kind, options, bad) -> None:
    """The state after a batch with bad images is that after the batch without them."""

    def build() -> MultiScaleQuantizer:
        torch.manual_seed(0)
        if kind == "var":
            return VarQuantizer(50, 6, (1, 2, 4), phi_shared=3, **options).to(device)
        return make(codebook_update=kind, **options).to(device)

    h = torch.randn(5, 6, 4, 4, device=device)
    spoiled = h.clone()
    spoiled[1, 2, 3, 0] = bad
    spoiled[4] = bad
    ours, expected = build(), build()
    for batch, clean in ((h, h), (spoiled, h[[0, 2, 3]])):
        hits = ours(batch).usage.hits
        assert torch.equal(hits, expected(clean).usage.hits)
    for name, value in _state(expected).items():
        torch.testing.assert_close(_state(ours)[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert int(ours.skipped_rows) == 2 * ours.num_tokens
    assert int(expected.skipped_rows) == 0

    before = _state(ours)
    ours(torch.full_like(h, bad))
    assert all(torch.equal(value, before[name]) for name, value in _state(ours).items())
    assert int(ours.skipped_rows) == 7 * ours.num_tokens
    ours(h, check=True)


def test_the_care_of_a_codebook_leaves_out_rows_that_are_not_finite() -> None:
    torch.manual_seed(0)
    quantizer = make()
    features = torch.randn(200, 6)
    features[::3, 1] = float("nan")
    features[1::3, 5] = float("inf")
    quantizer.init_kmeans(features, iterations=2)
    assert quantizer.joint_codebook().isfinite().all()
    assert int(quantizer.skipped_rows) == 134
    quantizer(torch.randn(2, 6, 4, 4))
    assert quantizer.restart_dead_codes(features) > 0
    assert quantizer.joint_codebook().isfinite().all()
    before = _state(quantizer)
    for care in (quantizer.init_kmeans, quantizer.restart_dead_codes):
        with pytest.raises(ValueError, match="finite row"):
            care(torch.full((3, 6), float("nan")))
    assert all(torch.equal(value, before[name]) for name, value in _state(quantizer).items())


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_reset_parameters_fills_everything(update) -> None:
    with torch.device("meta"):
        quantizer = make(codebook_update=update)
    quantizer.to_empty(device="cpu")
    for tensor in (*quantizer.parameters(), *quantizer.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 7)
    quantizer.reset_parameters()
    assert all(bool(codes.isfinite().all()) for codes in quantizer.codebooks)
    assert not any(bool(buffer.any()) for buffer in quantizer.buffers())
