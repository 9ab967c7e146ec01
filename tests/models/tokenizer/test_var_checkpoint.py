"""VAR's tokenizer: names, shapes, there and back, and the file's own weights run by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenflow_ext.errors import OutputError
from tokenflow_ext.models import CheckpointError, ConfigError, TokenFlowTokenizer, TokenizerConfig
from tokenflow_ext.models.tokenizer import var_checkpoint

SCALES = var_checkpoint.SCALES[256]
# Of the four convolutions. Two scales are half way between two of them: rounding decides.
POSITIONS = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)


def convolution(name, out, into, side):
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def residual(name, into, out):
    shapes = {
        **norm(f"{name}.norm1", into),
        **convolution(f"{name}.conv1", out, into, 3),
        **norm(f"{name}.norm2", out),
        **convolution(f"{name}.conv2", out, out, 3),
    }
    return shapes | (convolution(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def attention(name, width):
    return {
        **norm(f"{name}.norm", width),
        **convolution(f"{name}.qkv", 3 * width, width, 1),
        **convolution(f"{name}.proj_out", width, width, 1),
    }


def middle(name, width):
    return {
        **residual(f"{name}.block_1", width, width),
        **attention(f"{name}.attn_1", width),
        **residual(f"{name}.block_2", width, width),
    }


def released_shapes(channels=160, multipliers=(1, 1, 2, 2, 4), blocks=2, codes=4096, width=32):
    """Names and shapes of the file, as their description lists them."""
    widths = [channels * m for m in multipliers]
    last = len(widths) - 1
    shapes = convolution("encoder.conv_in", channels, 3, 3)
    before = channels
    for i, own in enumerate(widths):
        for j in range(blocks):
            shapes |= residual(f"encoder.down.{i}.block.{j}", before, own)
            before = own
            if i == last:
                shapes |= attention(f"encoder.down.{i}.attn.{j}", own)
        if i != last:
            shapes |= convolution(f"encoder.down.{i}.downsample.conv", own, own, 3)
    shapes |= middle("encoder.mid", before) | norm("encoder.norm_out", before)
    shapes |= convolution("encoder.conv_out", width, before, 3)
    shapes |= convolution("decoder.conv_in", before, width, 3) | middle("decoder.mid", before)
    for i in reversed(range(len(widths))):
        for j in range(blocks + 1):
            shapes |= residual(f"decoder.up.{i}.block.{j}", before, widths[i])
            before = widths[i]
            if i == last:
                shapes |= attention(f"decoder.up.{i}.attn.{j}", before)
        if i:
            shapes |= convolution(f"decoder.up.{i}.upsample.conv", before, before, 3)
    shapes |= norm("decoder.norm_out", before) | convolution("decoder.conv_out", 3, before, 3)
    shapes |= convolution("quant_conv", width, width, 3)
    shapes |= convolution("post_quant_conv", width, width, 3)
    shapes["quantize.embedding.weight"] = (codes, width)
    shapes["quantize.ema_vocab_hit_SV"] = (len(SCALES), codes)
    for i in range(4):
        shapes |= convolution(f"quantize.quant_resi.qresi_ls.{i}", width, width, 3)
    return shapes


def released(seed=0):
    """Random weights of a tiny tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in released_shapes(8, (1, 1, 2, 2, 4), 1, 64, 8).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            value = value / math.sqrt(math.prod(shape[1:]))
        if "norm" in key and key.endswith("weight"):
            value = 1 + 0.1 * value
        state[key] = value
    state["quantize.ema_vocab_hit_SV"].abs_()
    return state


# -- the file's weights run by hand ---------------------------------------------------------------


