"""The released understanding models: read, checked by name, written back to the same tensors."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import hub_server
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers import LlamaForCausalLM as Llama
from understanding_models import text_tokenizer

from tokenflow_ext.models import (
    CheckpointError,
    ConfigError,
    TokenFlowTokenizer,
    TokenizerConfig,
    build_processor,
    load_released_understanding,
    save_released_understanding,
)
from tokenflow_ext.models.tokenizer import original_checkpoint
from tokenflow_ext.models.understanding.original_checkpoint import (
    TOWER,
    to_released_understanding,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
FAMILIES = {"llava_llama": (LlamaConfig, Llama), "llava_qwen": (Qwen2Config, Qwen2ForCausalLM)}


def projector(hidden, device=None):
    generator = None if device else torch.Generator().manual_seed(4)
    shapes = {"0.weight": (hidden, 40), "0.bias": (hidden,)}
    shapes |= {"2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {
        f"model.mm_projector.{name}": 0.2 * torch.randn(size, generator=generator, device=device)
        for name, size in shapes.items()
    }


def release(kind, rows=300, preset="B", dtype=torch.float32):
    """(state dict, configuration) in the released layout, random weights."""
    torch.manual_seed(0)
    config = FAMILIES[kind][0](vocab_size=rows, **SHAPE)
    tokenizer = TokenFlowTokenizer(TokenizerConfig.preset(preset))
    tower = original_checkpoint.to_original(tokenizer.state_dict(), tokenizer.config, {})
    state = FAMILIES[kind][1](config).state_dict() | projector(32)
    state |= {TOWER + key: value for key, value in tower.items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, config


_FULL_SIZE = TokenizerConfig.preset


def smaller_preset(name):
    """A preset, B's with fewer channels and layers: its full size is 695 MB a file."""
    config = _FULL_SIZE(name)
    if name != "B":
        return config
    few = {"width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
    tower, decoder = (
        replace(config.semantic.tower, **few),
        {"decoder_width": 64, "decoder_heads": 2},
    )
    return replace(
        config,
        pixel=replace(config.pixel, channels=16, z_channels=32, groups=8),
        semantic=replace(config.semantic, tower=tower, **decoder),
        teacher=replace(config.teacher, **few, projection=32),
    )


@pytest.fixture(scope="module", autouse=True)
def sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerConfig, "preset", smaller_preset)
        yield


@pytest.fixture(scope="module")
def qwen(sizes):
    return release("llava_qwen")


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert value.equal(other[key]), key


def inputs(model, count=2):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, 224, 224, generator=generator) * 2 - 1
    ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 196, 7, 8]] * count)
    return {"input_ids": ids, "pixel_values": images}


@torch.no_grad()
def test_forward_is_that_of_the_parts(qwen):
    state, config = qwen
    model = load_released_understanding(state, config)
    given = inputs(model, 1)
    language = Qwen2ForCausalLM(config).eval()
    language.load_state_dict({k: v for k, v in state.items() if k in language.state_dict()})
    tower = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    tokenizer = TokenFlowTokenizer.from_original(tower)
    f_hat = tokenizer.quantizer.decode(tokenizer.encode(given["pixel_values"]))
    rows = f_hat.flatten(2).transpose(1, 2)
    part = "model.mm_projector."
    rows = rows @ state[part + "0.weight"].T + state[part + "0.bias"]
    rows = torch.nn.functional.gelu(rows) @ state[part + "2.weight"].T + state[part + "2.bias"]
    text = language.get_input_embeddings()
    ids = given["input_ids"]
    embeddings = torch.cat([text(ids[:, :2]), rows, text(ids[:, -2:])], 1)
    want = language(inputs_embeds=embeddings).logits
    assert torch.allclose(model(**given).logits[..., :300], want, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [pytest.param("llava_llama", marks=pytest.mark.once), "llava_qwen"]
)
def test_there_and_back(tmp_path, monkeypatch, kind):
    if kind == "llava_qwen":
        monkeypatch.setattr(TokenizerConfig, "preset", _FULL_SIZE)
    state, config = release(kind)
    model = load_released_understanding(state, config)
    same(to_released_understanding(model), state)
    # By a folder of the release, in several files.
    size = "100MB" if kind == "llava_qwen" else "1MB"
    save_released_understanding(model, tmp_path / "released", max_shard_size=size)
    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 1
    again = load_released_understanding(tmp_path / "released")
    same(to_released_understanding(again), state)
    # By transformers' form.
    model.save_pretrained(tmp_path / "transformers")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "transformers")
    same(to_released_understanding(loaded), state)
    given = inputs(model, 1)
    logits = model(**given).logits
    assert again(**given).logits.equal(logits)
    assert loaded(**given).logits.equal(logits)


