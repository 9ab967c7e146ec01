"""TokenFlow's original checkpoints: names, round trips, refusals, and details that change tokens.

``original_keys/`` holds names and shapes of the published files, a line a weight; ``0-11`` in a
name stands for every number from 0 to 11. Formulas of the networks themselves are tested beside
them: VQGAN's in test_vqgan.py, the semantic decoder's (biases on queries and values alone, exact
GELU, norms) in test_semantic_decoder.py, the towers' in test_towers.py.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenflow_ext.models import (
    CheckpointError,
    ConfigError,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
)
from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.serialization.state_dict import read_state_dict
from tokenflow_ext.models.tokenizer import original_checkpoint
from tokenflow_ext.models.tokenizer.semantic_decoder import SemanticDecoder
from tokenflow_ext.models.tokenizer.vqgan import Downsample
from tokenflow_ext.models.towers.towers import CLIP_MEAN, CLIP_STD, PixelNorm, resample_positions

LISTS = {
    "clipb_224": ("B", False),
    "clipb_224_enhanced": ("B", True),
    "vitamin_xlarge_256": ("L", False),
    "siglip_384": ("XL", False),
}
USED = "quantize.codebook_used"


def published_shapes(name):
    """{key: shape} of a published file."""
    shapes = {}
    text = (Path(__file__).parent / "original_keys" / f"{name}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        key, *sides = line.split()
        parts = []
        for part in key.split("."):
            ends = re.fullmatch(r"(\d+)-(\d+)", part)
            parts.append([*range(int(ends[1]), int(ends[2]) + 1)] if ends else [part])
        for chosen in itertools.product(*parts):
            shapes[".".join(map(str, chosen))] = tuple(map(int, sides))
    return shapes


def published_meta(name):
    """A published state dict on the meta device, but for the normalisation, which has values."""
    state = {k: torch.empty(s, device="meta") for k, s in published_shapes(name).items()}
    values = (CLIP_MEAN, CLIP_STD) if "vitamin" in name else ((0.5,) * 3, (0.5,) * 3)
    for key, value in zip(("scaling_layer.shift", "scaling_layer.scale"), values, strict=True):
        if key in state:
            state[key] = torch.tensor(value).view(1, 3, 1, 1)
    return state


@pytest.mark.parametrize("name", LISTS)
def test_key_lists(name):
    """Every published key has its place, and comes back as the very tensor it was."""
    state = published_meta(name)
    assert len(state) == {"B": 549, "L": 972, "XL": 848}[LISTS[name][0]] + 100 * LISTS[name][1]
    preset, enhanced = LISTS[name]
    config = original_checkpoint.infer_config(state)
    expected = TokenizerConfig.preset(preset)
    assert config == (expected.with_enhanced_decoder() if enhanced else expected)
    assert (config.pixel.decoder_channels, config.pixel.decoder_res_blocks) == (
        (256, 4) if enhanced else (0, 0)
    )
    with torch.device("meta"):
        own = TokenFlowTokenizer(config).state_dict()
    weights, aside = original_checkpoint.from_original(state, config, own)
    assert set(weights) == set(own)
    assert set(aside) == set(original_checkpoint.unused_shapes(config))
    read = {id(v) for v in (*weights.values(), *aside.values())}
    assert {k for k, v in state.items() if id(v) not in read} == {
        k for k in state if k.startswith("scaling_layer.")
    }
    # Inside a module the names are the same on both sides, so none has taken another's place.
    names = {id(v): k for k, v in state.items()}
    theirs = re.compile(r"(encoder_vqkd|decoder_vqkd)\.(vision_model\.)?")
    ours = re.compile(r"(semantic_encoder|semantic_decoder)\.(trunk\.)?")
    for key in own:
        if not key.startswith("quantizer."):
            source = names[id(weights[key])]
            assert theirs.sub("", source, count=1) == ours.sub("", key, count=1)
            assert source.startswith("decoder_vqkd.") == key.startswith("semantic_decoder.")
    for group, part in enumerate(("vqkd", "vqgan")):
        source = names[id(weights[f"quantizer.codebooks.{group}"])]
        assert source == f"quantize.embedding_{part}.weight"
    back = original_checkpoint.to_original(weights, config, aside)
    assert {k: tuple(v.shape) for k, v in back.items()} == published_shapes(name)
    assert all(v.dtype == torch.float32 for v in back.values())
    for key, value in state.items():
        if key.startswith("scaling_layer."):
            assert torch.equal(back[key], value)
        else:
            assert back[key] is value, key


def test_unused_tensors():
    for preset in ("B", "L"):
        assert original_checkpoint.unused_shapes(TokenizerConfig.preset(preset)) == {
            USED: (131072,)
        }
    xl = original_checkpoint.unused_shapes(TokenizerConfig.preset("XL"))
    stem = "encoder_vqkd.vision_model."
    parts = ("encoder.layers.26.", "post_layernorm.", "head.")
    assert {k for k in xl if not k.startswith(tuple(stem + part for part in parts))} == {USED}
    assert len(xl) == 1 + 16 + 2 + 11


# Tiny tokenizers at the released geometry: images, grids and scales are the real ones.

PIXEL = PixelConfig(channels=8, res_blocks=1, z_channels=16)


def tiny(variant, image_size=None, enhanced=False):
    preset = TokenizerConfig.preset(
        {256: "B-256"}.get(image_size, "B") if variant == "B" else variant
    )
    sizes = {"width": 24, "depth": 2, "heads": 2, "mlp_width": 40}
    tower = dataclasses.replace(preset.semantic.tower, **sizes)
    if variant == "L":
        tower = TowerConfig("vitamin", 256, 16, width=384, variant="vitamin_small_224")
    semantic = SemanticConfig(
        tower, decoder_width=24, decoder_depth=1, decoder_grid=preset.semantic.decoder_grid
    )
    pixel = dataclasses.replace(PIXEL, input_size=preset.pixel.input_size)
    if enhanced:
        pixel = dataclasses.replace(pixel, decoder_channels=16, decoder_res_blocks=2)
    quantizer = QuantizerConfig(64, preset.quantizer.scales, scale_drop=0.0)
    teacher = dataclasses.replace(tower, projection=20) if variant == "B" else tower
    return TokenizerConfig(preset.image_size, pixel, semantic, quantizer, teacher)


def packages_tower(config):
    """The tower as the package that defines it has it, and its features of prepared pixels."""
    tower = config.semantic.tower
    if tower.kind == "vitamin":
        import timm

        model = timm.create_model(tower.variant, img_size=tower.image_size, num_classes=0).eval()
        del model.fc_norm
        model.fc_norm = torch.nn.Identity()
        return model, model.forward_features
    from transformers import SiglipVisionConfig, SiglipVisionModel

    settings = SiglipVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_act="gelu_pytorch_tanh",
    )
    model = SiglipVisionModel(settings).eval()
    return model, lambda x: model(x, output_hidden_states=True).hidden_states[-2]


@functools.cache
def fabricate(variant, enhanced=False):
    """(config, original state dict by hand, the tower's features function or None)."""
    torch.manual_seed(0)
    config = tiny(variant, enhanced=enhanced)
    state, features = {}, None
    for key, value in TokenFlowTokenizer(config).state_dict().items():
        value = value + 0.1 * torch.randn_like(value)
        if key.startswith("semantic_encoder."):
            if variant == "B":  # OpenAI's names, which the tower has
                state[key.replace("semantic_encoder.", "encoder_vqkd.")] = value
        elif not key.startswith("quantizer."):
            state[key.replace("semantic_decoder.", "decoder_vqkd.")] = value
    state["quantize.embedding_vqkd.weight"] = torch.randn(64, 32)
    state["quantize.embedding_vqgan.weight"] = torch.randn(64, 8)
    state[USED] = torch.randint(0, 64, (131072,)).float()
    if variant != "B":
        model, features = packages_tower(config)
        stem = "encoder_vqkd."
        if variant == "XL":
            stem += "vision_model."
            state["scaling_layer.shift"] = torch.full((1, 3, 1, 1), 0.5)
            state["scaling_layer.scale"] = torch.full((1, 3, 1, 1), 0.5)
        else:
            state["scaling_layer.shift"] = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
            state["scaling_layer.scale"] = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        for key, value in model.state_dict().items():
            state[stem + key.removeprefix("vision_model.")] = value.clone()
    return config, state, features


def picture(size, seed=1):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(state, other):
    assert set(state) == set(other)
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("variant", ["B", "L", "XL"])
def test_by_value(variant, tmp_path):
    """Read, use, and write again: tower from its own package, the rest by name."""
    config, state, features = fabricate(variant)
    torch.save({"model": state}, tmp_path / "released.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", config=config)
    assert not model.training
    assert model.config == config
    codebooks = model.quantizer.codebooks
    assert torch.equal(codebooks[0], state["quantize.embedding_vqkd.weight"])
    assert torch.equal(codebooks[1], state["quantize.embedding_vqgan.weight"])
    assert not model.quantizer.usage_ema.any()
    same(model.unused_tensors, {k: state[k] for k in original_checkpoint.unused_shapes(config)})

    x = picture(config.image_size)
    with torch.no_grad():
        if features is not None:
            shift, scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
            pixels = (((x + 1) * 127.5).clamp(0, 255) / 255 - shift) / scale
            tokens = features(pixels)
            w = [state[f"encode_task_layer.{i}.{k}"] for i in (0, 2) for k in ("weight", "bias")]
            semantic = torch.tanh(tokens @ w[0].T + w[1]) @ w[2].T + w[3]
            got = model.features(x)[:, :32].flatten(2).transpose(1, 2)
            torch.testing.assert_close(got, semantic, rtol=1e-3, atol=1e-4)
        indices = model.encode(x)
        images, decoded = model.decode(indices)
    count, width = {"B": (561, 20), "L": (817, 384), "XL": (2227, 24)}[variant]
    assert indices.shape == (1, count)
    assert images.shape == x.shape
    assert decoded.shape == (1, config.grid**2, width)

    assert model.save_original(tmp_path / "again.pt") == tmp_path / "again.pt"
    same(torch.load(tmp_path / "again.pt", weights_only=True)["model"], state)
    other = TokenFlowTokenizer.from_pretrained(tmp_path / "again.pt", config=config)
    same(other.state_dict(), model.state_dict())
    same(other.unused_tensors, model.unused_tensors)
    assert not list(tmp_path.glob("*.partial"))


def test_enhanced_by_value(tmp_path):
    config, state, _ = fabricate("B", enhanced=True)
    assert state["decoder.conv_blocks.0.res.2.conv1.weight"].shape == (64, 64, 3, 3)
    torch.save({"model": state}, tmp_path / "released.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", config=config)
    same(original_checkpoint.to_original(model.state_dict(), config, model.unused_tensors), state)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("container", ["ema", "model", "state_dict", None])
def test_containers(container, prefix, tmp_path):
    config, state, _ = fabricate("B")
    named = {prefix + k: v for k, v in state.items()}
    content = named
    if container is not None:
        # Training scripts store more beside the weights, and args is no tensor.
        content = {"steps": 7, "args": argparse.Namespace(lr=1e-4), "optimizer": {}}
        content[container] = named
    torch.save(content, tmp_path / "released.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", config=config)
    same(original_checkpoint.to_original(model.state_dict(), config, model.unused_tensors), state)


def test_average_comes_before_the_last_weights(tmp_path):
    _, state, _ = fabricate("B")
    old = {k: v + 1 for k, v in state.items()}
    torch.save({"model": old, "ema": state, "state_dict": old}, tmp_path / "released.pt")
    same(read_state_dict(tmp_path / "released.pt"), state)


def test_old_file_format(tmp_path):
    _, state, _ = fabricate("B")
    file = tmp_path / "old.pt"
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    same(read_state_dict(file), state)


def available_memory():
    """Bytes that can still be allocated; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


@pytest.mark.once
def test_full_size_b_enhanced(tmp_path):
    """The largest released pixel branch: file, 256 px, file again, all by value."""
    if available_memory() < 8 * 2**30 or shutil.disk_usage(tmp_path).free < 4 * 2**30:
        pytest.skip("needs 8 GiB of memory and 4 GiB of disk")
    first, second = tmp_path / "tokenflow_clipb_32k_enhanced.pt", tmp_path / "again.pt"
    torch.manual_seed(0)
    source = TokenFlowTokenizer(TokenizerConfig.preset("B").with_enhanced_decoder())
    source.unused_tensors[USED] = torch.randint(0, 32768, (131072,)).float()
    try:
        source.save_original(first)
        state = read_state_dict(first)
        shapes = published_shapes("clipb_224_enhanced")
        assert {k: tuple(v.shape) for k, v in state.items()} == shapes
        model = TokenFlowTokenizer.from_pretrained(first, resolution=256)
        assert model.config == TokenizerConfig.preset("B-256").with_enhanced_decoder()
        same(model.state_dict(), source.state_dict())
        same(model.unused_tensors, source.unused_tensors)
        del source
        with torch.no_grad():
            indices = model.encode(picture(256))
        assert indices.shape == (1, 817)
        model.save_original(second)
        del model
        same(read_state_dict(second), state)
    finally:  # three gigabytes that pytest would keep
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


# What is not in a file, or should not be.


def refused(state, config, message, tmp_path):
    torch.save({"model": state}, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=message):
        TokenFlowTokenizer.from_pretrained(tmp_path / "wrong.pt", config=config)


def test_wrong_names_are_named(tmp_path):
    config, state, _ = fabricate("B")
    missing = {k: v for k, v in state.items() if k != "decoder_vqkd.fc_norm.bias"}
    refused(missing, config, r"1 missing \(decoder_vqkd\.fc_norm\.bias\)", tmp_path)
    unknown = {**state, "decoder_vqkd.blocks.0.attn.k_bias": torch.zeros(24)}
    refused(unknown, config, r"1 unknown \(decoder_vqkd\.blocks\.0\.attn\.k_bias\)", tmp_path)
    key = "quantize.embedding_vqkd.weight"
    shaped = {**state, key: torch.zeros(64, 31)}
    refused(shaped, config, r"embedding_vqkd\.weight is \(64, 31\) torch.float32, not", tmp_path)
    typed = {**state, key: state[key].double()}
    refused(typed, config, r"embedding_vqkd\.weight is \(64, 32\) torch.float64, not", tmp_path)
    used = {**state, USED: torch.zeros(65536)}
    refused(used, config, r"codebook_used is \(65536,\) torch.float32, not \(131072,\)", tmp_path)
    # All three at once, and a long list cut.
    wrong = {f"stranger.{i}": torch.zeros(1) for i in range(20)} | {**missing, key: shaped[key]}
    refused(
        wrong,
        config,
        r"1 missing .*20 unknown \(stranger\.0, .*stranger\.7, and 12 more\); 1 of another shape",
        tmp_path,
    )
    refused({**state, "module.x": torch.zeros(1)}, config, r"1 unknown \(module\.x\)", tmp_path)


def test_an_original_list_of_other_sizes_is_refused():
    """Without a configuration the sizes must be the released ones."""
    state = published_meta("clipb_224")
    config = original_checkpoint.infer_config(state)
    with torch.device("meta"):
        own = TokenFlowTokenizer(config).state_dict()
    state["encoder.conv_in.weight"] = torch.empty(64, 3, 3, 3, device="meta")
    with pytest.raises(CheckpointError, match=r"conv_in\.weight is \(64, 3, 3, 3\).*\(128, 3, 3"):
        original_checkpoint.from_original(state, config, own, "some.pt")


@pytest.mark.parametrize("variant", ["L", "XL"])
def test_normalisation_must_be_the_towers(variant, tmp_path):
    config, state, _ = fabricate(variant)
    other = {**state, "scaling_layer.shift": torch.full((1, 3, 1, 1), 0.45)}
    refused(other, config, r"scaling_layer\.shift is \[0\.4.*normalised with \[0\.", tmp_path)
    gone = {k: v for k, v in state.items() if k != "scaling_layer.scale"}
    refused(gone, config, r"1 missing \(scaling_layer\.scale\)", tmp_path)


def test_variants_are_told_apart():
    mark = "encoder_vqkd.class_embedding"
    with pytest.raises(CheckpointError, match=r"some\.pt is no original tokenizer.*none of them"):
        original_checkpoint.infer_config(
            {"encoder.conv_in.weight": torch.zeros(1)}, source="some.pt"
        )
    both = published_meta("siglip_384") | {mark: torch.zeros(1)}
    with pytest.raises(CheckpointError, match="has B and XL of them"):
        original_checkpoint.infer_config(both)


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("clipb_224", (224, 256), 384, "must be 224 or 256 for checkpoint, a tokenizer B, got 384"),
        ("vitamin_xlarge_256", (256,), 224, "must be 256 for checkpoint, a tokenizer L, got 224"),
        ("siglip_384", (384,), 256, "must be 384 for checkpoint, a tokenizer XL, got 256"),
    ],
)
def test_resolutions(name, good, bad, message):
    state = published_meta(name)
    assert original_checkpoint.infer_config(state).image_size == good[0]
    for side in good:
        assert original_checkpoint.infer_config(state, side).image_size == side
    with pytest.raises(ValueError, match=message):
        original_checkpoint.infer_config(state, bad)


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def test_unreadable_files(tmp_path, capsys):
    file = tmp_path / "file.pt"
    file.write_text("not weights")
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read as a torch file"):
        TokenFlowTokenizer.from_pretrained(file)
    torch.save({"model": {"weight": Payload()}}, file)
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read as a torch file"):
        TokenFlowTokenizer.from_pretrained(file)
    assert "ran" not in capsys.readouterr().out
    torch.save({"model": {"weight": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read as a torch file"):
        TokenFlowTokenizer.from_pretrained(file)
    for content in ({"weights": {}, "step": 1}, {"model": {}}, {"model": {"a": 1}}, [1]):
        torch.save(content, file)
        with pytest.raises(
            CheckpointError, match=r"no plain state dict of tensors.*ema, model, state"
        ):
            TokenFlowTokenizer.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"gone\.pt is missing"):
        read_state_dict(tmp_path / "gone.pt")


def test_one_entry_for_files_and_directories(tmp_path):
    config, state, _ = fabricate("B")
    torch.save({"model": state}, tmp_path / "released.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", config=config)
    folder = model.save_pretrained(tmp_path / "folder")
    same(TokenFlowTokenizer.from_pretrained(folder, 224).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"resolution must be 224 for .*folder, got 256"):
        TokenFlowTokenizer.from_pretrained(folder, resolution=256)
    with pytest.raises(ValueError, match=r"folder has its own config\.json"):
        TokenFlowTokenizer.from_pretrained(folder, config=config)
    with pytest.raises(ValueError, match="config says the resolution"):
        TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", 224, config)


# Writing what was never read.


def test_usage_that_was_never_loaded_is_empty(tmp_path):
    model = TokenFlowTokenizer(tiny("B"))
    state = read_state_dict(model.save_original(tmp_path / "new" / "file.pt"))
    assert state[USED].shape == (131072,)
    assert not state[USED].any()


def test_layers_that_were_never_loaded_are_asked_for(tmp_path):
    config, state, _ = fabricate("XL")
    torch.save({"model": state}, tmp_path / "released.pt")
    folder = TokenFlowTokenizer.from_pretrained(
        tmp_path / "released.pt", config=config
    ).save_pretrained(tmp_path / "folder")
    model = TokenFlowTokenizer.from_pretrained(folder)  # as after training: it has no 27th layer
    assert model.unused_tensors == {}
    with pytest.raises(CheckpointError, match=r"29 weights .*layers\.1\..*unused_from"):
        model.save_original(tmp_path / "again.pt")
    assert not (tmp_path / "again.pt").exists()
    model.save_original(tmp_path / "again.pt", unused_from=tmp_path / "released.pt")
    same(read_state_dict(tmp_path / "again.pt"), state)
    with pytest.raises(OutputError, match=r"again\.pt is there already"):
        model.save_original(tmp_path / "again.pt", unused_from=tmp_path / "released.pt")
    model.save_original(tmp_path / "again.pt", tmp_path / "released.pt", overwrite=True)
    same(read_state_dict(tmp_path / "again.pt"), state)
    key = "encoder_vqkd.vision_model.head.probe"
    torch.save({"model": {**state, key: torch.zeros(1, 1, 23)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"head\.probe is \(1, 1, 23\)"):
        model.save_original(tmp_path / "again.pt", unused_from=tmp_path / "other.pt")
    # A file without what nothing here reads is read all the same, and is not made up later.
    lean = {k: v for k, v in state.items() if k not in original_checkpoint.unused_shapes(config)}
    torch.save({"model": lean}, tmp_path / "lean.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "lean.pt", config=config)
    with pytest.raises(CheckpointError, match="29 weights"):
        model.save_original(tmp_path / "again.pt")


def test_unused_tensors_goes_with_a_copy():
    model = TokenFlowTokenizer(tiny("B"))
    model.unused_tensors[USED] = torch.ones(131072)
    twin = copy.deepcopy(model)
    same(twin.unused_tensors, model.unused_tensors)
    assert twin.unused_tensors[USED] is not model.unused_tensors[USED]
    assert not any("unused_tensors" in k for k in model.state_dict())


def test_tokenizers_without_a_released_form(tmp_path):
    with pytest.raises(ConfigError, match=r"clip, vitamin, siglip, .* 'efficientnet_lite0'"):
        TokenFlowTokenizer(TokenizerConfig.preset("tiny")).save_original(tmp_path / "file.pt")
    config = tiny("B")
    blocks = dataclasses.replace(PIXEL, multipliers=(1, 2), patch=8)
    with pytest.raises(ConfigError, match=r"pixel\.patch 1, this one has 8"):
        TokenFlowTokenizer(dataclasses.replace(config, pixel=blocks)).save_original(tmp_path / "x")
    alone = dataclasses.replace(config, pixel=PixelConfig(enabled=False))
    with pytest.raises(ConfigError, match=r"have a pixel branch.*pixel\.enabled is false"):
        TokenFlowTokenizer(alone).save_original(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# Details that change numbers.


def test_256_pixels(tmp_path):
    """B at 256 px: nine scales; both position tables resampled at the stated points."""
    _, state, _ = fabricate("B")
    torch.save({"model": state}, tmp_path / "released.pt")
    model = TokenFlowTokenizer.from_pretrained(tmp_path / "released.pt", config=tiny("B", 256))
    x = picture(256)
    seen = {}
    model.semantic_encoder.ln_pre.register_forward_hook(
        lambda _m, inputs, _o: seen.update(tower=inputs[0])
    )
    model.semantic_decoder.blocks[0].register_forward_hook(
        lambda _m, inputs, _o: seen.update(decoder=inputs[0])
    )
    with torch.no_grad():
        indices = model.encode(x)
        images, semantic = model.decode(indices)
        f_hat = model.quantizer.decode(indices, size=(16, 16))
        patches = model.semantic_encoder.conv1(x).flatten(2).transpose(1, 2)
        codes = model.semantic_decoder.patch_embed.proj(f_hat[:, :32]).flatten(2).transpose(1, 2)
    assert indices.shape == (1, 817)
    assert images.shape == (1, 3, 256, 256)
    assert semantic.shape == (1, 256, 20)

    def resampled(table, **how):
        image = table.reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, mode="bicubic", align_corners=False, **how)
        return image.flatten(2).transpose(1, 2)

    points = {"scale_factor": ((16 + 0.1) / 14, (16 + 0.1) / 14)}
    for name, table, tokens in (
        ("tower", state["encoder_vqkd.positional_embedding"][1:], patches),
        ("decoder", state["decoder_vqkd.pos_embed"][0, 1:], codes),
    ):
        positions = seen[name][:, 1:] - tokens
        torch.testing.assert_close(positions, resampled(table, **points), rtol=1e-4, atol=1e-5)
        plain = resampled(table, size=(16, 16))
        assert (positions - plain).abs().max() > 0.01 * plain.abs().max()


def test_resampled_positions_are_interpolates_own():
    positions = torch.randn(1, 197, 8, generator=torch.Generator().manual_seed(0))
    image = positions[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    ratio = (16 + 0.1) / 14
    expected = F.interpolate(
        image, scale_factor=(ratio, ratio), mode="bicubic", align_corners=False
    )
    got = resample_positions(positions, (16, 16))
    assert torch.equal(got[:, 0], positions[:, 0])
    assert torch.equal(got[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 256, 8))


def test_semantic_decoder_ends_in_a_norm_of_patch_tokens():
    """fc_norm sees every patch token and no class token; the class token still takes part."""
    torch.manual_seed(0)
    decoder = SemanticDecoder(6, 24, 1, 12, 4)
    seen = []
    decoder.fc_norm.register_forward_hook(lambda _m, inputs, output: seen.extend((*inputs, output)))
    x = torch.randn(2, 6, 4, 4)
    got = decoder(x)
    assert seen[0].shape == (2, 16, 24)
    assert got is seen[1]
    decoder.cls_token.data += 1.0
    assert not torch.allclose(decoder(x), got)


def test_keys_have_no_bias():
    for name in LISTS:
        keys = [k for k in published_shapes(name) if k.startswith("decoder_vqkd.blocks.0.attn.")]
        assert sorted(k.removeprefix("decoder_vqkd.blocks.0.attn.") for k in keys) == [
            "proj.bias",
            "proj.weight",
            "q_bias",
            "qkv.weight",
            "v_bias",
        ]
    attention = SemanticDecoder(6, 24, 1, 12, 4).blocks[0].attn
    assert attention.qkv.bias is None
    attention.q_bias.data.fill_(3.0)
    attention.v_bias.data.fill_(5.0)
    seen = []
    plain = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a: seen.extend(a) or plain(*a))
        attention(torch.zeros(1, 2, 24))
    assert [sorted(part.unique().tolist()) for part in seen] == [[3.0], [0.0], [5.0]]


def test_xl_pixels_go_through_432():
    """384 -> 432 -> grid of 27 -> 432 -> 384, bicubic without antialiasing both ways."""
    torch.manual_seed(0)
    model = TokenFlowTokenizer(tiny("XL")).eval()
    seen = {}
    model.encoder.register_forward_hook(lambda _m, inputs, _o: seen.update(encoder=inputs[0]))
    model.decoder.register_forward_hook(lambda _m, _i, output: seen.update(decoder=output))
    model.semantic_encoder.embeddings.register_forward_hook(
        lambda _m, inputs, _o: seen.update(tower=inputs[0])
    )
    x = picture(384)
    with torch.no_grad():
        h = model.features(x)
        images, _ = model.decode_features(h)
    assert h.shape == (1, 40, 27, 27)
    inner = F.interpolate(x, size=(432, 432), mode="bicubic", align_corners=False)
    assert torch.equal(seen["encoder"], inner)
    assert seen["decoder"].shape == (1, 3, 432, 432)
    outer = F.interpolate(seen["decoder"], size=(384, 384), mode="bicubic", align_corners=False)
    assert torch.equal(images, outer)
    torch.testing.assert_close(seen["tower"], x)  # mean 0.5, deviation 0.5: [-1, 1] again


def test_clip_gets_the_image_as_it_is():
    model = TokenFlowTokenizer(tiny("B")).eval()
    seen = []
    model.semantic_encoder.conv1.register_forward_hook(lambda _m, inputs, _o: seen.extend(inputs))
    x = 1.5 * picture(224)  # beyond [-1, 1] too: nothing is clamped
    model.tower_features(x)
    assert torch.equal(seen[0], x)


def test_towers_pixels():
    """To 0-255, clamped, to 0-1, then mean and deviation: bit for bit."""
    x = 1.5 * picture(64)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    expected = (((x + 1.0) * 127.5).clamp(0, 255.0) / 255.0 - mean) / deviation
    assert torch.equal(PixelNorm(CLIP_MEAN, CLIP_STD)(x), expected)


def test_eight_bits():
    """127.5 x + 128, clamped, truncated: not rounded, and not (x + 1) * 127.5."""
    levels = torch.arange(256) / 127.5 - 1
    values = torch.cat([levels, levels + 0.0045, torch.tensor([-1.5, 1.5])])
    expected = [min(255, max(0, int(127.5 * float(v) + 128))) for v in values.double()]
    assert to_uint8(values).tolist() == expected
    assert expected != [min(255, max(0, round(127.5 * float(v) + 128))) for v in values]


def test_eps_of_every_norm():
    with torch.device("meta"):
        model = TokenFlowTokenizer(TokenizerConfig.preset("XL"))
        clip = TokenFlowTokenizer(TokenizerConfig.preset("B")).semantic_encoder
    groups = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(groups) == 28 + 39  # encoder, decoder
    assert {(m.num_groups, m.eps) for m in groups} == {(32, 1e-6)}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(layers) == 2 * 26 + 2 * 3 + 1
    assert {m.eps for m in layers} == {1e-6}
    layers = [m for m in clip.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(layers) == 2 * 12 + 2
    assert {m.eps for m in layers} == {1e-5}


def test_downsampling_pads_right_and_bottom():
    torch.manual_seed(0)
    layer = Downsample(4)
    x = torch.randn(1, 4, 8, 8)
    w, b = layer.conv.weight, layer.conv.bias
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), w, b, stride=2)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(F.conv2d(x, w, b, stride=2, padding=1), expected)
