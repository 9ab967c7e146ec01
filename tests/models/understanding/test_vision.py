"""A tokenizer as a vision model: each kind of features, types, loading and saving."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import image_tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from understanding_models import expected_features, pixels, rows

from tokenflow_ext.models import ConfigError, TokenizerConfig
from tokenflow_ext.models.understanding.names import FEATURES
from tokenflow_ext.models.understanding.pixels import TokenFlowImageProcessor
from tokenflow_ext.models.understanding.vision import (
    TokenFlowVisionConfig,
    TokenFlowVisionModel,
)


def vision(features="last", tokenizer=None, **options):
    tokenizer = image_tokenizer() if tokenizer is None else tokenizer
    return TokenFlowVisionModel(
        TokenFlowVisionConfig(tokenizer.config, features, **options), tokenizer
    )


@pytest.mark.parametrize("features", FEATURES)
def test_features_are_those_of_the_definition(features):
    model, images = vision(features), pixels(3)
    output = model(images)
    want = expected_features(model.tokenizer, images, features)
    assert output.last_hidden_state.shape == want.shape
    assert want.shape[1:] == (model.config.visual_tokens, model.config.hidden_size)
    assert torch.allclose(output.last_hidden_state.double(), want, atol=1e-5)
    assert output.hidden_states[-1] is output.last_hidden_state
    assert model(images, return_dict=False)[0].equal(output.last_hidden_state)


@pytest.mark.parametrize("features", [x for x in FEATURES if x != "continuous"])
def test_tokens_give_the_features_of_their_images(features):
    model, images = vision(features), pixels(2)
    tokens = model.tokenizer.encode(images)
    for kind in (torch.int64, torch.int32):
        assert model(tokens.to(kind)).last_hidden_state.equal(model(images).last_hidden_state)


def test_full_ends_with_last():
    tokenizer, images = image_tokenizer(), pixels(2)
    last = vision("last", tokenizer)(images).last_hidden_state
    full = vision("full", tokenizer)(images).last_hidden_state
    assert full[:, -last.shape[1] :].equal(last)


def test_a_tokenizer_with_one_scale():
    tokenizer = image_tokenizer(scales=(4,))
    last = vision("last", tokenizer)(pixels(2)).last_hidden_state
    for features in ("full", "residual"):
        assert torch.allclose(vision(features, tokenizer)(pixels(2)).last_hidden_state, last)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([3, 5, 7]), st.sampled_from(["last", "semantic", "continuous"]))
def test_a_window_and_a_linear_layer_are_a_convolution(window, features):
    tokenizer, images = image_tokenizer(), pixels(2)
    plain, wide = vision(features, tokenizer), vision(features, tokenizer, window=window)
    channels = plain.config.hidden_size
    assert wide.config.hidden_size == channels * window**2
    weight = torch.randn(7, channels, window, window, generator=torch.Generator().manual_seed(0))
    maps = plain(images).last_hidden_state.transpose(1, 2).unflatten(2, (4, 4))
    convolved = rows(F.conv2d(maps, weight, padding=window // 2))
    linear = F.linear(wide(images).last_hidden_state, weight.flatten(1))
    assert torch.allclose(linear, convolved, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_keeps_the_tokens(tmp_path, dtype):
    model, images = vision(), pixels(4)
    with torch.no_grad():  # running statistics are in the file; counts of a run are not
        model.tokenizer.quantizer.usage_ema.uniform_()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(loaded, TokenFlowVisionModel)
    assert {p.dtype for p in loaded.tokenizer.parameters()} == {torch.float32}
    for name, value in model.tokenizer.state_dict().items():
        assert loaded.tokenizer.state_dict()[name].equal(value), name
    assert loaded.tokenizer.quantizer.window_hits.eq(0).all()
    output = loaded(images).last_hidden_state
    assert output.dtype == dtype
    assert output.equal(model(images).last_hidden_state.to(dtype))
    saved = AutoConfig.from_pretrained(tmp_path, dtype=dtype)
    assert saved.to_dict() == loaded.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_the_whole_model_do_not_reach_the_tokens(dtype):
    model, images = vision(), pixels(4)
    weights = {k: v.clone() for k, v in model.tokenizer.state_dict().items()}
    before = model(images).last_hidden_state
    with torch.autocast("cpu", dtype):
        assert model(images).last_hidden_state.equal(before)
    torch.nn.ModuleList([model]).to(dtype)  # as a part of something larger
    output = model(images).last_hidden_state
    assert output.dtype == dtype
    assert output.equal(before.to(dtype))
    assert all(v.equal(weights[k]) for k, v in model.tokenizer.state_dict().items())
    model.float()
    assert model(images).last_hidden_state.equal(before)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_releases_half_precision(name):
    model, images = vision(tokenizer_dtype=name), pixels(2)
    output = model(images).last_hidden_state
    assert output.dtype == torch.float32
    assert {p.dtype for p in model.tokenizer.parameters()} == {getattr(torch, name)}
    assert output.isfinite().all()


def test_it_is_frozen():
    model = vision().train()
    assert not model.tokenizer.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(pixels(1)).last_hidden_state.requires_grad


@pytest.mark.parametrize("preset", ["tiny", "B", "B-256", "L", "XL"])
def test_configurations_survive_json(tmp_path, preset):
    for features in FEATURES:
        config = TokenFlowVisionConfig(TokenizerConfig.preset(preset), features)
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(again, TokenFlowVisionConfig)
        assert again.tokenizer_config == TokenizerConfig.preset(preset)
        assert (again.features, again.hidden_size) == (features, config.hidden_size)
    assert TokenFlowVisionConfig(TokenizerConfig.preset("XL")).visual_tokens == 729


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "first"}, "features must be one of last, full"),
        ({"window": 2}, "window must be one of"),
        ({"features": "full", "window": 3}, "window must be 1 for features 'full'"),
        ({"tokenizer_dtype": "int8"}, "tokenizer_dtype must be one of"),
        ({"hidden_size": 5}, "hidden_size must be 14"),
        ({"image_size": 99}, "image_size must be 16"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenFlowVisionConfig(image_tokenizer().config, **options)


def test_semantic_features_need_a_semantic_branch():
    config = TokenizerConfig.from_dict(
        {
            "image_size": 16,
            "semantic": {"tower": {"kind": "none"}},
            "teacher": {"kind": "none"},
            "quantizer": {"codebook_size": 8, "scales": [1]},
        }
    )
    with pytest.raises(ConfigError, match="semantic branch"):
        TokenFlowVisionConfig(config, "semantic")


def test_another_tokenizer_is_refused():
    config = TokenFlowVisionConfig(image_tokenizer().config)
    with pytest.raises(ConfigError, match="not the one that the configuration describes"):
        TokenFlowVisionModel(config, image_tokenizer(codes=12))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(2, 3, 20, 20), r"images \[B, 3, 16, 16\]"),
        (torch.rand(2, 1, 16, 16), r"images \[B, 3, 16, 16\]"),
        (torch.rand(2, 30), r"images \[B, 3, 16, 16\] or tokens"),
        (torch.zeros(2, 29, dtype=torch.int64), r"tokens must be \[B, 30\]"),
        (torch.full((1, 30), 48), "48"),
    ],
)
def test_bad_pixels(given, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        vision()(given)


def test_options_of_other_parts_are_taken_and_others_refused():
    model, images = vision(), pixels(1)
    want = model(images).last_hidden_state
    assert model(images, use_cache=False, position_ids=None).last_hidden_state.equal(want)
    with pytest.raises(TypeError, match="unexpected keyword argument 'image_sizes'"):
        model(images, image_sizes=None)


def test_continuous_features_are_not_in_tokens():
    with pytest.raises(ValueError, match="tokens do not hold them"):
        vision("continuous")(torch.zeros(1, 30, dtype=torch.int64))


# -- registration ---------------------------------------------------------------------------------

FOUND = (
    "from transformers import AutoConfig, AutoImageProcessor, AutoModel\n"
    "config = AutoConfig.for_model('tokenflow_vision')\n"
    "from transformers.models.auto.modeling_auto import MODEL_MAPPING\n"
    "from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING\n"
    "assert type(config) in MODEL_MAPPING and type(config) in IMAGE_PROCESSOR_MAPPING\n"
    "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING\n"
    "text = type(AutoConfig.for_model('tokenflow_text'))\n"
    "assert text in MODEL_MAPPING and text in MODEL_FOR_CAUSAL_LM_MAPPING\n"
    "print(type(config).__module__)\n"
)


# Each takes a process and seconds: beside other versions of transformers, two say enough.
_MORE_STARTS = [
    "import transformers\nimport tokenflow_ext.models\n",
    "import tokenflow_ext.models\nimport importlib.util\n"
    "assert importlib.util.find_spec('transformers')\n",
    "from tokenflow_ext.models.understanding.pixels import TokenFlowImageProcessor\n",
    "from tokenflow_ext.models.unified.language_model import TokenFlowForCausalLM\n",
]


@pytest.mark.parametrize(
    "start",
    [
        "import tokenflow_ext.models\n",
        "from tokenflow_ext.models.understanding.vision import TokenFlowVisionModel\n",
        *(pytest.param(start, marks=pytest.mark.once) for start in _MORE_STARTS),
    ],
)
def test_it_is_known_once_both_packages_are_imported(start):
    found = subprocess.run(
        [sys.executable, "-c", start + FOUND], capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == "tokenflow_ext.models.understanding.vision"


def test_importing_models_does_not_import_transformers():
    code = "import sys, tokenflow_ext.models; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_image_processor_is_found(tmp_path):
    TokenFlowImageProcessor(24, do_pad=False).save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(found, TokenFlowImageProcessor)
    assert (found.size, found.do_pad) == ({"height": 24, "width": 24}, False)