@pytest.mark.parametrize(
    "form",
    ["safetensors", "torch", pytest.param("container", marks=pytest.mark.once)],
)
def test_files_and_the_original_header(tmp_path, qwen, form):
    state, config = qwen
    header = {
        **config.to_diff_dict(),
        "model_type": "llava_qwen",
        "vocab_size": 300,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "tokenflow",
        "image_aspect_ratio": "pad",
    }
    (tmp_path / "config.json").write_text(json.dumps(header))
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if form == "container" else state, file)
    for source in (tmp_path, file):
        model = load_released_understanding(source)
        assert not hasattr(model.config.text_config, "mm_vision_tower")
    same(to_released_understanding(model), state)
    save_released_understanding(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == header


@pytest.mark.once
def test_from_the_hub_in_several_files_and_half(tmp_path, monkeypatch, qwen):
    """By the names of a wrapped model."""
    state, config = qwen
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    named = {f"_orig_mod.module.{key}": value for key, value in half.items()}
    save_torch_state_dict(named, folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config.to_json_file(folder / "config.json")
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repository("some/released", folder, private=True).commit({"notes.bin": b"no"})
        options = {"cache_dir": tmp_path / "cache", "token": "hf_reader"}
        model = load_released_understanding("some/released", **options)
        assert "notes.bin" not in hub.downloads()
        with pytest.raises(CheckpointError, match="no revision gone"):
            load_released_understanding("some/released", revision="gone", **options)
    same(load_released_understanding(half, config).state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match="token is for models on the hub"):
        load_released_understanding(half, config, token="hf_reader")


@pytest.mark.once
def test_stored_in_half_precision():
    state, config = release("llava_qwen", dtype=torch.bfloat16)
    model = load_released_understanding(state, config)
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}
    assert model(**inputs(model, 1)).logits.dtype == torch.bfloat16
    same(to_released_understanding(model), state)


@pytest.mark.once
def test_half_precision_as_the_release_runs_it(qwen):
    state, config = qwen
    model = load_released_understanding(state, config, dtype=torch.bfloat16)
    images = inputs(model, 1)["pixel_values"]
    exact = load_released_understanding(state, config)
    tokens = [m.model.vision_tower.encode(images) for m in (model, exact)]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tokens[0].shape == tokens[1].shape
    assert not tokens[0].equal(tokens[1])  # of random weights, many differ


def test_the_text_tokenizers_free_row_is_used(tmp_path):
    text = text_tokenizer()
    state, config = release("llava_qwen", rows=len(text) + 5)
    model = load_released_understanding(state, config, text_tokenizer=text)
    assert model.config.image_token_id == len(text)
    assert model.config.text_config.vocab_size == len(text) + 5
    build_processor(model, text)
    same(to_released_understanding(model), state)
    save_released_understanding(model, tmp_path)
    text.save_pretrained(tmp_path)
    found = load_released_understanding(tmp_path)
    build_processor(found, AutoTokenizer.from_pretrained(tmp_path))


def test_qwen_14b_with_xl_on_meta():
    """The release's own sizes: every name and shape, without memory."""
    config = Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        max_position_embeddings=32768,
    )
    with torch.device("meta"):
        language = Qwen2ForCausalLM(config)
        tokenizer = TokenFlowTokenizer(TokenizerConfig.preset("XL"))
    shapes = original_checkpoint.unused_shapes(tokenizer.config)
    unused = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tower = original_checkpoint.to_original(tokenizer.state_dict(), tokenizer.config, unused)
    state = language.state_dict() | projector(5120, "meta")
    state |= {TOWER + key: value.to("meta") for key, value in tower.items()}
    started = time.monotonic()
    model = load_released_understanding(state, config)
    back = to_released_understanding(model)
    assert time.monotonic() - started < 60
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert model.config.image_seq_length == 729
    assert sum(value.numel() for value in language.state_dict().values()) > 14e9