class Original:
    """The networks by the names in the file."""

    def __init__(self, state):
        self.state = {key: value.double() for key, value in state.items()}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def normed(self, name, x):
        groups = math.gcd(32, x.shape[1])
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.group_norm(x, groups, weight, bias, 1e-6)

    def residual(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.normed(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.normed(f"{name}.norm2", h)), padding=1)
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attention(self, name, x):
        batch, width, height, side = x.shape
        joint = self.conv(f"{name}.qkv", self.normed(f"{name}.norm", x))
        q, k, v = joint.reshape(batch, 3, width, height * side).unbind(1)
        weights = (q.mT @ k / math.sqrt(width)).softmax(-1)
        out = (v @ weights.mT).view(batch, width, height, side)
        return x + self.conv(f"{name}.proj_out", out)

    def middle(self, name, x):
        x = self.attention(f"{name}.attn_1", self.residual(f"{name}.block_1", x))
        return self.residual(f"{name}.block_2", x)

    def level(self, name, x):
        j = 0
        while f"{name}.block.{j}.conv1.weight" in self.state:
            x = self.residual(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.qkv.weight" in self.state:
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for i in range(5):
            x = self.level(f"encoder.down.{i}", x)
            if i < 4:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.normed("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1), padding=1)

    def quantize(self, f):
        """Tokens by scale, and f^."""
        table = self.state["quantize.embedding.weight"]
        rest, total, tokens = f, torch.zeros_like(f), []
        for k, side in enumerate(SCALES):
            rows = F.adaptive_avg_pool2d(rest, side).permute(0, 2, 3, 1)
            index = torch.cdist(rows.flatten(0, 2), table).argmin(1).view(len(f), side * side)
            tokens.append(index)
            h = table[index].mT.unflatten(2, (side, side))
            if side != SCALES[-1]:
                h = F.interpolate(h, (SCALES[-1],) * 2, mode="bicubic")
            place = k / (len(SCALES) - 1)
            nearest = int(np.argmin(np.abs(POSITIONS - place)))
            name = f"quantize.quant_resi.qresi_ls.{nearest}"
            h = 0.5 * h + 0.5 * self.conv(name, h, padding=1)
            rest, total = rest - h, total + h
        return torch.cat(tokens, dim=1), total

    def decode(self, f_hat):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", f_hat, padding=1), padding=1)
        x = self.middle("decoder.mid", x)
        for i in reversed(range(5)):
            x = self.level(f"decoder.up.{i}", x)
            if i:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{i}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.normed("decoder.norm_out", x)), padding=1)


@torch.no_grad()
def test_tokens_and_images_are_those_of_the_weights_run_by_hand():
    state = released()
    tokenizer, original = TokenFlowTokenizer.from_original(state), Original(state)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = original.encode(images.double())
    torch.testing.assert_close(tokenizer.features(images).double(), features, rtol=1e-3, atol=1e-4)
    tokens, f_hat = original.quantize(features)
    found = tokenizer.encode(images)
    assert found.shape == (2, 680)
    # A token near the middle of two codes may turn, and all of its image after it.
    assert (found == tokens).float().mean() > 0.98
    decoded, semantic = tokenizer.decode(tokens)
    assert semantic is None
    torch.testing.assert_close(decoded.double(), original.decode(f_hat), rtol=1e-3, atol=1e-3)


# -- names and shapes -----------------------------------------------------------------------------


def test_names_and_shapes_at_full_size():
    shapes = released_shapes()
    assert len(shapes) == 324
    weights = [math.prod(s) for key, s in shapes.items() if "ema_vocab" not in key]
    assert sum(weights) == pytest.approx(109e6, rel=0.01)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tokenizer = TokenFlowTokenizer.from_original(state)
    config = tokenizer.config
    assert config.quantizer.scales == SCALES
    assert (config.pixel.channels, config.pixel.multipliers) == (160, (1, 1, 2, 2, 4))
    assert (config.grid, config.dims, config.quantizer.codebook_size) == (16, (32,), 4096)
    back = var_checkpoint.to_original(tokenizer.state_dict(), config, tokenizer.unused_tensors)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


def test_the_same_file_for_512_pixels():
    state = {key: torch.empty(shape, device="meta") for key, shape in released_shapes().items()}
    config = var_checkpoint.infer_config(state, 512)
    assert (config.image_size, config.grid) == (512, 32)
    assert config.quantizer.scales == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    with pytest.raises(ValueError, match="resolution must be 256 or 512"):
        var_checkpoint.infer_config(state, 384)


