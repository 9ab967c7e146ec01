"""Configurations: presets, JSON form, errors that name the field."""

import dataclasses
import json

import pytest

from tokenflow_ext.models import ConfigError, TokenizerConfig, TowerConfig
from tokenflow_ext.models.tokenizer.config import PRESETS, PixelConfig, SemanticConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = TokenizerConfig.preset(name)
    assert TokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "tokens", "grid", "semantic_dim"),
    [("B", 561, 14, 512), ("B-256", 817, 16, 512), ("L", 817, 16, 1152), ("XL", 2227, 27, 1152)],
)
def test_published_sizes(name, tokens, grid, semantic_dim):
    config = TokenizerConfig.preset(name)
    assert sum(side * side for side in config.quantizer.scales) == tokens
    assert config.quantizer.scales[-1] == config.grid == grid
    assert config.semantic_dim == semantic_dim
    assert config.dims == (32, 8)
    assert config.quantizer.codebook_size == 32768


@pytest.mark.parametrize(("name", "heads"), [("B", 12), ("B-256", 12), ("XL", 16)])
def test_published_numbers_that_no_shape_shows(name, heads):
    """Weights of another number of heads or groups would load without a word."""
    config = TokenizerConfig.preset(name)
    assert config.semantic.tower.heads == config.teacher.heads == heads
    assert config.semantic.decoder_heads == 12
    assert config.pixel.groups == 32
    assert config.pixel.input_size == (432 if name == "XL" else 0)
    quantizer = config.quantizer
    assert (quantizer.beta, quantizer.l2_norm, quantizer.scale_drop) == (0.25, True, 0.1)
    assert quantizer.weights is None  # w_dis = 1


def test_enhanced_decoder_is_twice_the_encoder():
    enhanced = TokenizerConfig.preset("B").with_enhanced_decoder()
    assert (enhanced.pixel.decoder_channels, enhanced.pixel.decoder_res_blocks) == (256, 4)
    assert enhanced.with_enhanced_decoder() == enhanced
    tiny = TokenizerConfig.preset("tiny").with_enhanced_decoder().pixel
    assert (tiny.decoder_channels, tiny.decoder_res_blocks) == (64, 2)


def test_unset_fields_take_defaults():
    values = {"image_size": 64, "pixel": {"channels": 16}}
    config = TokenizerConfig.from_dict(values)
    assert config == TokenizerConfig(image_size=64, pixel=PixelConfig(channels=16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pixels": {}}, "unknown field pixels"),
        ({"pixel": {"chanels": 3}}, r"unknown field pixel\.chanels"),
        ({"semantic": {"tower": {"kidn": "clip"}}}, r"unknown field semantic\.tower\.kidn"),
        ({"pixel": {"channels": "16"}}, r"pixel\.channels must be int, got '16'"),
        ({"pixel": {"channels": True}}, r"pixel\.channels must be int, got True"),
        ({"pixel": {"multipliers": 4}}, r"pixel\.multipliers must be a list, got 4"),
        ({"quantizer": {"scales": [1, "2"]}}, r"quantizer\.scales\[1\] must be int, got '2'"),
        ({"pixel": None}, "pixel must be a mapping, got None"),
        ({"pixel": {"multipliers": []}}, r"pixel\.multipliers must name one level"),
        ({"quantizer": {"codebook_size": 0}}, r"quantizer\.codebook_size must be positive, got 0"),
        ({"quantizer": {"codebook_update": "sgd"}}, "must be 'gradient' or 'ema', got 'sgd'"),
        ({"image_size": 100}, "must be a multiple of 16.*got 100"),
        ({"teacher": {"kind": "clip"}}, r"teacher\.kind is 'clip' but semantic\.tower\.kind"),
        ({"pixel": {"enabled": False}}, r"pixel\.enabled is false and semantic\.tower\.kind"),
        (
            {"quantizer": {"kind": "rq"}},
            r"quantizer\.kind must be one of tokenflow, var, family, got 'rq'",
        ),
        ({"quantizer": {"kind": "var", "phi": 2.0}}, r"quantizer\.phi must be within \[0, 1\]"),
        (
            {"quantizer": {"kind": "var", "scales": [1, 14]}},
            r"quantizer\.phi_shared must be 0 to 2, the number of scales, got 4",
        ),
        (
            {"quantizer": {"kind": "var", "codebook_update": "ema"}},
            r"codebook_update must be 'gradient' with quantizer\.kind 'var', got 'ema'",
        ),
        (
            {"quantizer": {"kind": "var", "weights": [1.0]}},
            r"quantizer\.weights is not for quantizer\.kind 'var'",
        ),
        (
            {"semantic": {"tower": {"kind": "clip"}}, "quantizer": {"kind": "var"}},
            r"quantizer\.kind 'var' is for one branch",
        ),
        (
            {
                "pixel": {"enabled": False},
                "semantic": {"tower": {"kind": "clip"}},
                "teacher": {"kind": "clip", "patch_size": 32},
            },
            r"teacher's grid \(7\) and the semantic tower's \(14\) differ",
        ),
        ({"teacher": {"kind": "dino"}}, "tower kind must be one of .*got 'dino'"),
        (
            {"image_size": 256, "semantic": {"tower": {"kind": "clip", "patch_size": 32}}},
            r"semantic tower's grid \(8\) and the pixel encoder's \(16\) differ",
        ),
        (
            {"semantic": {"tower": {"kind": "clip", "projection": 512}}},
            r"semantic\.tower\.projection must be 0, got 512",
        ),
    ],
)
def test_errors_name_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig.from_dict(values)


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"preset must be one of tiny, B, .*got 'XXL'"):
        TokenizerConfig.preset("XXL")


