"""The tokenizer as a whole: shapes, what reaches what, saving and loading, refusals."""

import dataclasses
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenflow_ext.errors import ConfigError
from tokenflow_ext.models import (
    CheckpointError,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
)
from tokenflow_ext.models.losses.tokenizer import tokenizer_loss
from tokenflow_ext.models.serialization.files import OutputError

PIXEL = PixelConfig(channels=8, multipliers=(1, 2, 2), res_blocks=1, z_channels=16, groups=4)
CLIP = TowerConfig("clip", 32, 4, width=16, depth=1, heads=2, mlp_width=32)
SIGLIP = TowerConfig("siglip", 28, 4, width=16, depth=2, heads=2, mlp_width=32)
QUANTIZER = QuantizerConfig(codebook_size=64, scales=(1, 2, 4, 8), scale_drop=0.0)


def config(kind):
    semantic = SemanticConfig(
        CLIP, code_dim=6, decoder_width=24, decoder_depth=1, decoder_heads=4, decoder_grid=8
    )
    if kind == "clip":
        teacher = dataclasses.replace(CLIP, projection=12)
        return TokenizerConfig(32, PIXEL, semantic, QUANTIZER, teacher)
    if kind == "siglip":  # 28 px: the tower's grid is 7, and 32 px inside would be 8
        semantic = dataclasses.replace(semantic, tower=SIGLIP, decoder_grid=7)
        pixel = dataclasses.replace(PIXEL, multipliers=(1, 2), input_size=14)
        quantizer = dataclasses.replace(QUANTIZER, scales=(1, 3, 7))
        return TokenizerConfig(28, pixel, semantic, quantizer, SIGLIP)
    if kind == "pixels":
        return TokenizerConfig(32, PIXEL, quantizer=QUANTIZER)
    if kind == "semantic":
        return TokenizerConfig(32, PixelConfig(enabled=False), semantic, QUANTIZER, CLIP)
    if kind == "rounds":  # RQ-VAE's
        return TokenizerConfig(
            32, PIXEL, quantizer=dataclasses.replace(QUANTIZER, scales=(8, 8, 8))
        )
    if kind == "var":
        return TokenizerConfig(
            32, PIXEL, quantizer=dataclasses.replace(QUANTIZER, kind="var", l2_norm=False)
        )
    assert kind == "tiny"
    return TokenizerConfig.preset("tiny")


KINDS = ("clip", "siglip", "pixels", "semantic", "rounds", "var", "tiny")


def build(kind):
    torch.manual_seed(0)
    return TokenFlowTokenizer(config(kind))


def pictures(model, count=2):
    side = model.config.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    model = build(kind).eval()
    x = pictures(model)
    settings, grid = model.config, model.config.grid
    with torch.no_grad():
        h = model.features(x)
        output = model(x)
        indices = model.encode(x)
        images, semantic = model.decode(indices)
    assert h.shape == (2, sum(settings.dims), grid, grid)
    assert indices.shape == (2, sum(s * s for s in settings.quantizer.scales))
    assert indices.dtype == torch.int64
    assert torch.equal(indices, output.quantizer.indices)
    if settings.pixel.enabled:
        assert images.shape == output.images.shape == x.shape
        torch.testing.assert_close(images, output.images, rtol=1e-4, atol=1e-4)
    else:
        assert images is None
        assert output.images is None
        with pytest.raises(ConfigError, match=r"decodes no images: its pixel\.enabled is false"):
            model.decode_pixels(output.quantizer.quantized)
    if settings.semantic.enabled:
        assert semantic.shape == (2, grid * grid, settings.semantic_dim)
        torch.testing.assert_close(semantic, output.semantic, rtol=1e-4, atol=1e-4)
    else:
        assert semantic is None
        assert output.semantic is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_weight_is_trained(kind):
    """None is left without a gradient: DistributedDataParallel would stop at it."""
    model = build(kind).train()
    x = pictures(model)
    output = model(x)
    teacher = None if output.semantic is None else torch.randn_like(output.semantic)
    tokenizer_loss(output, x, teacher).total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        else:
            assert name.startswith("semantic_encoder.")
            assert model.config.semantic.frozen


