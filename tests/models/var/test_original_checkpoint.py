"""VAR's released weights: names, shapes, there and back, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from var_models import CLASSES, SCALES, TOKENS, WIDTH, build, tokens, var_tokenizer

from tokenflow_ext.errors import OutputError
from tokenflow_ext.models import (
    VAR,
    CheckpointError,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
    VarConfig,
)


def released_shapes(depth, scales, codes=4096, code_width=32, classes=1000, shared=False):
    """Names and shapes of released weights, as their description lists them."""
    width, length = 64 * depth, sum(side * side for side in scales)
    shapes = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, length, width),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        "word_embed.weight": (width, code_width),
        "word_embed.bias": (width,),
        "class_emb.weight": (classes + 1, width),
        "lvl_embed.weight": (len(scales), width),
        "head_nm.ada_lin.1.weight": (2 * width, width),
        "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (codes, width),
        "head.bias": (codes,),
    }
    if shared:
        shapes |= {
            "shared_ada_lin.1.weight": (6 * width, width),
            "shared_ada_lin.1.bias": (6 * width,),
        }
    for i in range(depth):
        block = f"blocks.{i}."
        shapes |= {
            block + "attn.scale_mul_1H11": (1, depth, 1, 1),
            block + "attn.q_bias": (width,),
            block + "attn.v_bias": (width,),
            block + "attn.zero_k_bias": (width,),
            block + "attn.mat_qkv.weight": (3 * width, width),
            block + "attn.proj.weight": (width, width),
            block + "attn.proj.bias": (width,),
            block + "ffn.fc1.weight": (4 * width, width),
            block + "ffn.fc1.bias": (4 * width,),
            block + "ffn.fc2.weight": (width, 4 * width),
            block + "ffn.fc2.bias": (width,),
        }
        if shared:
            shapes[block + "ada_gss"] = (1, 1, 6, width)
        else:
            shapes[block + "ada_lin.1.weight"] = (6 * width, width)
            shapes[block + "ada_lin.1.bias"] = (6 * width,)
    return shapes


def mask(scales):
    level = torch.cat([torch.full((s * s,), i) for i, s in enumerate(scales)])
    bias = torch.zeros(len(level), len(level)).masked_fill(level[:, None] < level[None], -math.inf)
    return bias[None, None], level[None]


@pytest.mark.parametrize("name", ["d16", "d20", "d24", "d30", "d36"])
def test_names_and_shapes_at_full_size(name):
    config = VarConfig.preset(name)
    shapes = released_shapes(config.depth, config.scales, shared=name == "d36")
    if name == "d16":
        assert len(shapes) == 220
    with torch.device("meta"):
        model = VAR(config, full_size_tokenizer(config))
    found = {key: tuple(value.shape) for key, value in model.to_released().items()}
    assert found == shapes


def full_size_tokenizer(config):
    """With the codes and scales of full size, on the meta device; call it there."""
    pixel = PixelConfig(
        channels=8, multipliers=(1, 2, 2), res_blocks=1, z_channels=32, groups=4, code_dim=32
    )
    quantizer = QuantizerConfig(config.codebook_size, config.scales, l2_norm=False, kind="var")
    semantic = SemanticConfig(tower=TowerConfig("none"))
    return TokenFlowTokenizer(TokenizerConfig(4 * config.scales[-1], pixel, semantic, quantizer))


def released(shared=False, **changes):
    """Random released weights of a tiny model, made from the description's list."""
    shapes = released_shapes(2, SCALES, 32, WIDTH, CLASSES, shared)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state["attn_bias_for_masking"], state["lvl_1L"] = mask(SCALES)
    for key in state:
        if key.endswith("zero_k_bias"):
            state[key] = torch.zeros_like(state[key])
    return {**state, **changes}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["state", "file"])
def test_there_and_back(tmp_path, shared, form):
    state = released(shared)
    source = state
    if form == "file":
        source = tmp_path / "var.pth"
        torch.save(state, source)
    model = VAR.from_released(source, var_tokenizer())
    assert model.config.shared_adaln is shared
    assert (model.config.depth, model.config.classes) == (2, CLASSES)
    assert not model.training
    back = model.to_released()
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    written = model.save_released(tmp_path / "out.pth")
    again = torch.load(written, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with pytest.raises(OutputError):
        model.save_released(written)
    model.save_released(written, overwrite=True)


def test_saved_and_loaded(tmp_path):
    model = build(torch.float32, shared_adaln=True)
    model.save_pretrained(tmp_path)
    loaded = VAR.from_pretrained(tmp_path)
    assert loaded.config == model.config
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded.logits(labels, tokens(2)), model.logits(labels, tokens(2)))
        assert torch.equal(loaded.generate(labels, seed=1), model.generate(labels, seed=1))
    other = VAR.from_pretrained(tmp_path, model.tokenizer)
    assert other.tokenizer is model.tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.fc1.weight"), "missing .*blocks.1.ffn.fc1.weight"),
        (lambda s: s.pop("head.weight"), "is no released VAR: it has no head.weight"),
        (lambda s: s.update(strange=torch.zeros(1)), "unknown .*strange"),
        (lambda s: s.update(pos_start=torch.zeros(1, 2, 128)), "another shape .*pos_start"),
        (lambda s: s.update(lvl_1L=s["lvl_1L"].flip(1)), "lvl_1L is not that of"),
        (
            lambda s: s.update(attn_bias_for_masking=torch.zeros(1, 1, TOKENS, TOKENS)),
            "attn_bias_for_masking is not that of",
        ),
        (lambda s: s.update({"head.bias": s["head.bias"].half()}), "one floating-point type"),
        (lambda s: s.update({"head.weight": torch.zeros(3)}), r"head.weight is \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = released()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        VAR.from_released(state, var_tokenizer())


def test_weights_of_other_scales():
    state = released()
    state["pos_1LC"] = torch.zeros(1, TOKENS + 1, 128)
    with pytest.raises(CheckpointError, match=r"4 scales of 31 places .* scales are 1, 2, 3, 4"):
        VAR.from_released(state, var_tokenizer())


def test_weights_that_are_not_finite(tmp_path):
    state = released()
    state["head.bias"][0] = math.nan
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=r"not finite, as in head\.bias"):
        VAR.from_released(tmp_path / "var.pth", var_tokenizer())


def test_no_saved_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VAR.from_pretrained(tmp_path)