def test_semantic_branch_switches_off():
    tiny = TokenizerConfig.preset("tiny")
    assert tiny.dims == (32, 8)
    assert tiny.branches == ("semantic", "pixel")
    off = dataclasses.replace(tiny, semantic=SemanticConfig(), teacher=TowerConfig())
    assert off.dims == (8,)
    assert off.semantic_dim == 0
    assert off.branches == ("pixel",)


def test_pixel_branch_switches_off():
    tiny = TokenizerConfig.preset("tiny")
    off = dataclasses.replace(tiny, pixel=PixelConfig(enabled=False))
    assert off.branches == ("semantic",)
    assert off.dims == (32,)
    assert off.grid == tiny.grid == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantizer": {"codebook_size": 10**9}}, r"codebook_size must be within \[1, 16777216\]"),
        ({"quantizer": {"codebook_size": 10**5000}}, r"codebook_size must be within"),
        ({"quantizer": {"scales": [2**40]}}, r"scales must be within"),
        ({"quantizer": {"scales": [1] * 10**5}}, r"scales must name 256 scales at most"),
        ({"image_size": 2**20}, r"image_size must be within"),
        ({"pixel": {"input_size": 2**20}}, r"input_size must be within"),
        ({"pixel": {"channels": 2**40}}, r"pixel\.channels must be within"),
        ({"pixel": {"res_blocks": 10**9}}, r"res_blocks must be within"),
        ({"pixel": {"multipliers": [1] * 99}}, r"multipliers must name 12 levels at most"),
        ({"pixel": {"channels": 2**16, "multipliers": [64]}}, r"largest of pixel\.multipliers"),
        ({"semantic": {"tower": {"kind": "clip", "depth": 10**9}}}, r"tower\.depth must be within"),
        ({"semantic": {"tower": {"kind": "clip", "width": 2**40}}}, r"tower\.width must be within"),
        ({"semantic": {"tower": {"kind": "clip", "input_scale": 1e300}}}, r"input_scale"),
        ({"semantic": {"tower": {"kind": "clip", "input_scale": float("nan")}}}, r"input_scale"),
        ({"quantizer": {"beta": float("inf")}}, r"quantizer\.beta must be a finite number"),
        ({"quantizer": {"beta": 10**400}}, r"quantizer\.beta must be a finite number"),
        ({"quantizer": {"beta": -1.0}}, r"quantizer\.beta must be within"),
        ({"quantizer": {"scale_drop": 1.5}}, r"quantizer\.scale_drop must be within \[0, 1\]"),
        ({"quantizer": {"weights": [1.0, 1.0]}}, r"weights must hold a number for each of pixel"),
        ({"x" * 10**6: 1}, "unknown field x"),
        ({7: 1}, "unknown field 7"),
        ({"image_size": ["x" * 10**6] * 100}, "image_size must be int"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_memory_is_taken(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        TokenizerConfig.from_dict(values)
    assert len(str(error.value)) < 500


def test_numbers_given_by_hand_are_held_to_the_same():
    with pytest.raises(ConfigError, match="input_scale"):
        TowerConfig("clip", input_scale=float("nan"))
    with pytest.raises(ConfigError, match="depth"):
        TowerConfig("siglip", depth=10**12)