def test_branches_do_not_cross():
    """Semantic channels make the semantic tokens alone, pixel channels the image alone."""
    model = build("clip").eval()
    f_hat = torch.randn(1, 14, 8, 8)
    images, semantic = model.decode_features(f_hat)
    other = f_hat.clone()
    other[:, :6] += 1.0
    changed, tokens = model.decode_features(other)
    assert torch.equal(changed, images)
    assert not torch.allclose(tokens, semantic)
    other = f_hat.clone()
    other[:, 6:] += 1.0
    changed, tokens = model.decode_features(other)
    assert torch.equal(tokens, semantic)
    assert not torch.allclose(changed, images)


def test_features_are_the_parts_by_hand():
    model = build("clip").eval()
    x = pictures(model)
    tokens = model.semantic_encoder(x)
    codes = model.encode_task_layer(tokens)
    pixel = model.quant_conv(model.encoder(x))
    h = model.features(x)
    for row, column in ((0, 0), (2, 5), (7, 1)):
        torch.testing.assert_close(h[:, :6, row, column], codes[:, 8 * row + column])
    torch.testing.assert_close(h[:, 6:], pixel)
    torch.testing.assert_close(model.features(x, tokens), h)


def test_pixel_branch_at_its_own_size():
    """Bicubic without antialiasing into the pixel encoder, and back after the decoder."""
    model = build("siglip").eval()
    x = pictures(model)
    inner = torch.nn.functional.interpolate(x, size=(14, 14), mode="bicubic")
    torch.testing.assert_close(
        model.features(x)[:, 6:], model.quant_conv(model.encoder(inner)), rtol=1e-4, atol=1e-5
    )
    f_hat = torch.randn(1, 14, 7, 7)
    inner = model.decoder(model.post_quant_conv(f_hat[:, 6:]))
    assert inner.shape[-2:] == (14, 14)
    expected = torch.nn.functional.interpolate(inner, size=(28, 28), mode="bicubic")
    torch.testing.assert_close(model.decode_features(f_hat)[0], expected)


def test_other_sizes():
    model = build("pixels").eval()
    x = torch.rand(1, 3, 48, 40) * 2 - 1
    output = model(x)
    assert output.images.shape == x.shape
    indices = model.encode(x)
    images, _ = model.decode(indices, grid=(12, 10))
    torch.testing.assert_close(images, output.images, rtol=1e-4, atol=1e-4)
    assert model.decode(indices)[0].shape == (1, 3, 32, 32)


def test_the_semantic_branch_alone():
    """What is there is what the joint tokenizer has of it; other sizes go by the tower's patch."""
    model = build("semantic").eval()
    joint = build("clip").eval()
    assert model.last_layer is None
    names = {name for name in model.state_dict() if not name.startswith("quantizer")}
    assert names < set(joint.state_dict())
    assert [tuple(c.shape) for c in model.quantizer.codebooks] == [(64, 6)]
    joint.load_state_dict(
        model.state_dict()
        | {
            name: value
            for name, value in joint.state_dict().items()
            if name not in names
            or name == "decode_task_layer.2.weight"
            or name == "decode_task_layer.2.bias"
        }
    )
    x = pictures(model)
    torch.testing.assert_close(model.features(x), joint.features(x)[:, :6])
    assert model.features(torch.zeros(1, 3, 48, 40)).shape == (1, 6, 12, 10)
    with pytest.raises(ValueError, match=r"got \(1, 3, 32\)|must be \[B, 3, H, W\]"):
        model.features(x[0])


def test_repeated_scales_are_rounds_on_one_grid():
    """RQ-VAE: each round quantizes what the rounds before left over."""
    model = build("rounds").eval()
    h = model.features(pictures(model))
    rest, codes = h, model.quantizer.codebooks[0]
    for tokens in model.quantizer.split(model.encode(pictures(model))):
        unit = torch.nn.functional.normalize(rest, dim=1).flatten(2).mT
        rows = torch.nn.functional.normalize(codes, dim=1)
        assert torch.equal(tokens, (unit @ rows.T).argmax(dim=-1))
        rest = rest - rows[tokens].mT.unflatten(2, (8, 8))


def test_decode_of_the_first_scales():
    model = build("clip").eval()
    indices = model.encode(pictures(model))
    images, semantic = model.decode(indices, upto=2)
    f_hat = model.quantizer.decode(indices[:, :5], size=(8, 8))
    expected = model.decode_features(f_hat)
    torch.testing.assert_close(images, expected[0])
    torch.testing.assert_close(semantic, expected[1])


