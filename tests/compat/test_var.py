"""`VectorQuantizer2` against its method (arXiv 2404.02905) in float64, with all distances.

Searches here see well-separated distances; the search itself is held to float64 in
tests/quantizer/test_search.py.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compat.helpers import largest_tensor, second_derivative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenflow_ext.compat import VectorQuantizer2
from tokenflow_ext.var import _nearest_tick

CODES, DIM, SCALES = 50, 6, (1, 2, 3, 5)


def build(dtype=torch.float64, **options) -> VectorQuantizer2:
    options = {"using_znorm": False, "v_patch_nums": SCALES, **options}
    torch.manual_seed(0)
    module = VectorQuantizer2(CODES, DIM, **options)
    module.eini(1.0)
    return module.to(dtype)


def features(batch: int = 2, side: int = SCALES[-1], seed: int = 1, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, DIM, side, side, generator=generator, dtype=dtype)


def mixed(module: VectorQuantizer2, maps: Tensor, scale: int, scales: int) -> Tensor:
    """The scale's convolution, found as VAR finds it, mixed in by its ratio."""
    tensors = list(module.quant_resi.parameters())
    if not tensors:
        return maps
    count = len(tensors) // 2
    ends = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(ends, 1 - ends, count)
    chosen = np.argmin(np.abs(ticks - scale / max(scales - 1, 1))).item()
    ratio = abs(module.quant_resi_ratio)
    convolved = F.conv2d(maps, *tensors[2 * chosen : 2 * chosen + 2], padding=1)
    return (1 - ratio) * maps + ratio * convolved


def loop(module: VectorQuantizer2, f: Tensor, scales=SCALES) -> tuple[list, list, Tensor]:
    """Indices by scale, f^ after each scale, and the loss: plainly, with every distance."""
    codes = module.embedding.weight
    size = f.shape[2:]
    target = f.detach()
    f_hat, loss = torch.zeros_like(f), torch.zeros((), dtype=f.dtype)
    indices, f_hats = [], []
    for number, scale in enumerate(scales):
        scale = (scale, scale) if isinstance(scale, int) else scale
        rest = F.interpolate((target - f_hat).detach(), scale, mode="area")
        rows = rest.permute(0, 2, 3, 1).reshape(-1, DIM)
        if module.using_znorm:
            distances = -F.normalize(rows, dim=1) @ F.normalize(codes, dim=1).detach().T
        else:
            distances = (rows.unsqueeze(1) - codes.detach()).square().sum(dim=2)
        index = distances.argmin(dim=1).view(len(f), *scale)
        maps = codes[index].permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size, mode="bicubic", align_corners=False)
        f_hat = f_hat + mixed(module, maps, number, len(scales))
        loss = loss + module.beta * (f_hat.detach() - f).square().mean()
        loss = loss + (f_hat - target).square().mean()
        indices.append(index.flatten(1))
        f_hats.append(f_hat)
    return indices, f_hats, loss / len(scales)


@pytest.mark.parametrize("options", [{}, {"quant_resi": 0.0}, {"using_znorm": True}])
def test_second_derivatives(options: dict) -> None:
    module = build(**options)

    def ours(f: Tensor) -> Tensor:
        f_hat, _, loss = module(f)
        return f_hat.pow(3).sum() + loss

    def true(f: Tensor) -> Tensor:
        _, f_hats, loss = loop(module, f)
        return (f + (f_hats[-1] - f).detach()).pow(3).sum() + loss

    f = features()
    torch.testing.assert_close(second_derivative(ours, f), second_derivative(true, f))


@pytest.mark.parametrize("options", [{}, {"quant_resi": 0.0}])
def test_images_that_are_not_finite_are_no_hits(options: dict) -> None:
    module, twin = build(**options), build(**options)
    f = features(3)
    bad = f.clone()
    bad[1, 2, 3, 4] = float("inf")
    for _ in range(2):
        module(bad)
        twin(f[[0, 2]])
    assert torch.equal(module.ema_vocab_hit_SV, twin.ema_vocab_hit_SV)
    assert int(module.skipped_rows) == 2 * sum(side**2 for side in SCALES)
    assert module.state_dict().keys() == twin.state_dict().keys()
    assert "skipped_rows" not in module.state_dict()


