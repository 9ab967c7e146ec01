"""VQGAN's networks against the same mathematics written out from the weights alone."""

import pytest
import torch

from tokenflow_ext.models.tokenizer.config import PixelConfig, TokenizerConfig
from tokenflow_ext.models.tokenizer.vqgan import Decoder, Encoder, group_norm
from tokenflow_ext.var import resize


class Plain:
    """The network's formulas in float64, reading a state dict; no module of the package."""

    def __init__(self, module, groups):
        self.state = {k: v.double() for k, v in module.state_dict().items()}
        self.groups = groups

    def conv(self, name, x, stride=1, padding=0):
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return torch.nn.functional.conv2d(x, w, b, stride=stride, padding=padding)

    def norm(self, name, x):
        batch, channels = x.shape[:2]
        y = x.reshape(batch, self.groups, -1)
        mean = y.mean(-1, keepdim=True)
        variance = ((y - mean) ** 2).mean(-1, keepdim=True)
        y = ((y - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return y * w.view(1, channels, 1, 1) + b.view(1, channels, 1, 1)

    def res(self, name, x):
        h = self.norm(f"{name}.norm1", x)
        h = self.conv(f"{name}.conv1", h * torch.sigmoid(h), padding=1)
        h = self.norm(f"{name}.norm2", h)
        h = self.conv(f"{name}.conv2", h * torch.sigmoid(h), padding=1)
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attn(self, name, x):
        batch, channels = x.shape[:2]
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).reshape(batch, channels, -1) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) / channels**0.5
        y = torch.einsum("bij,bcj->bci", scores.softmax(-1), v)
        return x + self.conv(f"{name}.proj_out", y.reshape(x.shape))

    def mid(self, x):
        return self.res("mid.2", self.attn("mid.1", self.res("mid.0", x)))

    def out(self, x):
        h = self.norm("norm_out", x)
        return self.conv("conv_out", h * torch.sigmoid(h), padding=1)

    def encoder(self, x, levels, blocks):
        h = self.conv("conv_in", x, padding=1)
        for i in range(levels):
            for j in range(blocks):
                h = self.res(f"conv_blocks.{i}.res.{j}", h)
                if i == levels - 1:
                    h = self.attn(f"conv_blocks.{i}.attn.{j}", h)
            if i < levels - 1:
                padded = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1).double()
                padded[..., :-1, :-1] = h
                h = self.conv(f"conv_blocks.{i}.downsample.conv", padded, stride=2)
        return self.out(self.mid(h))

    def decoder(self, z, levels, blocks):
        h = self.mid(self.conv("conv_in", z, padding=1))
        for i in range(levels):
            for j in range(blocks + 1):
                h = self.res(f"conv_blocks.{i}.res.{j}", h)
                if i == 0:
                    h = self.attn(f"conv_blocks.{i}.attn.{j}", h)
            if i < levels - 1:
                h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self.conv(f"conv_blocks.{i}.upsample.conv", h, padding=1)
        return self.out(h)


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (16, 8)])
def test_against_plain(channels, groups):
    torch.manual_seed(0)
    multipliers = (1, 2, 2)
    shape = {"multipliers": multipliers, "res_blocks": 2, "z_channels": 12, "groups": groups}
    encoder, decoder = Encoder(channels, **shape), Decoder(channels, **shape)
    for module in (encoder, decoder):  # norms' weights start at 1 and 0: make them count
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 16, 24)
    z = encoder(x)
    assert z.shape == (2, 12, 4, 6)
    torch.testing.assert_close(
        z.double(), Plain(encoder, groups).encoder(x.double(), 3, 2), rtol=1e-4, atol=1e-4
    )
    images = decoder(z)
    assert images.shape == x.shape
    torch.testing.assert_close(
        images.double(), Plain(decoder, groups).decoder(z.double(), 3, 2), rtol=1e-4, atol=1e-4
    )


def test_patch_moves_pixels_into_channels():
    torch.manual_seed(0)
    encoder = Encoder(8, (1, 2), 1, 4, 4, patch=4)
    x = torch.randn(1, 3, 32, 32)
    assert encoder(x).shape == (1, 4, 4, 4)
    # One pixel reaches the first convolution in channel colour * 16 + 4 * row + column.
    hot = torch.zeros(1, 3, 32, 32)
    hot[0, 1, 9, 14] = 1.0
    seen = []
    encoder.conv_in.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    encoder(hot)
    assert seen[0].nonzero().tolist() == [[0, 1 * 16 + 4 * 1 + 2, 2, 3]]
    assert Decoder(8, (1, 2), 1, 4, 4, patch=4)(encoder(x)).shape == x.shape


def test_group_norm_of_odd_widths():
    assert group_norm(128).num_groups == 32
    assert group_norm(48).num_groups == 16
    assert group_norm(20, 8).num_groups == 4
    assert group_norm(64).eps == 1e-6


def test_resize_is_plain_bicubic():
    """Weights of a half-pixel bicubic resize with A = -0.75, written out for one row."""
    row = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 3.0])
    size = 8

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    expected = []
    for i in range(size):
        place = (i + 0.5) * len(row) / size - 0.5
        base = int(place // 1)
        expected.append(
            sum(
                kernel(place - j) * float(row[min(max(j, 0), len(row) - 1)])
                for j in range(base - 1, base + 3)
            )
        )
    got = resize(row.view(1, 1, 1, -1).expand(1, 1, 6, 6), (8, size))[0, 0, 4]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    same = torch.rand(1, 3, 8, 8)
    assert resize(same, (8, 8)) is same


def test_original_shapes():
    """Names and shapes of the released pixel branch (224 px) and of the enhanced decoder."""
    pixel = TokenizerConfig.preset("B").pixel
    shape = {"multipliers": pixel.multipliers, "z_channels": pixel.z_channels}
    with torch.device("meta"):
        encoder = Encoder(pixel.channels, res_blocks=pixel.res_blocks, **shape)
        decoder = Decoder(pixel.channels, res_blocks=pixel.res_blocks, **shape)
        enhanced = Decoder(256, res_blocks=4, **shape)
    shapes = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    assert shapes["conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["conv_blocks.2.res.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["conv_blocks.3.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["conv_blocks.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["mid.1.q.weight"] == (512, 512, 1, 1)
    assert shapes["conv_out.weight"] == (256, 512, 3, 3)
    assert "conv_blocks.4.downsample.conv.weight" not in shapes
    assert "conv_blocks.3.attn.0.q.weight" not in shapes
    assert len(shapes) == 144
    shapes = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}
    assert shapes["conv_in.weight"] == (512, 256, 3, 3)
    assert shapes["conv_blocks.0.attn.2.v.bias"] == (512,)
    assert shapes["conv_blocks.1.res.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["conv_blocks.3.upsample.conv.weight"] == (128, 128, 3, 3)
    assert shapes["conv_blocks.4.res.2.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["conv_out.weight"] == (3, 128, 3, 3)
    assert len(shapes) == 194
    shapes = {k: tuple(v.shape) for k, v in enhanced.state_dict().items()}
    assert shapes["conv_blocks.0.res.4.conv1.weight"] == (1024, 1024, 3, 3)
    assert len(shapes) == 294


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match=r"pixel\.channels must be positive, got 0"):
        PixelConfig(channels=0)
