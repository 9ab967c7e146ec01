"""RoPE of every kind: against transformers' public models, against the papers, and refusals."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from tokenflow_ext.models import BackboneConfig, ConfigError
from tokenflow_ext.models.text_to_image.backbone import rotary, rotate
from tokenflow_ext.models.text_to_image.rope import RopeConfig

WIDTH, THETA, LONGEST = 16, 500.0, 96
ORIGINAL = "original_max_position_embeddings"
POSITIVE = st.floats(1.0, 8.0)
FACTORS = st.lists(POSITIVE, min_size=WIDTH // 2, max_size=WIDTH // 2)
KINDS = {
    "default": st.fixed_dictionaries({}),
    "linear": st.fixed_dictionaries({"factor": POSITIVE}),
    "dynamic": st.fixed_dictionaries({"factor": POSITIVE}),
    "yarn": st.fixed_dictionaries(
        {"factor": POSITIVE, ORIGINAL: st.integers(16, 64)},
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "mscale": POSITIVE,
            "mscale_all_dim": POSITIVE,
            "truncate": st.booleans(),
        },
    ),
    "longrope": st.fixed_dictionaries(
        {"short_factor": FACTORS, "long_factor": FACTORS, ORIGINAL: st.integers(16, 64)},
        optional={"factor": POSITIVE, "attention_factor": st.floats(0.5, 2.0)},
    ),
    "llama3": st.fixed_dictionaries(
        {
            "factor": POSITIVE,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            ORIGINAL: st.integers(16, 64),
        }
    ),
    "proportional": st.fixed_dictionaries(
        {}, optional={"partial_rotary_factor": st.floats(0.2, 1.0), "factor": POSITIVE}
    ),
}


def llama(parameters, theta=THETA):
    return LlamaConfig(
        vocab_size=8,
        hidden_size=2 * WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": theta, **parameters},
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_cos_and_sin_are_those_of_transformers(kind, data):
    """For sequences of any length, past ``max_position_embeddings`` too."""
    parameters = {"rope_type": kind, **data.draw(KINDS[kind])}
    length = data.draw(st.integers(1, 2 * LONGEST))
    config = llama(dict(parameters))
    try:
        theirs = LlamaModel(config)
    except KeyError:  # transformers 5.0 has no proportional one yet
        pytest.skip(f"this transformers has no {kind}")
    like = torch.zeros(1, 1)
    expected = theirs.rotary_emb(like, torch.arange(length).unsqueeze(0))
    backbone = BackboneConfig.from_transformers(config)
    for found, right in zip(rotary(backbone, length, like), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=5e-5)  # theirs in float32
    again = BackboneConfig.from_transformers(backbone.to_transformers(8))
    assert again == backbone


def test_proportional_by_its_definition():
    config = RopeConfig("proportional", partial_rotary_factor=0.5, factor=2.0)
    found, factor = config.frequencies(THETA, WIDTH, LONGEST, 10)
    expected = [THETA ** (-2 * i / WIDTH) / 2 for i in range(4)] + [0.0] * 4
    assert factor == 1.0
    assert found.tolist() == pytest.approx(expected, abs=0, rel=1e-14)


def test_far_places_keep_their_angles():
    """In float32 the angle of place 100,000 is wrong by some thousandths."""
    cos, _ = rotary(BackboneConfig(), 100_001, torch.zeros((), dtype=torch.float64))
    assert cos.shape == (1, 100_001, 128)
    for pair in (0, 1, 40):
        angle = 100_000 * 10000.0 ** (-2 * pair / 128)
        assert float(cos[0, -1, pair]) == pytest.approx(math.cos(angle), abs=1e-9)
        assert float(cos[0, -1, pair + 64]) == float(cos[0, -1, pair])


def test_a_part_of_the_channels_turns():
    """The first ones, by the frequencies of a head of that width; the others stay."""
    shape = BackboneConfig(
        hidden_size=32, num_attention_heads=2, rope=RopeConfig(partial_rotary_factor=0.5)
    )
    whole = BackboneConfig(hidden_size=16, num_attention_heads=2)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    found = rotate(x, rotary(shape, 5, x))
    assert torch.equal(found[..., 8:], x[..., 8:])
    torch.testing.assert_close(found[..., :8], rotate(x[..., :8], rotary(whole, 5, x)))


def test_how_far_it_reaches():
    """``max_position_embeddings`` is the unscaled model's where no other length is said to be."""
    for kind, reach in (("linear", 240), ("dynamic", 240)):
        config = RopeConfig(kind, factor=2.5)
        assert BackboneConfig(max_position_embeddings=96, rope=config).longest == reach
    llama3 = RopeConfig(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=48,
    )
    assert BackboneConfig(max_position_embeddings=96, rope=llama3).longest == 96