PHIS = [
    {},
    {"share_quant_resi": 0},
    {"share_quant_resi": 0, "default_qresi_counts": 2},
    {"share_quant_resi": 1},
    {"share_quant_resi": 3, "quant_resi": -0.3},
    {"quant_resi": 0.0},
    {"quant_resi": 0.0, "share_quant_resi": 1},
    {"quant_resi": 0.0, "share_quant_resi": 0},
]


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("options", PHIS)
def test_forward_and_gradients(options: dict, znorm: bool) -> None:
    module = build(using_znorm=znorm, beta=0.4, **options)
    f = features().requires_grad_()
    f_hat, usages, loss = module(f)
    assert usages is None
    weight = torch.randn_like(f)
    mine = torch.autograd.grad((f_hat * weight).sum() + loss, [f, *module.parameters()])

    _, f_hats, true_loss = loop(module, f)
    straight_through = f + (f_hats[-1] - f).detach()
    torch.testing.assert_close(f_hat, straight_through)
    torch.testing.assert_close(loss, true_loss)
    true = torch.autograd.grad(
        (straight_through * weight).sum() + true_loss,
        [f, *module.parameters()],
        allow_unused=True,
    )
    for ours, other, (name, _) in zip(
        mine, true, [("f", None), *module.named_parameters()], strict=True
    ):
        torch.testing.assert_close(ours, other, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", PHIS[:6])
def test_float32_and_below(options: dict, dtype: torch.dtype) -> None:
    """Half-precision features are computed in float32, as VAR does."""
    exact, single = build(**options), build(torch.float32, **options)
    single.load_state_dict(exact.state_dict())
    f = features(seed=4).to(dtype)
    f_hat, _, loss = single(f)
    true_f_hat, _, true_loss = exact(f.double())
    assert f_hat.dtype == torch.float32
    torch.testing.assert_close(f_hat.double(), true_f_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("options", PHIS)
@pytest.mark.parametrize("scales", [None, (1, (2, 3), 5), ((5, 5),)])
def test_tokens_and_f_hat(options: dict, znorm: bool, scales) -> None:
    module = build(using_znorm=znorm, **options)
    f = features()
    indices, f_hats, _ = loop(module, f, scales or SCALES)
    found = module.f_to_idxBl_or_fhat(f, to_fhat=False, v_patch_nums=scales)
    maps = module.f_to_idxBl_or_fhat(f, to_fhat=True, v_patch_nums=scales)
    for mine, true in zip(found, indices, strict=True):
        assert torch.equal(mine, true)
    for mine, true in zip(maps, f_hats, strict=True):
        torch.testing.assert_close(mine, true)
        assert not mine.requires_grad


@pytest.mark.parametrize("options", PHIS)
def test_transformer_inputs(options: dict) -> None:
    """Teacher forcing, generation step by step and embed_to_fhat tell the same story."""
    module = build(**options)
    f = features()
    indices, f_hats, _ = loop(module, f)
    codes = [
        module.embedding(index).mT.unflatten(2, (side, side)).detach()
        for index, side in zip(indices, SCALES, strict=True)
    ]
    inputs = [
        F.interpolate(f_hat, (side, side), mode="area").flatten(2).mT
        for f_hat, side in zip(f_hats, SCALES[1:], strict=False)
    ]
    torch.testing.assert_close(module.idxBl_to_var_input(indices), torch.cat(inputs, dim=1))

    for mine, true in zip(module.embed_to_fhat(codes), f_hats, strict=True):
        torch.testing.assert_close(mine, true.detach())
    torch.testing.assert_close(module.embed_to_fhat(codes, last_one=True), f_hats[-1].detach())

    f_hat = torch.zeros_like(f)
    for scale, maps in enumerate(codes):
        same, following = module.get_next_autoregressive_input(scale, len(SCALES), f_hat, maps)
        assert same is f_hat
        torch.testing.assert_close(f_hat, f_hats[scale].detach())
        if scale + 1 < len(SCALES):
            torch.testing.assert_close(following.flatten(2).mT, inputs[scale].detach())
        else:
            assert following is f_hat


@pytest.mark.parametrize("options", PHIS[:5])
def test_embeddings_that_grow_with_the_scales(options: dict) -> None:
    module = build(**options)
    maps = [torch.randn(2, DIM, side, side, dtype=torch.float64) for side in SCALES]
    f_hat = torch.zeros(2, DIM, 1, 1, dtype=torch.float64)
    expected = []
    for number, part in enumerate(maps):
        f_hat = F.interpolate(f_hat, part.shape[2:], mode="bicubic")
        f_hat = f_hat + mixed(module, part, number, len(SCALES)).detach()
        expected.append(f_hat)
    for mine, true in zip(module.embed_to_fhat(maps, False), expected, strict=True):
        torch.testing.assert_close(mine, true)
    torch.testing.assert_close(module.embed_to_fhat(maps, False, last_one=True), expected[-1])


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 12), scales=st.integers(1, 16))
def test_which_convolution(count: int, scales: int) -> None:
    """Ties between two places included: VAR's default, 4 for 10 scales, has some."""
    ends = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(ends, 1 - ends, count)
    for scale in range(scales):
        place = scale / max(1, scales - 1)
        assert _nearest_tick(count, place) == np.argmin(np.abs(ticks - place)).item()


