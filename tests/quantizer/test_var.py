"""`VarQuantizer` against its method written out plainly in float64, with all distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext.var import VarQuantizer

CODES, DIM, SCALES = 40, 5, (1, 2, 3, 5)
PHI_OF_SCALE = (0, 1, 2, 3)  # four convolutions, four scales: one each


def build(dtype: torch.dtype = torch.float64, **options) -> VarQuantizer:
    torch.manual_seed(0)
    module = VarQuantizer(CODES, DIM, SCALES, **options)
    with torch.no_grad():
        module.codebooks[0].normal_()
    return module.to(dtype)


def features(side: int = 5, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, DIM, side, side, generator=generator, dtype=torch.float64)


def plainly(module: VarQuantizer, h: Tensor, dropped: int = -1, cosine: bool = False):
    """(indices, f^ after each scale, vq loss, commitment loss), VAR's algorithm word by word."""
    codes, phis = module.codebooks[0], list(module.phis.parameters())
    f_hat, target = torch.zeros_like(h), h.detach()
    indices, f_hats, vq, commitment = [], [], [], []
    for number, side in enumerate(SCALES):
        if number == dropped:
            indices.append(torch.full((len(h), side * side), -1))
            continue
        rows = F.interpolate((target - f_hat).detach(), (side, side), mode="area")
        rows = rows.permute(0, 2, 3, 1).reshape(-1, DIM)
        if cosine:
            distances = -F.normalize(rows, dim=1) @ F.normalize(codes.detach(), dim=1).T
        else:
            distances = torch.cdist(rows, codes.detach())
        index = distances.argmin(dim=1).view(len(h), side, side)
        up = F.interpolate(codes[index].permute(0, 3, 1, 2), h.shape[2:], mode="bicubic")
        weight, bias = phis[2 * PHI_OF_SCALE[number]], phis[2 * PHI_OF_SCALE[number] + 1]
        f_hat = f_hat + 0.5 * up + 0.5 * F.conv2d(up, weight, bias, padding=1)
        vq.append((f_hat - target).square().mean())
        commitment.append(0.25 * (f_hat.detach() - h).square().mean())
        indices.append(index.flatten(1))
        f_hats.append(f_hat)
    return torch.cat(indices, dim=1), f_hats, torch.stack(vq).mean(), torch.stack(commitment).mean()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dropped", [-1, 2])
def test_forward_and_gradients(monkeypatch, dropped: int, cosine: bool) -> None:
    module = build(l2_norm=cosine, scale_drop=0.5).train()
    monkeypatch.setattr(module, "_draw_dropped_scale", lambda device: torch.tensor(dropped))
    h = features().requires_grad_()
    output = module(h)
    indices, f_hats, vq, commitment = plainly(module, h, dropped, cosine)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, f_hats[-1])
    torch.testing.assert_close(output.vq_loss, vq)
    torch.testing.assert_close(output.commitment_loss, commitment)
    hits = torch.bincount(indices[indices >= 0], minlength=CODES)
    assert torch.equal(output.usage.hits, hits)
    torch.testing.assert_close(module.usage_ema, 0.01 * hits.float(), check_dtype=False)

    weight = torch.randn_like(h)
    parameters = [h, *module.parameters()]
    mine = torch.autograd.grad(
        (output.quantized * weight).sum() + output.vq_loss + output.commitment_loss, parameters
    )
    straight_through = h + (f_hats[-1] - h).detach()
    true = torch.autograd.grad(
        (straight_through * weight).sum() + vq + commitment, parameters, allow_unused=True
    )
    for number, (ours, other) in enumerate(zip(mine, true, strict=True)):
        other = torch.zeros_like(ours) if other is None else other  # the dropped scale's own
        torch.testing.assert_close(ours, other, msg=lambda m, n=number: f"{n}: {m}")


def test_tokens_and_back() -> None:
    module = build().eval()
    h = features()
    indices, f_hats, _, _ = plainly(module, h)
    assert torch.equal(module.encode(h), indices)
    single = build(torch.float32).eval()
    for upto, f_hat in enumerate(f_hats, start=1):
        got = single.decode(indices, upto)
        torch.testing.assert_close(got, f_hat.float(), rtol=1e-4, atol=1e-4)
    assert single.decode(indices[:, :5]).shape == (2, DIM, 5, 5)  # the first two scales' tokens
    assert [part.shape[1] for part in module.split(indices)] == [1, 4, 9, 25]
    # Features of another size than the last scale's.
    large = features(side=8)
    output = module(large)
    f_hat = single.decode(output.indices, size=(8, 8))
    torch.testing.assert_close(f_hat, output.quantized.float(), rtol=1e-4, atol=1e-4)


def test_rows_are_what_the_scales_searched_with() -> None:
    module = build()
    h = features()
    _, f_hats, _, _ = plainly(module, h)
    rows = module.rows(h.float()).view(2, -1, DIM)
    rest = torch.cat([h, *(h - f for f in f_hats[:-1])])
    for part, left, side in zip(module.split(rows.mT[:, 0]), rest.split(2), SCALES, strict=True):
        pooled = F.adaptive_avg_pool2d(left, side)[:, 0].flatten(1)
        torch.testing.assert_close(part, pooled.float(), rtol=1e-4, atol=1e-4)


def test_codebook_care() -> None:
    """k-means puts codes, not normalised, on the features; dead codes move to them."""
    module = build(torch.float32)
    h = features().float()
    rows = module.rows(h)

    def error() -> Tensor:
        return torch.cdist(rows, module.codebooks[0]).amin(dim=1).square().mean()

    before = error()
    module.init_kmeans(rows)
    assert error() < 0.4 * before
    module.usage_ema.fill_(1.0)
    module.usage_ema[7] = 0
    assert module.restart_dead_codes(rows) == 1
    assert (rows == module.codebooks[0][7]).all(dim=1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    module = build(dtype).eval()
    h = features().to(dtype)
    output = module(h)
    wide = module.float()(h.float())
    assert output.quantized.dtype == dtype
    assert torch.equal(output.indices, wide.indices)
    torch.testing.assert_close(output.quantized, wide.quantized.to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phi_ratio": 1.5}, r"phi_ratio must be in \[0, 1\], got 1.5"),
        ({"phi_shared": 5}, "phi_shared must be 0 to 4, the number of scales, got 5"),
        ({"scale_drop": 2.0}, "scale_drop must be in"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VarQuantizer(CODES, DIM, SCALES, **options)


def test_accumulate_is_not_served() -> None:
    with pytest.raises(NotImplementedError, match=r"decode\(indices, upto\)"):
        build().accumulate(None, torch.zeros(1, 1, dtype=torch.int64), 0)