class Older:
    """A configuration as transformers 4 has it."""

    model_type = "llama"
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 64, 48, 1, 4
    num_key_value_heads, max_position_embeddings, rms_norm_eps = None, 96, 1e-6
    hidden_act, initializer_range = "silu", 0.02
    rope_theta = 500000
    rope_scaling = {"type": "linear", "factor": 4}  # noqa: RUF012
    partial_rotary_factor = 0.5


def test_configurations_of_transformers_4():
    found = BackboneConfig.from_transformers(Older())
    assert found.rope == RopeConfig("linear", factor=4.0, partial_rotary_factor=0.5)
    assert found.rope_theta == 500000.0
    plain = Older()
    plain.rope_scaling = plain.partial_rotary_factor = None
    assert BackboneConfig.from_transformers(plain).rope == RopeConfig()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope"}, r"rope_type must be one of default, linear, .*, got 'mrope'"),
        ({"rope_type": "default", "mrope_section": [1]}, r"unknown field rope\.mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, r"unknown field rope\.full_attention"),
        ({"rope_type": "linear"}, r"rope\.factor must be given for rope_type 'linear'"),
        ({"rope_type": "linear", "factor": 0.0}, r"rope\.factor must be positive"),
        (
            {"rope_type": "linear", "factor": math.nan},
            r"rope\.factor must be a finite number, got nan",
        ),
        ({"rope_type": "linear", "factor": "2"}, r"rope\.factor must be float, got '2'"),
        ({"rope_type": "default", "factor": 2.0}, r"factor is no parameter of rope_type 'default'"),
        ({"rope_type": 3}, r"rope\.rope_type must be str, got 3"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor must be in \(0, 1\]"),
        ({"partial_rotary_factor": 0.2}, r"turns 3 of a head's 16 channels: it must be an even"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.125},
            "turns 2 of a head's 16 channels: it must be an even number, 4 or more",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], ORIGINAL: 4},
            r"rope\.short_factor must have 8 numbers, one for each pair of channels, got 1",
        ),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, ORIGINAL: 4}
            | {"high_freq_factor": 1.0},
            r"high_freq_factor must be greater than low_freq_factor",
        ),
    ],
)
def test_refusals(parameters, message):
    older = Older()
    older.rope_scaling, older.partial_rotary_factor = parameters, None
    with pytest.raises(ConfigError, match=message):
        BackboneConfig.from_transformers(older)


def test_other_things_that_would_change_the_computation():
    for name, value, message in (
        ("model_type", "mistral", "model_type must be one of llama, qwen2, qwen3, got 'mistral'"),
        ("sliding_window", 4, r"sliding windows are not supported, got sliding_window 4"),
        (
            "layer_types",
            ["full_attention", "sliding_attention"],
            "sliding windows are not supported",
        ),
        ("attention_dropout", 0.1, "attention_dropout is not supported, got 0.1"),
        ("hidden_act", "quick", r"hidden_act must be one of silu.*got 'quick'"),
        ("hidden_size", "64", r"backbone\.hidden_size must be int, got '64'"),
        ("hidden_size", 64.0, r"backbone\.hidden_size must be int"),
        ("rms_norm_eps", math.nan, r"backbone\.rms_norm_eps must be a finite number, got nan"),
        ("num_hidden_layers", 2**40, r"backbone\.num_hidden_layers must be positive and below"),
        ("rope_scaling", "linear", "rope_parameters must be a mapping, got 'linear'"),
        ("mlp_bias", 1, r"backbone\.mlp_bias must be bool, got 1"),
    ):
        config = Older()
        config.rope_scaling = config.partial_rotary_factor = None
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=message):
            BackboneConfig.from_transformers(config)
    # A window that no layer has changes nothing.
    config.mlp_bias, config.layer_types, config.sliding_window = False, ["full_attention"], 8
    assert BackboneConfig.from_transformers(config).hidden_size == 64
    with pytest.raises(ConfigError, match="attention_bias is not an option of qwen2"):
        dataclasses.replace(BackboneConfig("qwen2"), attention_bias=True)