def test_which_convolution_at_ties() -> None:
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    gaps = np.abs(np.abs(ticks[:, None] - np.arange(10) / 9)[:2, 2])
    assert abs(gaps[0] - gaps[1]) < 1e-12  # scale 2 of 10 lies half way
    chosen = [_nearest_tick(4, scale / 9) for scale in range(10)]
    assert chosen == [np.argmin(np.abs(ticks - scale / 9)).item() for scale in range(10)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, [f"quant_resi.qresi_ls.{i}" for i in range(4)]),
        ({"share_quant_resi": 1}, ["quant_resi.qresi"]),
        ({"share_quant_resi": 0}, [f"quant_resi.{i}" for i in range(len(SCALES))]),
        ({"quant_resi": 0.0}, []),
    ],
)
def test_names_of_the_released_checkpoints(options: dict, names: list[str]) -> None:
    state = build(**options).state_dict()
    convolutions = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert set(state) == {"ema_vocab_hit_SV", "embedding.weight", *convolutions}
    assert state["ema_vocab_hit_SV"].shape == (len(SCALES), CODES)
    assert all(state[f"{name}.weight"].shape == (DIM, DIM, 3, 3) for name in names)


def test_the_margin_of_usages_grows_with_the_processes(monkeypatch) -> None:
    module = build(torch.float32).eval()
    f = features(dtype=torch.float32)
    margin = 2 * SCALES[-1] ** 2 / CODES * 0.08
    module.ema_vocab_hit_SV.fill_(1.5 * margin)
    assert module(f, ret_usages=True)[1] == [100.0] * len(SCALES)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert module(f, ret_usages=True)[1] == [0.0] * len(SCALES)


def test_running_hits_and_usages() -> None:
    module = build(torch.float32)
    f = features(dtype=torch.float32)
    hits = torch.stack(
        [index.flatten().bincount(minlength=CODES) for index in module.f_to_idxBl_or_fhat(f, False)]
    ).float()
    module(f)
    torch.testing.assert_close(module.ema_vocab_hit_SV, hits)
    other = features(seed=7, dtype=torch.float32)
    more = torch.stack(
        [i.flatten().bincount(minlength=CODES) for i in module.f_to_idxBl_or_fhat(other, False)]
    ).float()
    _, usages, _ = module(other, ret_usages=True)
    expected = 0.9 * hits + 0.1 * more
    torch.testing.assert_close(module.ema_vocab_hit_SV, expected)
    margin = 2 * SCALES[-1] ** 2 / CODES * 0.08
    assert usages == pytest.approx(((expected >= margin).float().mean(1) * 100).tolist())
    before = module.ema_vocab_hit_SV.clone()
    module.eval()(other)
    assert torch.equal(module.ema_vocab_hit_SV, before)


def test_progressive_scales() -> None:
    module = build()
    f = features()
    every = module.f_to_idxBl_or_fhat(f, False)
    inputs = module.idxBl_to_var_input(every)
    for last in range(len(SCALES)):
        module.prog_si = last
        kept = module.f_to_idxBl_or_fhat(f, False)
        assert len(kept) == last + 1
        assert all(torch.equal(a, b) for a, b in zip(kept, every, strict=False))
        part = module.idxBl_to_var_input(kept)
        tokens = sum(side**2 for side in SCALES[1 : last + 1])
        if last == 0:
            assert part is None
        else:
            torch.testing.assert_close(part, inputs[:, :tokens])


def test_one_scale_and_starts() -> None:
    module = build(v_patch_nums=(3,))
    f = features(side=3)
    torch.testing.assert_close(module(f)[2], loop(module, f, (3,))[2])
    assert module.idxBl_to_var_input(module.f_to_idxBl_or_fhat(f, False)) is None
    module.eini(-0.5)
    assert 0 < module.embedding.weight.abs().max() <= 0.5 / CODES
    before = copy.deepcopy(module.embedding.weight)
    module.eini(0)
    assert torch.equal(before, module.embedding.weight)


def test_autocast_and_no_matrix_of_distances() -> None:
    for options in ({}, {"quant_resi": 0.0}, {"using_znorm": True}):
        torch.manual_seed(0)
        module = VectorQuantizer2(
            900, DIM, **{"using_znorm": False, "v_patch_nums": (1, 10, 20), **options}
        )
        f = torch.randn(2, DIM, 20, 20, requires_grad=True)
        with largest_tensor() as largest, torch.autocast("cpu", torch.bfloat16):
            f_hat, _, loss = module(f)
            (f_hat.sum() + loss).backward()
        assert f_hat.dtype == loss.dtype == torch.float32
        assert f.numel() <= largest.numel < 2 * 400 * 900 / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"v_patch_nums": None}, "v_patch_nums must hold one or more sides, got None"),
        ({"v_patch_nums": ()}, "v_patch_nums"),
        ({"v_patch_nums": (0, 1)}, "v_patch_nums"),
        ({"share_quant_resi": -1}, "share_quant_resi must be at least 0, got -1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        VectorQuantizer2(0, DIM, False, v_patch_nums=SCALES)


def test_bad_shapes() -> None:
    module = build()
    with pytest.raises(ValueError, match=rf"\[B, {DIM}, H, W\], B > 0, got \(2, 3, 5, 5\)"):
        module(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"last scale's size \(5, 5\), got \(4, 5\)"):
        module(torch.zeros(2, DIM, 4, 5))
    with pytest.raises(ValueError, match=r"\(4, 4\), got \(5, 5\)"):
        module.f_to_idxBl_or_fhat(features(), False, (1, 4))
