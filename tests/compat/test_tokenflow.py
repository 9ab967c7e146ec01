"""`VectorQuantizer` against TokenFlow's release, written out from its description in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compat.helpers import entropy, largest_tensor, second_derivative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.compat import VectorQuantizer

CODES, SPLIT = 60, (5, 3)
DIM = sum(SPLIT)
SCALES = (1, 2, 4, 6)


def build(dtype=torch.float64, **options) -> VectorQuantizer:
    arguments = {
        "n_e": CODES,
        "e_dim": DIM,
        "beta": 0.25,
        "entropy_loss_ratio": 0.0,
        "l2_norm": True,
        "show_usage": True,
        "split": list(SPLIT),
        **options,
    }
    torch.manual_seed(0)
    module = VectorQuantizer(**arguments).to(dtype)
    with torch.no_grad():  # rows of other lengths than 1: they are normalised at use
        for embedding in (module.embedding_vqkd, module.embedding_vqgan):
            embedding.weight.copy_(torch.randn_like(embedding.weight))
    return module


def features(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def step(module: VectorQuantizer, maps: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """One scale: straight-through result, (vq, commitment, two distance norms), indices."""
    groups = [module.embedding_vqkd.weight, module.embedding_vqgan.weight]
    rows = list(maps.permute(0, 2, 3, 1).reshape(-1, DIM).split(SPLIT, dim=1))
    if module.l2_norm:
        groups = [F.normalize(group, dim=1) for group in groups]
        rows = [F.normalize(row, dim=1) for row in rows]
    distances = [
        (row.unsqueeze(1) - group).square().sum(dim=2)
        for row, group in zip(rows, groups, strict=True)
    ]
    index = (distances[0] + distances[1]).argmin(dim=1)
    z, q = torch.cat(rows, dim=1), torch.cat(groups, dim=1)[index]
    vq_loss = (q - z.detach()).square().mean()
    commitment = module.beta * (q.detach() - z).square().mean()
    norms = [d.square().sum(dim=1).mean().detach() for d in distances]
    batch, _, height, width = maps.shape
    result = (z + (q - z).detach()).view(batch, height, width, DIM).permute(0, 3, 1, 2)
    return result, [vq_loss, commitment, *norms], index


def loop(module: VectorQuantizer, h: Tensor, scales) -> tuple[Tensor, list[Tensor], Tensor]:
    """The release's loop over scales: f^, means of the losses, indices [B, L]."""
    residual, f_hat, losses, indices = h, torch.zeros_like(h), [], []
    for scale in scales:
        size = (scale, scale) if isinstance(scale, int) else scale
        q, parts, index = step(module, F.interpolate(residual, size, mode="area"))
        q = F.interpolate(q, h.shape[2:], mode="bicubic", align_corners=False)
        f_hat = f_hat + q
        residual = residual - q.detach()
        losses.append(torch.stack(parts))
        indices.append(index.view(len(h), -1))
    return f_hat, list(torch.stack(losses).mean(dim=0)), torch.cat(indices, dim=1)


def gradients(module: VectorQuantizer, h: Tensor, quantized: Tensor, losses: list) -> tuple:
    weight = features(*quantized.shape, seed=8).to(quantized)
    total = (quantized * weight).sum() + losses[0] + losses[1]
    return torch.autograd.grad(
        total, [h, module.embedding_vqkd.weight, module.embedding_vqgan.weight]
    )