@pytest.mark.parametrize("container", [None, "model"])
def test_a_file_there_and_back(tmp_path, container):
    state = released()
    torch.save({container: state} if container else state, tmp_path / "vae.pth")
    tokenizer = TokenFlowTokenizer.from_pretrained(tmp_path / "vae.pth")
    assert not tokenizer.training
    written = tokenizer.save_original(tmp_path / "out.pth")
    again = torch.load(written, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with pytest.raises(OutputError):
        tokenizer.save_original(written)
    # In our own form, too; what it has no use for stays behind, and is written as zeros then.
    tokenizer.save_pretrained(tmp_path / "own")
    own = TokenFlowTokenizer.from_pretrained(tmp_path / "own")
    assert own.config == tokenizer.config
    fresh = torch.load(own.save_original(tmp_path / "fresh.pth"), weights_only=True)
    assert not fresh["quantize.ema_vocab_hit_SV"].any()
    full = own.save_original(tmp_path / "full.pth", unused_from=tmp_path / "vae.pth")
    kept = torch.load(full, weights_only=True)
    assert all(torch.equal(kept[key], value) for key, value in state.items())


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_other_numbers_of_convolutions(shared):
    state = {k: v for k, v in released().items() if "quant_resi" not in k}
    names = {
        0: [f"quantize.quant_resi.{i}" for i in range(10)],
        1: ["quantize.quant_resi.qresi"],
        2: [f"quantize.quant_resi.qresi_ls.{i}" for i in range(2)],
    }[shared]
    for name in names:
        for key, shape in convolution(name, 8, 8, 3).items():
            state[key] = torch.randn(shape)
    tokenizer = TokenFlowTokenizer.from_original(state)
    assert tokenizer.config.quantizer.phi_shared == shared
    back = var_checkpoint.to_original(
        tokenizer.state_dict(), tokenizer.config, tokenizer.unused_tensors
    )
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert back.keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quant_conv.weight"), "quant_conv.weight is missing"),
        (lambda s: s.pop("encoder.mid.attn_1.qkv.weight"), "missing .*encoder.mid.attn_1.qkv"),
        (lambda s: s.update(strange=torch.zeros(1)), "unknown .*strange"),
        (lambda s: s.update({"post_quant_conv.bias": torch.zeros(9)}), "post_quant_conv.bias is"),
        (lambda s: s.pop("encoder.down.2.block.0.conv2.bias"), r"has levels \[0, 1, 3, 4\]"),
        (
            lambda s: s.update({"quantize.ema_vocab_hit_SV": torch.zeros(7, 64)}),
            "has 7 scales, VAR's for 256 px has 10",
        ),
        (
            lambda s: s.update({"encoder.mid.attn_1.qkv.weight": torch.zeros(95, 32, 1, 1)}),
            r"another shape .*qkv.weight is \(95, 32, 1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = released()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        TokenFlowTokenizer.from_original(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel": {"patch": 2}}, r"pixel\.patch 1, this one has 2"),
        ({"pixel": {"decoder_channels": 16}}, r"pixel\.decoder_channels 8, this one has 16"),
    ],
)
def test_tokenizers_without_the_form(tmp_path, changes, message):
    plain = TokenFlowTokenizer.from_original(released()).config.to_dict()
    plain["pixel"] |= changes["pixel"]
    plain["image_size"] = 512 if "patch" in changes["pixel"] else 256
    tokenizer = TokenFlowTokenizer(TokenizerConfig.from_dict(plain))
    with pytest.raises(ConfigError, match=message):
        tokenizer.save_original(tmp_path / "out.pth")


def test_convolutions_around_the_codes_have_an_odd_side():
    plain = TokenFlowTokenizer.from_original(released()).config.to_dict()
    plain["pixel"]["quant_kernel"] = 2
    with pytest.raises(ConfigError, match=r"pixel\.quant_kernel must be 1, 3, 5 or 7, got 2"):
        TokenizerConfig.from_dict(plain)
