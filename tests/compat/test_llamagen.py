"""`llamagen.VectorQuantizer` against its method (arXiv 2406.06525), written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compat.helpers import entropy, largest_tensor, nearest_within, second_derivative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext.compat.llamagen import VectorQuantizer

CODES, DIM = 40, 6


def build(dtype=torch.float64, **options) -> VectorQuantizer:
    arguments = {"beta": 0.25, "entropy_loss_ratio": 0.0, "l2_norm": True, "show_usage": True}
    torch.manual_seed(0)
    module = VectorQuantizer(CODES, DIM, *{**arguments, **options}.values()).to(dtype)
    with torch.no_grad():  # rows of other lengths than 1: they are normalised at use
        module.embedding.weight.copy_(torch.randn_like(module.embedding.weight))
    return module


def features(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def step(module: VectorQuantizer, z: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """(straight-through result, [vq, commitment, entropy], indices), with every distance."""
    rows, codes = z.permute(0, 2, 3, 1), module.embedding.weight
    if module.l2_norm:
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    distances = (rows.reshape(-1, 1, DIM) - codes).square().sum(dim=2)
    index = distances.argmin(dim=1)
    q = codes[index].view(rows.shape)
    losses = [
        (q - rows.detach()).square().mean(),
        module.beta * (q.detach() - rows).square().mean(),
        module.entropy_loss_ratio * entropy(distances),
    ]
    return (rows + (q - rows).detach()).permute(0, 3, 1, 2), losses, index


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (1, 1)])
def test_training(l2_norm: bool, ratio: float, size: tuple, monkeypatch) -> None:
    monkeypatch.setattr("tokenflow_ext.soft_entropy.CHUNK", 5 * CODES)
    module = build(beta=0.6, l2_norm=l2_norm, entropy_loss_ratio=ratio)
    z = (0.2 * features(2, DIM, *size)).requires_grad_()
    quantized, losses, info = module(z)
    true, true_losses, index = step(module, z)
    torch.testing.assert_close(quantized, true)
    assert isinstance(losses, tuple)
    assert len(losses) == 4
    assert info[:2] == (None, None)
    assert torch.equal(info[2], index)
    assert info[2].shape == (2 * size[0] * size[1],)
    # The window starts as zeros, and so code 0 counts as used.
    assert float(losses[3]) == pytest.approx(len({0, *index.tolist()}) / CODES)
    weight, inputs = features(*z.shape, seed=8), [z, module.embedding.weight]
    for mine, other in zip(losses, true_losses, strict=False):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(
        torch.autograd.grad((quantized * weight).sum() + sum(losses[:3]), inputs),
        torch.autograd.grad((true * weight).sum() + sum(true_losses), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_evaluation() -> None:
    module = build(entropy_loss_ratio=0.1).eval()
    before = copy.deepcopy(module.state_dict())
    z = features(2, DIM, 5, 3)
    quantized, losses, (_, _, index) = module(z)
    true, _, true_index = step(module, z)
    torch.testing.assert_close(quantized, true)
    assert torch.equal(index, true_index)
    assert losses == (None, None, None, 0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    entry = module.get_codebook_entry(index, (2, DIM, 5, 3))
    torch.testing.assert_close(entry, quantized)
    torch.testing.assert_close(
        module.get_codebook_entry(index.int(), (2, 5, 3, DIM), channel_first=False),
        quantized.permute(0, 2, 3, 1),
    )
    torch.testing.assert_close(
        module.get_codebook_entry(index), quantized.permute(0, 2, 3, 1).reshape(-1, DIM)
    )


def test_names_of_the_released_checkpoints() -> None:
    shapes = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    assert shapes == {"embedding.weight": (CODES, DIM), "codebook_used": (65536,)}
    assert list(build(show_usage=False).state_dict()) == ["embedding.weight"]


def test_window_of_used_codes() -> None:
    module = build(torch.float32)
    seen: list[int] = [0] * 65536
    for number in range(3):
        z = features(20, DIM, 40, 40, seed=number).float()
        z[number, :, 3, 4:6] = float("nan")
        _, losses, info = module(z)
        kept = z.isfinite().all(dim=1).flatten()
        seen = (seen + info[2][kept].tolist())[-65536:]
        assert module.codebook_used.tolist() == seen
        assert float(losses[3]) == pytest.approx(len(set(seen)) / CODES)
    assert int(module.skipped_rows) == 6
    many = features(1, DIM, 300, 300).float()
    _, _, info = module(many)
    assert torch.equal(module.codebook_used.long(), info[2][-65536:])


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_second_derivatives(ratio: float) -> None:
    module = build(entropy_loss_ratio=ratio)
    z = features(1, DIM, 3, 3)

    def ours(z: Tensor) -> Tensor:
        quantized, losses, _ = module(z)
        return quantized.pow(3).sum() + sum(losses[:3])

    def true(z: Tensor) -> Tensor:
        quantized, losses, _ = step(module, z)
        return quantized.pow(3).sum() + sum(losses)

    torch.testing.assert_close(second_derivative(ours, z), second_derivative(true, z))


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    l2_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_nearest(batch: int, height: int, width: int, scale: float, l2_norm, seed: int) -> None:
    module = build(torch.float32, l2_norm=l2_norm).eval()
    z = scale * features(batch, DIM, height, width, seed=seed).float()
    _, _, (_, _, index) = module(z)
    rows, codes = z.permute(0, 2, 3, 1).flatten(0, 2), module.embedding.weight
    if l2_norm:
        rows, codes = F.normalize(rows, dim=1), F.normalize(codes, dim=1)
    nearest_within(index, rows, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    module = build(dtype, entropy_loss_ratio=0.1)
    z = features(2, DIM, 4, 4).to(dtype).requires_grad_()
    exact = build(entropy_loss_ratio=0.1)
    exact.load_state_dict(module.state_dict())
    quantized, losses, (_, _, index) = module(z)
    true, true_losses, true_index = step(exact, z.double())
    assert quantized.dtype == dtype
    assert torch.equal(index, true_index)
    torch.testing.assert_close(quantized.double(), true, rtol=0, atol=torch.finfo(dtype).eps * 4)
    for mine, other in zip(losses, true_losses, strict=False):
        torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-3)
    (quantized.float().sum() + sum(losses[:3])).backward()
    assert z.grad.dtype == module.embedding.weight.grad.dtype == dtype


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_no_matrix_of_distances(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow_ext.soft_entropy.CHUNK", 10_000)
    torch.manual_seed(0)
    module = VectorQuantizer(900, DIM, 0.25, ratio, True, False)
    z = torch.randn(2, DIM, 20, 20, requires_grad=True)
    with largest_tensor() as largest:
        quantized, losses, _ = module(z)
        (quantized.sum() + sum(losses[:3])).backward()
    assert z.numel() <= largest.numel <= 10_000 < 800 * 900


def test_starts_as_the_original() -> None:
    torch.manual_seed(0)
    unit = VectorQuantizer(CODES, DIM, 0.25, 0.0, True, True)
    torch.testing.assert_close(unit.embedding.weight.norm(dim=1), torch.ones(CODES))
    raw = VectorQuantizer(CODES, DIM, 0.25, 0.0, False, True)
    assert 0 < raw.embedding.weight.abs().max() <= 1 / CODES


def test_bad_options_and_inputs() -> None:
    for options, message in (((0, DIM), "n_e must be at least 1, got 0"), ((4, 0), "e_dim must")):
        with pytest.raises(ValueError, match=message):
            VectorQuantizer(*options, 0.25, 0.0, True, True)
    module = build()
    for shape in ((2, 3, 4, 4), (0, DIM, 4, 4), (2, DIM, 4), (DIM,)):
        with pytest.raises(ValueError, match=rf"\[B, {DIM}, H, W\]"):
            module(torch.zeros(shape))
