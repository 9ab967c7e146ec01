"""Tokenizers with any quantizer of the family: tokens, losses, files, and what refuses them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tokenflow_ext import Levels, Projected, Signs, Table
from tokenflow_ext.models import (
    VAR,
    ConfigError,
    PixelConfig,
    QuantizerConfig,
    SemanticConfig,
    TokenFlowTokenizer,
    TokenizerConfig,
    TowerConfig,
    VarConfig,
)
from tokenflow_ext.models.losses.tokenizer import tokenizer_loss
from tokenflow_ext.models.tokenizer.config import FamilyConfig

CLIP = TowerConfig("clip", 32, 8, width=16, depth=1, heads=2, mlp_width=32)
KINDS: dict[str, dict] = {
    "groups": {"family": {"group_dim": 2, "metric": "dot"}},
    "shared": {"family": {"index": "shared"}, "weights": (1.0, 0.5)},
    "depth": {
        "codebook_update": "ema",
        "l2_norm": False,
        "family": {"depth": 3, "errors": "running", "straight_through": "identity"},
    },
    "projected": {"family": {"code": "projected"}},
    "signs": {"family": {"code": "signs", "spherical": True, "entropy": 0.1, "flips": 0.1}},
    "levels": {"family": {"code": "levels", "group_dim": 2, "levels": (5, 3)}},
    "scales": {
        "scales": (1, 2, 4),
        "l2_norm": False,
        "family": {
            "convolutions": True,
            "errors": "running",
            "straight_through": "identity",
        },
    },
    "signs over scales": {
        "scales": (1, 2, 4),
        "family": {"code": "signs", "upsampling": "bilinear"},
    },
}


def config(kind: str, **changes: object) -> TokenizerConfig:
    options = {"scales": (4,), "codebook_size": 24, "scale_drop": 0.0, **KINDS[kind], **changes}
    family = FamilyConfig(**options.pop("family"))
    quantizer = QuantizerConfig(kind="family", phi_shared=1, family=family, **options)
    return TokenizerConfig(
        32,
        PixelConfig(
            channels=8,
            multipliers=(1, 2),
            patch=4,
            res_blocks=1,
            z_channels=8,
            groups=4,
            code_dim=4,
        ),
        SemanticConfig(
            CLIP, code_dim=6, decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_grid=4
        ),
        quantizer,
        CLIP,
    )


def build(kind: str, **changes: object) -> TokenFlowTokenizer:
    torch.manual_seed(0)
    return TokenFlowTokenizer(config(kind, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_tokens(kind: str) -> None:
    model = build(kind).train()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = model(images)
    teacher = torch.randn_like(out.semantic)
    losses = tokenizer_loss(
        out, images, teacher=teacher, semantic_kind="l2", semantic_weight=1.0, vq_weight=1.0
    )
    losses.total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    model.eval()
    indices = model.encode(images)
    made, semantic = model.decode(indices)
    out = model(images)
    torch.testing.assert_close(made, out.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(semantic, out.semantic, rtol=1e-4, atol=1e-4)
    quantizer = model.quantizer
    numbers = quantizer.code_numbers(indices)
    assert int(numbers.max()) < quantizer.num_codes
    assert sum(quantizer.codes_per_group) == quantizer.num_codes
    hits = torch.bincount(numbers.flatten(), minlength=quantizer.num_codes)
    assert torch.equal(hits, out.quantizer.usage.hits)
    assert quantizer.usage_ema.shape == (quantizer.num_codes,)
    assert [part.shape[1] for part in numbers.split(quantizer.tokens_per_scale, dim=1)] == [
        a * b for a, b in quantizer.scales
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    model = build(kind).eval()
    model.save_pretrained(tmp_path)
    other = TokenFlowTokenizer.from_pretrained(tmp_path)
    assert other.config == model.config
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(other.encode(images), model.encode(images))
    assert TokenizerConfig.from_dict(model.config.to_dict()) == model.config


def test_the_groups_are_the_branches_cut() -> None:
    groups = build("groups").quantizer.groups
    assert groups == (Table(24, 2, l2_norm=True),) * 5
    assert build("shared").quantizer.groups == (
        Table(24, 6, l2_norm=True),
        Table(24, 4, l2_norm=True, weight=0.5),
    )
    assert build("projected").quantizer.groups == (
        Projected(24, 6, l2_norm=True),
        Projected(24, 4, l2_norm=True),
    )
    assert build("signs").quantizer.groups == (Signs(6, spherical=True), Signs(4, spherical=True))
    assert build("levels").quantizer.groups == (Levels((5, 3)),) * 5
    assert build("groups").encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 5)
    assert build("depth").encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 2, 3)


def test_tables_that_can_be_set() -> None:
    assert len(build("groups").quantizer.codebooks) == 5
    assert len(build("scales").quantizer.codebooks) == 2
    for kind in ("projected", "signs", "levels"):
        assert build(kind).quantizer.codebooks == []


def test_what_needs_one_index_refuses(tmp_path) -> None:
    model = build("groups", scales=(1, 4))
    with pytest.raises(ConfigError, match=r"VAR is of tokenizers with quantizer\.kind 'tokenflow'"):
        VarConfig.for_tokenizer(model)
    shape = VarConfig(depth=1, codebook_size=24, feature_dim=10, scales=(1, 4))
    with pytest.raises(
        ConfigError, match=r"of tokenizers with quantizer\.kind 'tokenflow' or 'var"
    ):
        VAR(shape, model)
    with pytest.raises(ConfigError, match="an original checkpoint is of tokenizers"):
        model.save_original(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("groups", {"family": {"group_dim": 4}}, "semantic.code_dim must be a multiple.*6 and 4"),
        ("groups", {"family": {"code": "words"}}, "quantizer.family.code must be one of table"),
        ("levels", {"family": {"code": "levels"}}, "levels must hold a number for each of a group"),
        ("signs", {"family": {"code": "signs", "metric": "dot"}}, "family: metric='dot' is of tab"),
        ("groups", {"family": {"depth": 0}}, "quantizer.family.depth"),
        ("groups", {"family": {"metric": "cosine"}}, "metric must be one of l2, dot"),
        ("shared", {"family": {"index": "each"}}, "index must be one of shared, own"),
    ],
)
def test_bad_configurations(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(kind, **changes)


def test_signs_beyond_what_is_counted() -> None:
    wide = config("signs")
    with pytest.raises(ConfigError, match=r"at most 2\^20 codes"):
        dataclasses.replace(wide, semantic=dataclasses.replace(wide.semantic, code_dim=21))


def test_the_section_is_of_its_kind() -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.family is for quantizer\.kind 'family'"):
        QuantizerConfig(family=FamilyConfig(depth=2))