def test_frozen_tower_stays_as_it_is():
    model = build("tiny").train()
    assert not any(m.training for m in model.semantic_encoder.modules())
    assert model.encode_task_layer.training
    x = pictures(model)
    assert not model.tower_features(x).requires_grad
    assert model.features(x).requires_grad
    assert build("clip").train().tower_features(pictures(build("clip"))).requires_grad


def test_last_layer_is_the_decoders_last_weight():
    model = build("pixels")
    assert model.last_layer is model.decoder.conv_out.weight


def test_bfloat16_autocast():
    model = build("clip").train()
    x = pictures(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        parts = tokenizer_loss(output, x, torch.randn(2, 64, 12))
    assert parts.total.dtype == torch.float32
    parts.total.backward()
    assert torch.isfinite(model.last_layer.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model = build(kind).eval()
    assert model.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    other = TokenFlowTokenizer.from_pretrained(tmp_path / "saved")
    assert other.config == model.config
    assert not other.training
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    x = pictures(model)
    assert torch.equal(other.encode(x), model.encode(x))


@pytest.fixture
def saved(tmp_path):
    build("pixels").save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    header = json.loads((path / "config.json").read_text())
    header.update(changes)
    (path / "config.json").write_text(json.dumps(header))


def test_missing_files_are_named(saved):
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        TokenFlowTokenizer.from_pretrained(saved / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        TokenFlowTokenizer.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        TokenFlowTokenizer.from_pretrained(saved)


def test_truncated_and_foreign_files_are_refused(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
            TokenFlowTokenizer.from_pretrained(saved)
    file.write_bytes(whole)
    edit(saved, version=99)
    with pytest.raises(CheckpointError, match="format version 99, this release reads 1"):
        TokenFlowTokenizer.from_pretrained(saved)
    edit(saved, format="other")
    with pytest.raises(CheckpointError, match="is not a saved tokenizer's"):
        TokenFlowTokenizer.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        TokenFlowTokenizer.from_pretrained(saved)


def test_weights_must_fit_the_configuration(saved):
    values = build("pixels").config.to_dict()
    wider = {**values, "pixel": {**values["pixel"], "z_channels": 32}}
    edit(saved, config=wider)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_out\.weight is \(16, .*\(32, "):
        TokenFlowTokenizer.from_pretrained(saved)
    deeper = {**values, "pixel": {**values["pixel"], "res_blocks": 2}}
    edit(saved, config=deeper)
    with pytest.raises(CheckpointError, match=r"\d+ missing \(encoder\.conv_blocks"):
        TokenFlowTokenizer.from_pretrained(saved)
    edit(saved, config={**values, "colour": 1})
    with pytest.raises(CheckpointError, match="unknown field colour"):
        TokenFlowTokenizer.from_pretrained(saved)
    edit(saved, config=values)
    file = saved / "model.safetensors"
    state = load_file(file)
    state["stranger"] = torch.zeros(1)
    save_file(state, file, metadata={"format": "tokenflow-tokenizer"})
    with pytest.raises(CheckpointError, match=r"1 unknown \(stranger\)"):
        TokenFlowTokenizer.from_pretrained(saved)


@pytest.mark.parametrize("variant", ["hf-hub:somebody/model", "local-dir:/tmp/model", "resnet50"])
@pytest.mark.parametrize("part", ["semantic", "teacher"])
def test_a_configuration_leads_to_no_network(saved, part, variant, monkeypatch):
    def connect(*arguments):
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    values = build("clip").config.to_dict()
    tower = values["teacher"] if part == "teacher" else values["semantic"]["tower"]
    tower.update(kind="vitamin", projection=0, variant=variant)
    edit(saved, config=values)
    with pytest.raises(CheckpointError, match=f"tower.variant must be .*got '{variant}'"):
        TokenFlowTokenizer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("quantizer", "codebook_size", 1 << 24),
        ("pixel", "channels", 1 << 15),
        ("pixel", "res_blocks", 300),
        ("pixel", "code_dim", 1 << 16),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(saved, part, key, value):
    """Gigabytes that the file does not have: refused within a limit on this process' memory."""
    values = build("pixels").config.to_dict()
    edit(saved, config={**values, part: {**values[part], key: value}})
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29), before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
            TokenFlowTokenizer.from_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert len(str(error.value)) < 500


def test_numbers_that_are_not_finite_are_refused(saved):
    file = saved / "model.safetensors"
    state = load_file(file)
    state["quant_conv.bias"][0] = float("nan")
    save_file(state, file, metadata={"format": "tokenflow-tokenizer"})
    with pytest.raises(CheckpointError, match=r"not finite, first in quant_conv\.bias"):
        TokenFlowTokenizer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"images must be \[B, 3, H, W\], got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"got \(1, 1, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), ValueError, "one image or more"),
        (torch.zeros(1, 3, 30, 32), ValueError, r"multiple of 4, got \(30, 32\)"),
        (torch.zeros(1, 3, 32, 0), ValueError, r"multiple of 4, got \(32, 0\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"got torch\.uint8"),
        ([1.0], TypeError, "images must be a tensor, got list"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        build("clip").features(images)


def test_bad_features_and_configuration():
    model = build("clip")
    with pytest.raises(ValueError, match=r"f_hat must be \[B, 14, h, w\], got \(1, 8, 8, 8\)"):
        model.decode_features(torch.zeros(1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"tokens must be \(1, 64, 16\).*got \(1, 63, 16\)"):
        model.features(torch.zeros(1, 3, 32, 32), torch.zeros(1, 63, 16))
    with pytest.raises(TypeError, match="config must be a TokenizerConfig, got dict"):
        TokenFlowTokenizer({})


@pytest.mark.parametrize(("preset", "width"), [("B", 768), ("L", 1152), ("XL", 1152)])
def test_presets_build(preset, width):
    with torch.device("meta"):
        model = TokenFlowTokenizer(TokenizerConfig.preset(preset))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["encode_task_layer.2.weight"] == (32, width)
    assert shapes["decode_task_layer.2.weight"] == ((512 if preset == "B" else 1152), width)
    assert shapes["quant_conv.weight"] == (8, 256, 1, 1)
    assert shapes["post_quant_conv.weight"] == (256, 8, 1, 1)
    assert [tuple(c.shape) for c in model.quantizer.codebooks] == [(32768, 32), (32768, 8)]
    tower = {
        "B": ("transformer.resblocks.11.attn.in_proj_weight", (2304, 768)),
        "L": ("trunk.blocks.31.mlp.w0.weight", (2304, 1152)),
        "XL": ("encoder.layers.25.mlp.fc1.weight", (4304, 1152)),
    }[preset]
    assert shapes[f"semantic_encoder.{tower[0]}"] == tower[1]
    assert "semantic_encoder.encoder.layers.26.mlp.fc1.weight" not in shapes


def run(code):
    # -P: the package as it is installed, not what lies in the working folder.
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_stays_light():
    result = run(
        "import sys, tokenflow_ext.models\n"
        "heavy = {'transformers', 'timm', 'open_clip', 'lpips', 'torchvision', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_saving_replaces_an_earlier_save_and_nothing_else(tmp_path):
    model = build("pixels")
    weights, header = "model.safetensors", "config.json"
    own, broken, theirs = tmp_path / "own", tmp_path / "broken off", tmp_path / "theirs"
    model.save_pretrained(own)
    model.save_pretrained(own)
    model.save_pretrained(broken)
    (broken / header).unlink()
    model.save_pretrained(broken)
    assert (broken / header).is_file()

    theirs.mkdir()
    for files in (
        {header: b'{"model_type": "llama"}'},
        {header: b"not JSON"},
        {weights: b"something"},
        {header: b'{"model_type": "llama"}', weights: b"something"},
    ):
        for old in theirs.iterdir():
            old.unlink()
        for name, content in files.items():
            (theirs / name).write_bytes(content)
        with pytest.raises(OutputError, match="holds another model"):
            model.save_pretrained(theirs)
        assert {file.name: file.read_bytes() for file in theirs.iterdir()} == files
    (theirs / header).unlink()
    save_file({"a": torch.zeros(1)}, theirs / weights, {"format": "pt"})
    with pytest.raises(OutputError, match="holds another model"):
        model.save_pretrained(theirs)
