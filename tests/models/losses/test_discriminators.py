"""Discriminators against their formulas written out from the weights alone, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tokenflow_ext.models.losses.discriminators import (
    BlurHalve,
    PatchDiscriminator,
    StyleGanDiscriminator,
    build_discriminator,
    group_deviation,
)


def perturbed(model):
    """Weights that norms and biases start with hide what they do."""
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def plain_patchgan(state, x, layers, groups):
    state = {k: v.double() for k, v in state.items()}

    def conv(i, y, stride):
        return F.conv2d(y, state[f"main.{i}.weight"], state.get(f"main.{i}.bias"), stride, 1)

    def norm(i, y):
        batch, channels = y.shape[:2]
        parts = y.reshape(batch, groups(channels), -1)
        mean = parts.mean(-1, keepdim=True)
        variance = ((parts - mean) ** 2).mean(-1, keepdim=True)
        y = ((parts - mean) / (variance + 1e-5).sqrt()).reshape(y.shape)
        w, b = state[f"main.{i}.weight"], state[f"main.{i}.bias"]
        return y * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)

    y = leaky(conv(0, x.double(), 2))
    for layer in range(layers):
        place = 2 + 3 * layer
        y = leaky(norm(place + 1, conv(place, y, 2 if layer < layers - 1 else 1)))
    return conv(2 + 3 * layers, y, 1)


def test_patchgan_against_plain():
    torch.manual_seed(0)
    model = perturbed(PatchDiscriminator(6, 2))
    x = torch.rand(2, 3, 32, 40) * 2 - 1
    expected = plain_patchgan(model.state_dict(), x, 2, lambda width: {12: 12, 24: 24}[width])
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_patch_discriminator(norm):
    torch.manual_seed(0)
    net = PatchDiscriminator(8, 3, norm=norm).eval()
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    logits = net(images)
    assert logits.shape == (2, 1, 30, 30)
    if norm == "none":
        # A patch is 70 pixels wide: logit (10, 12) starts at pixel 8 * 10 - 23 = 57, 8 * 12 - 23.
        images.requires_grad_()
        (grad,) = torch.autograd.grad(net(images)[0, 0, 10, 12], images)
        rows, columns = grad[0].abs().sum(0).nonzero().unbind(1)
        assert (rows.min(), rows.max()) == (57, 57 + 69)
        assert (columns.min(), columns.max()) == (73, 73 + 69)


def test_patch_discriminator_at_64_pixels():
    assert PatchDiscriminator(32, 2)(torch.rand(2, 3, 64, 64)).shape == (2, 1, 14, 14)
    with pytest.raises(ValueError, match="norm must be 'group', 'batch' or 'none', got 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="channels and layers must be positive, got 64 and 0"):
        PatchDiscriminator(layers=0)


def test_patchgans_published_shapes():
    """Three layers of 64: the discriminator of pix2pix, VQGAN and LlamaGen."""
    shapes = [tuple(p.shape) for p in PatchDiscriminator(norm="batch").parameters() if p.dim() > 1]
    assert shapes == [
        (64, 3, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
        (1, 512, 4, 4),
    ]


def blurred(x):
    """Filter written out: zeros outside, taps 1 3 3 1 over 8, from one pixel before."""
    batch, channels, height, width = x.shape
    wide = torch.zeros(batch, channels, height + 3, width + 3, dtype=x.dtype)
    wide[..., 1 : height + 1, 1 : width + 1] = x
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    out = torch.zeros(batch, channels, height // 2, width // 2, dtype=x.dtype)
    for i, a in enumerate(taps):
        for j, b in enumerate(taps):
            rows = slice(i, i + 2 * (height // 2), 2)
            columns = slice(j, j + 2 * (width // 2), 2)
            out += a * b * wide[..., rows, columns]
    return out


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_blur(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(BlurHalve().double()(x), blurred(x))
    # Inside, what is constant stays.
    inner = BlurHalve()(torch.ones(1, 1, 12, 12))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones(1, 1, 4, 4))


def test_group_deviation():
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = group_deviation(x, 3)
    assert got.shape == (6, 1, 3, 4)
    for first in (0, 3):
        values = []
        for place in x[first : first + 3].flatten(1).T.tolist():
            mean = sum(place) / 3
            values.append(math.sqrt(sum((v - mean) ** 2 for v in place) / 3 + 1e-8))
        expected = torch.full((3, 1, 3, 4), sum(values) / len(values), dtype=torch.float64)
        torch.testing.assert_close(got[first : first + 3], expected)
    assert group_deviation(x.bfloat16(), 2).dtype == torch.float32
    with pytest.raises(ValueError, match="a multiple of the group's 4 images, got 6"):
        group_deviation(x, 4)
    alike = torch.ones(2, 1, 2, 2, requires_grad=True)
    group_deviation(alike, 2).sum().backward()
    assert torch.isfinite(alike.grad).all()


def plain_stylegan(state, x, blocks, group):
    state = {k: v.double() for k, v in state.items()}

    def conv(name, y, padding):
        w = state[f"{name}.weight"]
        return F.conv2d(y, w, state.get(f"{name}.bias"), padding=padding)

    y = leaky(conv("conv_in", x.double(), 1))
    for i in range(blocks):
        name = f"blocks.{i}"
        main = leaky(conv(f"{name}.conv2", leaky(conv(f"{name}.conv1", y, 1)), 1))
        y = (blurred(main) + conv(f"{name}.skip", blurred(y), 0)) / 2**0.5
    parts = y.reshape(-1, group, *y.shape[1:])
    variance = ((parts - parts.mean(1, keepdim=True)) ** 2).mean(1)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
    maps = [torch.full_like(y[:1, :1], float(deviation[i // group])) for i in range(len(y))]
    y = leaky(conv("conv_out", torch.cat([y, torch.cat(maps)], dim=1), 1)).reshape(len(y), -1)
    y = leaky(y @ state["linear.weight"].T + state["linear.bias"])
    return y @ state["logit.weight"].T + state["logit.bias"]


@pytest.mark.parametrize(("size", "blocks", "side"), [(16, 2, 4), (28, 2, 7), (31, 2, 7)])
def test_stylegan_against_plain(size, blocks, side):
    torch.manual_seed(0)
    model = perturbed(StyleGanDiscriminator(size, 6, group=2))
    assert len(model.blocks) == blocks
    assert model.linear.in_features == 24 * side * side
    x = torch.rand(4, 3, size, size) * 2 - 1
    expected = plain_stylegan(model.state_dict(), x, blocks, 2)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "widths", "side"),
    [
        (256, [64, 128, 256, 512, 512, 512, 512], 4),  # LlamaGen's table
        (224, [64, 128, 256, 512, 512, 512], 7),
        (384, [64, 128, 256, 512, 512, 512, 512], 6),
    ],
)
def test_stylegans_shapes(size, widths, side):
    with torch.device("meta"):
        model = StyleGanDiscriminator(size)
        logits = model(torch.empty(4, 3, size, size))
    assert logits.shape == (4, 1)
    assert model.conv_in.weight.shape == (64, 3, 3, 3)
    found = [block.skip.weight.shape for block in model.blocks]
    assert found == [(b, a, 1, 1) for a, b in itertools.pairwise(widths)]
    assert model.conv_out.weight.shape == (512, 513, 3, 3)
    assert model.linear.weight.shape == (512, 512 * side * side)
    assert model.logit.weight.shape == (1, 512)


def test_stylegan_keeps_the_scale_of_its_input():
    """Weights start so that seven blocks neither drown nor blow up a signal."""
    torch.manual_seed(0)
    model = StyleGanDiscriminator(64, 16)
    features = []
    for part in (*model.blocks, model.linear):
        part.register_forward_hook(lambda _m, _i, output: features.append(output.std().item()))
    model(torch.randn(4, 3, 64, 64))
    assert all(0.3 < deviation < 3 for deviation in features), features


def test_a_group_is_all_that_a_logit_sees():
    """A batch may be cut at the end of any group: as two processes do, or real beside decoded."""
    torch.manual_seed(0)
    model = StyleGanDiscriminator(16, 8)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    whole, halves = model(x), torch.cat([model(x[:4]), model(x[4:])])
    torch.testing.assert_close(whole, halves)
    other = x.clone()
    other[5] = -other[5]
    assert torch.equal(model(other)[:4], whole[:4])
    assert not torch.equal(model(other)[4], whole[4])
    alone = StyleGanDiscriminator(16, 8, group=1)
    torch.testing.assert_close(alone(x)[:3], alone(x[:3]))


def test_stylegans_refusals():
    model = StyleGanDiscriminator(16, 4)
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\], got \(4, 3, 16, 8\)"):
        model(torch.zeros(4, 3, 16, 8))
    with pytest.raises(ValueError, match="group's 4 images, got 3"):
        model(torch.zeros(3, 3, 16, 16))
    with pytest.raises(ValueError, match="image_size must be 8 or more, got 7"):
        StyleGanDiscriminator(7)
    with pytest.raises(ValueError, match="channels and group must be positive, got 0 and 4"):
        StyleGanDiscriminator(16, 0)


def test_discriminators_by_name():
    assert isinstance(build_discriminator("patchgan", 64, 8), PatchDiscriminator)
    made = build_discriminator("stylegan", 64, 8)
    assert isinstance(made, StyleGanDiscriminator)
    assert made.conv_in.out_channels == 8
    with pytest.raises(ValueError, match="kind must be one of patchgan, stylegan, got 'biggan'"):
        build_discriminator("biggan", 64)


def test_stylegan_learns_to_tell_apart():
    """Noise from smooth pictures, in a few steps."""
    torch.manual_seed(0)
    model = StyleGanDiscriminator(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        real = F.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=16, mode="bilinear")
        fake = torch.rand(8, 3, 16, 16) * 2 - 1
        loss = F.softplus(-model(real)).mean() + F.softplus(model(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
