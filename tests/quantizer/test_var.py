"""`VarQuantizer` against its method written out plainly in float64, with all distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext.var import VarQuantizer, resize

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


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_resizing_is_torchs(size, to, dtype) -> None:
    """Values and gradients, whichever way it is computed."""
    maps = torch.randn(2, 3, *size, dtype=torch.float64).to(dtype)
    ours, theirs = (maps.clone().requires_grad_() for _ in range(2))
    found = resize(ours, to)
    expected = theirs
    if size != to:
        expected = F.interpolate(theirs, to, mode="bicubic", align_corners=False)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if dtype != torch.bfloat16:
        weights = torch.randn_like(expected)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_resizing_under_inference_mode_leaves_training_as_it_is() -> None:
    """What is kept from a call without gradients serves one with them."""
    maps = torch.randn(1, 2, 3, 5)
    with torch.inference_mode():
        resize(maps, (6, 7))
    maps.requires_grad_()
    resize(maps, (6, 7)).sum().backward()
    assert maps.grad is not None


def inputs_plainly(module: VarQuantizer, tokens: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """VAR's `get_next_autoregressive_input` in float64, one image at a time: what each
    scale after the first sees, and f^ in the end."""
    codes = module.codebooks[0].detach().double()
    phis = [parameter.detach().double() for parameter in module.phis.parameters()]
    side = SCALES[-1]
    f_hat = torch.zeros(len(tokens[0]), DIM, side, side, dtype=torch.float64)
    seen = []
    for number, (scale, index) in enumerate(zip(SCALES, tokens, strict=True)):
        if number:
            seen.append(torch.stack([pooled_plainly(image, scale) for image in f_hat]))
        for image, own in zip(f_hat, index, strict=True):
            grid = torch.stack([codes[code] for code in own.tolist()], dim=1).view(
                1, DIM, scale, -1
            )
            up = F.interpolate(grid, (side, side), mode="bicubic")
            weight, bias = phis[2 * PHI_OF_SCALE[number]], phis[2 * PHI_OF_SCALE[number] + 1]
            image += (0.5 * up + 0.5 * F.conv2d(up, weight, bias, padding=1))[0]
    return seen, f_hat


def pooled_plainly(image: Tensor, side: int) -> Tensor:
    """Means of [D, H, H] over side x side bins, whose borders are rounded outwards."""
    full = image.shape[1]
    bins = [(i * full // side, -(-(i + 1) * full // side)) for i in range(side)]
    rows = [
        torch.stack([image[:, y0:y1, x0:x1].mean(dim=(1, 2)) for x0, x1 in bins], dim=1)
        for y0, y1 in bins
    ]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_accumulate_is_the_next_scale_input_of_var(dtype: torch.dtype, error: float) -> None:
    module = build(dtype)
    tokens = [torch.randint(CODES, (3, side * side)) for side in SCALES]
    seen, total = inputs_plainly(module, tokens)
    f_hat = None
    for scale, index in enumerate(tokens):
        if scale:
            found = module.scale_input(f_hat, scale)
            assert found.shape == (3, DIM, SCALES[scale], SCALES[scale])
            torch.testing.assert_close(found.double(), seen[scale - 1], rtol=0, atol=error)
        f_hat = module.accumulate(f_hat, index, scale)
        assert f_hat.dtype == dtype
        assert f_hat.shape == (3, DIM, 5, 5)
    torch.testing.assert_close(f_hat.double(), total, rtol=0, atol=error)
    inputs = module.next_scale_inputs(torch.cat(tokens, dim=1))
    expected = torch.cat([part.flatten(2).mT for part in seen], dim=1)
    torch.testing.assert_close(inputs.double(), expected, rtol=0, atol=error)
    assert not inputs.requires_grad


def test_rows_in_the_place_of_codes() -> None:
    """They pass the scale's convolution, as codes do."""
    torch.manual_seed(0)
    quantizer = VarQuantizer(20, 6, (1, 2, 4), phi_shared=2).eval()
    indices = torch.randint(0, 20, (2, 21))
    rows = torch.nn.functional.embedding(indices, quantizer.codebooks[0]).detach()
    torch.testing.assert_close(quantizer.decode_rows(rows), quantizer.decode(indices))
    torch.testing.assert_close(
        quantizer.decode_rows(rows, (6, 6)), quantizer.decode(indices, size=(6, 6))
    )
    f_hat = quantizer.accumulate(None, indices[:, :1], 0)
    torch.testing.assert_close(quantizer.accumulate(None, rows[:, :1], 0), f_hat)
    torch.testing.assert_close(
        quantizer.accumulate(f_hat, rows[:, 1:5], 1),
        quantizer.accumulate(f_hat, indices[:, 1:5], 1),
    )


def test_a_scale_that_refines_its_tokens_sees_them() -> None:
    module = build()
    tokens = [torch.randint(CODES, (2, side * side)) for side in SCALES]
    f_hat = module.accumulate(module.accumulate(None, tokens[0], 0), tokens[1], 1)
    before = f_hat.clone()
    found = module.scale_input(f_hat, 2, tokens[2])
    assert torch.equal(f_hat, before)
    own = module.accumulate(f_hat, tokens[2], 2)
    expected = torch.stack([pooled_plainly(image, 3) for image in own])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_accumulate_computes_half_weights_and_autocast_in_float32() -> None:
    module = build(torch.float32)
    tokens = torch.randint(CODES, (2, 4))
    f_hat = torch.randn(2, DIM, 5, 5)
    expected = module.accumulate(f_hat, tokens, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.accumulate(f_hat, tokens, 1), expected)
    found = module.bfloat16().accumulate(f_hat, tokens, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, module.float().accumulate(f_hat, tokens, 1))


def test_bad_steps() -> None:
    module = build()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    f_hat = torch.zeros(2, DIM, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="scale must be 0 to 3, got 4"):
        module.accumulate(None, tokens, 4)
    with pytest.raises(ValueError, match="scale must be 1 to 3, got 0"):
        module.scale_input(f_hat, 0)
    with pytest.raises(ValueError, match=r"indices must have shape \[B, 9\] at scale 2"):
        module.accumulate(f_hat, tokens, 2)
    # At the scale's own size, as TokenFlow's quantizer carries it.
    with pytest.raises(
        ValueError, match=r"f_hat must have shape \(2, 5, 5, 5\), got \(2, 5, 2, 2\)"
    ):
        module.accumulate(f_hat[:, :, :2, :2], tokens, 1)
    with pytest.raises(
        ValueError, match=r"f_hat must have shape \(B, 5, 5, 5\), got \(2, 5, 2, 2\)"
    ):
        module.scale_input(f_hat[:, :, :2, :2], 1)
    with pytest.raises(
        ValueError, match=r"f_hat must have shape \(2, 5, 5, 5\), got \(1, 5, 5, 5\)"
    ):
        module.scale_input(f_hat[:1], 1, tokens)