@pytest.mark.parametrize("l2_norm", [True, False])
def test_one_map(l2_norm: bool) -> None:
    module = build(l2_norm=l2_norm, beta=0.6)
    z = features(2, DIM, 4, 7).requires_grad_()
    quantized, losses, info = module(z)
    true, parts, index = step(module, z)
    torch.testing.assert_close(quantized, true)
    assert isinstance(losses, tuple)
    assert isinstance(info, tuple)
    vq_loss, commitment, entropy, usage, semantic_norm, pixel_norm = losses
    for mine, other in zip((vq_loss, commitment, semantic_norm, pixel_norm), parts, strict=True):
        torch.testing.assert_close(mine, other)
    assert entropy == 0
    assert info[:2] == (None, None)
    assert torch.equal(info[2], index)
    # The window starts as zeros, and so code 0 counts as used.
    assert float(usage) == pytest.approx(len({0, *index.tolist()}) / CODES)
    for mine, other in zip(
        gradients(module, z, quantized, losses), gradients(module, z, true, parts), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_entropy_loss_of_one_map(l2_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow_ext.soft_entropy.CHUNK", 7 * CODES)
    module = build(l2_norm=l2_norm, entropy_loss_ratio=0.3)
    z = (0.1 * features(2, DIM, 4, 7)).requires_grad_()
    _, losses, _ = module(z)
    rows = list(z.permute(0, 2, 3, 1).reshape(-1, DIM).split(SPLIT, dim=1))
    groups = [module.embedding_vqkd.weight, module.embedding_vqgan.weight]
    if l2_norm:
        rows, groups = ([F.normalize(t, dim=1) for t in part] for part in (rows, groups))
    pairs = zip(rows, groups, strict=True)
    distances = sum((r.unsqueeze(1) - g).square().sum(dim=2) for r, g in pairs)
    true = 0.3 * entropy(distances)
    torch.testing.assert_close(losses[2], true)
    inputs = [z, module.embedding_vqkd.weight, module.embedding_vqgan.weight]
    for mine, other in zip(
        torch.autograd.grad(losses[2], inputs), torch.autograd.grad(true, inputs), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_rows_that_are_not_finite_are_no_use_of_a_code() -> None:
    module = build(torch.float32)
    h = features(2, DIM, 6, 6).float()
    h[1, 2, 3, 4] = float("nan")
    scales = (1, 2, 3, 6)
    _, _, indices = module.encode_scales(h, scales)
    seen = []
    for part, scale in zip(indices.split([1, 4, 9, 36], dim=1), scales, strict=True):
        finite = F.interpolate(h, (scale, scale), mode="area").isfinite().all(dim=1)
        seen += part[finite.flatten(1)].tolist()
    assert int(module.skipped_rows) == 4
    assert len(seen) == 2 * 50 - 4
    assert module.codebook_used[-len(seen) :].tolist() == seen
    assert not module.codebook_used[: -len(seen)].any()


@pytest.mark.parametrize("l2_norm", [True, False])
def test_second_derivatives(l2_norm: bool) -> None:
    module = build(l2_norm=l2_norm)
    z = features(1, DIM, 3, 3)

    def ours(z: Tensor) -> Tensor:
        quantized, losses, _ = module(z)
        return quantized.pow(3).sum() + losses[0] + losses[1]

    def true(z: Tensor) -> Tensor:
        quantized, losses, _ = step(module, z)
        return quantized.pow(3).sum() + losses[0] + losses[1]

    torch.testing.assert_close(second_derivative(ours, z), second_derivative(true, z))


def test_evaluation_has_no_losses() -> None:
    module = build().eval()
    before = copy.deepcopy(module.state_dict())
    _, losses, _ = module(features(1, DIM, 3, 3))
    assert losses[:4] == (None, None, None, 0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(
    ("scales", "size"),
    [(SCALES, (6, 6)), ((1, 2, 6), (6, 6)), ((1, 2, 4), (6, 6)), ((1, (2, 3), (4, 5)), (4, 5))],
)
def test_all_scales_in_one_call(scales, size, l2_norm: bool) -> None:
    """Dropped scales included: a dropped last one still ends at the size of h."""
    module = build(l2_norm=l2_norm)
    h = features(2, DIM, *size).requires_grad_()
    f_hat, losses, indices = module.encode_scales(h, scales)
    true, parts, true_indices = loop(module, h, scales)
    torch.testing.assert_close(f_hat, true)
    assert torch.equal(indices, true_indices)
    vq_loss, commitment, entropy, _, *norms = losses
    for mine, other in zip((vq_loss, commitment, *norms), parts, strict=True):
        torch.testing.assert_close(mine, other)
    assert entropy == 0
    for mine, other in zip(
        gradients(module, h, f_hat, losses), gradients(module, h, true, parts), strict=True
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(module.decode_scales(indices, scales, size), true.detach())


def test_the_released_loop_runs_on_forward_alone() -> None:
    """Replacing the class and nothing else gives what encode_scales gives."""
    module = build().eval()
    h = features(2, DIM, 6, 6)
    residual, f_hat, indices = h, 0.0, []
    for scale in SCALES:
        part = F.interpolate(residual, size=(scale, scale), mode="area")
        quantized, _, info = module(part)
        quantized = F.interpolate(quantized, size=(6, 6), mode="bicubic")
        f_hat = f_hat + quantized
        residual = residual - quantized.detach()
        indices.append(info[-1].reshape([-1, scale**2]))
    fused, _, fused_indices = module.encode_scales(h, SCALES)
    assert torch.equal(torch.cat(indices, dim=1), fused_indices)
    torch.testing.assert_close(f_hat, fused)


def test_agrees_with_the_module_of_this_package() -> None:
    module = build(torch.float32).eval()
    quantizer = MultiScaleQuantizer(CODES, SPLIT, SCALES).eval()
    quantizer.codebooks[0].data.copy_(module.embedding_vqkd.weight)
    quantizer.codebooks[1].data.copy_(module.embedding_vqgan.weight)
    h = features(2, DIM, 6, 6).float()
    f_hat, _, indices = module.encode_scales(h, SCALES)
    out = quantizer(h)
    assert torch.equal(indices, out.indices)
    assert torch.equal(f_hat, out.quantized)


@settings(deadline=None, max_examples=40)
@given(
    codes=st.integers(1, 300),
    split=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    l2_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_distance_norms_and_choice(codes: int, split, shape, l2_norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = VectorQuantizer(codes, sum(split), 0.25, 0.0, l2_norm, False, split).eval()
    batch, height, width = shape
    z = torch.randn(batch, sum(split), height, width) / codes
    _, losses, (_, _, index) = module(z)
    total = torch.zeros(batch * height * width, codes, dtype=torch.float64)
    parts = zip(
        z.double().permute(0, 2, 3, 1).flatten(0, 2).split(split, dim=1),
        (module.embedding_vqkd.weight.double(), module.embedding_vqgan.weight.double()),
        losses[4:],
        strict=True,
    )
    for rows, group, norm in parts:
        if l2_norm:
            rows, group = F.normalize(rows, dim=1), F.normalize(group, dim=1)
        distances = (rows.unsqueeze(1) - group).square().sum(dim=2)
        true = distances.square().sum(dim=1).mean()
        torch.testing.assert_close(
            norm.double(), true, rtol=1e-4, atol=1e-12 + 1e-5 * codes * l2_norm
        )
        total += distances
    chosen = total.gather(1, index.unsqueeze(1)).squeeze(1)
    assert (chosen <= total.amin(dim=1) * (1 + 1e-5) + 1e-6 * l2_norm).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    module = build(dtype)
    h = features(2, DIM, 6, 6).to(dtype).requires_grad_()
    exact = build()
    exact.load_state_dict(module.state_dict())
    f_hat, losses, indices = module.encode_scales(h, SCALES)
    true, _, true_indices = exact.encode_scales(h.double(), SCALES)
    assert f_hat.dtype == dtype
    assert torch.equal(indices, true_indices)
    torch.testing.assert_close(f_hat.double(), true, rtol=0, atol=6 * torch.finfo(dtype).eps * 4)
    (f_hat.float().sum() + losses[0] + losses[1]).backward()
    assert h.grad.dtype == module.embedding_vqkd.weight.grad.dtype == dtype


def test_names_and_shapes_of_the_released_checkpoints() -> None:
    shapes = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    assert shapes == {
        "codebook_used": (131072,),
        "embedding_vqkd.weight": (CODES, SPLIT[0]),
        "embedding_vqgan.weight": (CODES, SPLIT[1]),
    }
    assert "codebook_used" not in build(show_usage=False).state_dict()


def test_window_of_used_codes() -> None:
    module = build(torch.float32)
    seen: list[int] = [0] * 131072
    for number in range(3):
        _, losses, info = module(features(40, DIM, 40, 40, seed=number).float())
        seen = (seen + info[2].tolist())[-131072:]
        assert module.codebook_used.tolist() == seen
        assert float(losses[3]) == pytest.approx(len(set(seen)) / CODES)
    assert losses[3] == 1
    many = features(1, DIM, 400, 400).float()
    _, _, info = module(many)
    assert torch.equal(module.codebook_used.long(), info[2][-131072:])


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_codebook_entries(l2_norm: bool, integer: torch.dtype) -> None:
    module = build(l2_norm=l2_norm)
    index = torch.arange(24, dtype=integer)
    groups = [module.embedding_vqkd.weight, module.embedding_vqgan.weight]
    if l2_norm:
        groups = [F.normalize(group, dim=1) for group in groups]
    rows = torch.cat(groups, dim=1)[:24]
    torch.testing.assert_close(module.get_codebook_entry(index), rows)
    torch.testing.assert_close(module.get_codebook_entry(index.view(2, 12)), rows.view(2, 12, DIM))
    maps = rows.view(2, 3, 4, DIM)
    torch.testing.assert_close(
        module.get_codebook_entry(index, (2, DIM, 3, 4)), maps.permute(0, 3, 1, 2)
    )
    torch.testing.assert_close(
        module.get_codebook_entry(index, (2, 3, 4, DIM), channel_first=False), maps
    )
    other = build(l2_norm=l2_norm)
    with torch.no_grad():
        other.embedding_vqkd.weight.neg_()
    pair = (other.embedding_vqkd, other.embedding_vqgan)
    torch.testing.assert_close(
        module.get_codebook_entry_outside(index, pair), other.get_codebook_entry(index)
    )


def test_starts_as_the_release() -> None:
    torch.manual_seed(0)
    unit = VectorQuantizer(CODES, DIM, 0.25, 0.0, True, True, SPLIT)
    torch.testing.assert_close(unit.embedding_vqkd.weight.norm(dim=1), torch.ones(CODES))
    raw = VectorQuantizer(CODES, DIM, 0.25, 0.0, False, True, SPLIT)
    assert 0 < raw.embedding_vqgan.weight.abs().max() <= 1 / CODES


def test_no_matrix_of_distances() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(900, DIM, 0.25, 0.0, True, False, SPLIT)
    h = torch.randn(2, DIM, 20, 20, requires_grad=True)
    with largest_tensor() as largest:
        f_hat, losses, _ = module.encode_scales(h, (1, 10, 20))
        (f_hat.sum() + losses[0] + losses[1]).backward()
    assert h.numel() <= largest.numel < 2 * 400 * 900 / 10


def test_unsupported_options_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"entropy_loss_ratio=0\.1: .* call forward"):
        build(entropy_loss_ratio=0.1).encode_scales(features(1, DIM, 6, 6), SCALES)
    with pytest.raises(NotImplementedError, match="kmeans=True"):
        build(kmeans=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": [5, 4]}, r"split must hold two widths that sum to e_dim=8, got \[5, 4\]"),
        ({"split": [8]}, "two widths"),
        ({"split": [8, 0]}, "two widths"),
        ({"n_e": 0}, "n_e must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_inputs() -> None:
    module = build()
    for shape in ((2, 3, 4, 4), (0, DIM, 4, 4), (2, DIM, 4)):
        with pytest.raises(ValueError, match=rf"\[B, {DIM}, H, W\]"):
            module.encode_scales(torch.zeros(shape), SCALES)
    with torch.no_grad():
        module.embedding_vqgan.weight[3, 0] = float("nan")
    with pytest.raises(RuntimeError, match="codebook must be finite"):
        module(features(1, DIM, 2, 2))