# -- refused --------------------------------------------------------------------------------------


def changed(state, **changes):
    state = dict(state)
    for key, value in changes.items():
        name = {
            "projector": "model.mm_projector.0.weight",
            "embeddings": "model.embed_tokens.weight",
            "layer": "model.layers.1.mlp.up_proj.weight",
            "codes": TOWER + "quantize.embedding_vqgan.weight",
            "stranger": "model.stranger",
            "tower_stranger": TOWER + "stranger",
        }[key]
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": None}, "missing.*linear_1.weight"),
        ({"projector": torch.zeros(32, 41)}, r"linear_1.weight is \(32, 41\), not \(32, 40\)"),
        ({"embeddings": None}, "has no model.embed_tokens.weight"),
        ({"layer": torch.zeros(48, 31)}, "up_proj.weight"),
        ({"codes": None}, "embedding_vqgan"),
        ({"stranger": torch.zeros(3)}, "unknown.*stranger"),
        ({"tower_stranger": torch.zeros(3)}, "unknown.*stranger"),
        ({"layer": torch.zeros(48, 32).half()}, "one floating-point type"),
    ],
)
def test_every_name_is_used_or_refused(qwen, changes, message):
    state, config = qwen
    with pytest.raises(CheckpointError, match=message):
        load_released_understanding(changed(state, **changes), config)


def test_no_tokenizer_inside(qwen):
    state, config = qwen
    rest = {key: value for key, value in state.items() if not key.startswith(TOWER)}
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_released_understanding(rest, config)


def test_a_state_dict_needs_a_configuration(qwen):
    with pytest.raises(ConfigError, match="language_config must be given"):
        load_released_understanding(qwen[0])


def test_configurations_that_do_not_fit(tmp_path, qwen):
    state, config = qwen
    other = Qwen2Config(**{**config.to_dict(), "vocab_size": 299})
    with pytest.raises(ConfigError, match=r"vocab_size is 299.*has 300"):
        load_released_understanding(state, other)
    more = Qwen2Config(**{**config.to_dict(), "num_hidden_layers": 3, "layer_types": None})
    with pytest.raises(CheckpointError, match="missing"):
        load_released_understanding(state, more)
    with pytest.raises(ConfigError, match="dtype must be one of"):
        load_released_understanding(state, config, dtype=torch.float64)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json is missing: give language_config"):
        load_released_understanding(tmp_path)
    for header, message in (
        ({"model_type": "bert"}, "model_type must name one of"),
        ({"model_type": "llava_qwen", "mm_projector_type": "linear"}, "mm_projector_type must be"),
        ({"model_type": "llava_qwen", "mm_use_im_start_end": True}, "mm_use_im_start_end must be"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(header))
        with pytest.raises(ConfigError, match=message):
            load_released_understanding(tmp_path)


@pytest.mark.once
def test_nothing_is_written_over(tmp_path, qwen):
    model = load_released_understanding(*qwen)
    save_released_understanding(model, tmp_path)
    with pytest.raises(RuntimeError, match="is there already"):
        save_released_understanding(model, tmp_path)
    save_released_understanding(model, tmp_path, overwrite=True)


def test_models_without_a_released_form(tmp_path):
    from understanding_models import understanding

    model, _ = understanding(window=3)
    with pytest.raises(ConfigError, match="window 1"):
        save_released_understanding(model, tmp_path)
