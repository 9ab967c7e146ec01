"""Text to image in the form of the original checkpoints: their names, folders and configuration."""

import json
import math

import pytest
import torch
from safetensors.torch import load, save_file
from tiny_models import (
    CODES,
    TINY,
    WORDS,
    build,
    image_tokenizer,
    llama_config,
    original_shapes,
    pictures,
    prompts,
    tiny_original,
)

from tokenflow_ext.models import (
    CheckpointError,
    ConfigError,
    TextToImage,
    TokenFlowTokenizer,
    TokenizerConfig,
)
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.text_to_image.rope import RopeConfig


def test_original_keys_of_llama_2_7b():
    with torch.device("meta"):
        tokenizer = TokenFlowTokenizer(TokenizerConfig.preset("B-256"))
    scales = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    shapes = original_shapes(64769, 4096, 11008, 32, 32, 40, scales)
    state = {
        key: torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for key, shape in shapes.items()
    }
    buffers = {"image_token_start": torch.tensor(32000), "image_token_end": torch.tensor(64767)}
    model = TextToImage.from_original(
        {**state, **buffers}, llama_config(vocab_size=64769), tokenizer
    )
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    back = model.to_original()
    assert back.keys() == {*shapes, *buffers}
    assert all(back[key] is value for key, value in buffers.items())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.config.text_vocab_size == 32000
    assert model.config.pad_id == 64768
    assert model.config.backbone.num_key_value_heads == 32


def test_original_weights_keep_their_values():
    state, config = tiny_original()
    tokenizer = image_tokenizer()
    model = TextToImage.from_original(state, config, tokenizer)
    assert not model.training
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in state)
    # The buffers that are not in the weights are right too: as in a model built in place.
    built = TextToImage(model.config, tokenizer).eval()
    built.load_state_dict(state)
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    assert torch.equal(model(ids, indices).logits, built(ids, indices).logits)


def equal(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


# What the release's config.json holds besides a Llama's own entries.
HEADER = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_vq_type": "TOKEN_FLOW",
    "mm_use_vq_token": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "vocab_size": WORDS + CODES + 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
RANGE = {
    "image_token_start": torch.tensor(WORDS),
    "image_token_end": torch.tensor(WORDS + CODES - 1),
}


def released_folder(folder, state, files):
    """A folder as transformers leaves it, by hand: weights in one file or dealt out to several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HEADER))
    if files == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    places = {key: names[i % files] for i, key in enumerate(state)}
    for name in names:
        part = {key: value for key, value in state.items() if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("files", [1, 3])
def test_released_folders_there_and_back(tmp_path, files):
    from transformers import LlamaForCausalLM

    state, _ = tiny_original()
    state = {key: value.bfloat16() for key, value in state.items()} | RANGE
    folder = released_folder(tmp_path / "released", state, files)
    model = TextToImage.from_original(folder, None, image_tokenizer())
    equal(model.to_original(), state)
    assert model.config.text_vocab_size == WORDS
    assert model.config.backbone.rope_theta == 10000.0

    written = model.save_original(tmp_path / "again", max_shard_size="20KB" if files > 1 else "5GB")
    assert (written / "model.safetensors").is_file() == (files == 1)
    assert (written / "model.safetensors.index.json").is_file() == (files > 1)
    assert json.loads((written / "config.json").read_text()) == HEADER
    again = TextToImage.from_original(written, None, image_tokenizer())
    equal(again.to_original(), state)
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    with pytest.raises(OutputError, match="nothing is written over it"):
        again.save_original(written)
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before
    again.save_original(written, overwrite=True)  # in other shards: none of the old are left
    equal(TextToImage.from_original(written, None, image_tokenizer()).to_original(), state)
    names = {"config.json", "model.safetensors"}
    assert {file.name for file in written.iterdir()} == names

    # The library finds a Llama in it, for the weights that a Llama has.
    llama = LlamaForCausalLM.from_pretrained(written, config=llama_config(**shape_of(HEADER)))
    for key, value in llama.state_dict().items():
        assert torch.equal(value.bfloat16(), state[key]), key


@pytest.mark.parametrize("files", [1, 2])
def test_released_folders_of_torch_files(tmp_path, files):
    state, _ = tiny_original()
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    if files == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        places = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(state)}
        for name in set(places.values()):
            part = {key: value for key, value in state.items() if places[key] == name}
            torch.save(part, tmp_path / name)
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    model = TextToImage.from_original(tmp_path, None, image_tokenizer())
    equal(model.to_original(), state)


def shape_of(header):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: header[name] for name in (*names, "num_attention_heads")}


@pytest.mark.parametrize("container", ["ema", "model", "state_dict", None])
def test_released_text_to_image_in_one_torch_file(tmp_path, container):
    state, config = tiny_original()
    named = {f"module.{key}": value for key, value in (state | RANGE).items()}
    torch.save({container: named, "steps": 3} if container else named, tmp_path / "weights.pt")
    model = TextToImage.from_original(tmp_path / "weights.pt", config, image_tokenizer())
    equal(model.to_original(), state | RANGE)
    with pytest.raises(CheckpointError, match=r"config\.json is missing: give llama_config"):
        TextToImage.from_original(tmp_path / "weights.pt", None, image_tokenizer())
    (tmp_path / "config.json").write_text(json.dumps(HEADER))
    beside = TextToImage.from_original(tmp_path / "weights.pt", None, image_tokenizer())
    assert beside.config == model.config


def test_a_model_trained_here_is_released(tmp_path):
    model = build(dtype=torch.float32)
    assert model.unused_tensors == {}
    folder = model.save_original(tmp_path / "released")
    again = TextToImage.from_original(folder, None, model.tokenizer)
    equal(again.state_dict(), model.state_dict())
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    assert torch.equal(again(ids, indices).logits, model(ids, indices).logits)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 10000.0
    other = build("qwen3", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"family 'llama', this one is 'qwen3'"):
        other.save_original(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_original_model_with_one_weight_for_embeddings_and_head(tmp_path):
    """It becomes two, which training does not confuse; what is written says so."""
    state, _ = tiny_original()
    embeddings = state["model.embed_tokens.weight"]
    del state["lm_head.weight"]
    folder = released_folder(tmp_path / "released", state, 1)
    with pytest.raises(CheckpointError, match=r"1 missing.*lm_head\.weight"):
        TextToImage.from_original(folder, None, image_tokenizer())
    (folder / "config.json").write_text(json.dumps(HEADER | {"tie_word_embeddings": True}))
    model = TextToImage.from_original(folder, None, image_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    written = model.save_original(tmp_path / "again")
    again = TextToImage.from_original(written, None, image_tokenizer())
    equal(again.state_dict(), model.state_dict())
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False


def test_scaled_rope_is_saved_and_released(tmp_path):
    scaled = RopeConfig(
        "longrope",
        short_factor=(1.0, 1.5, 2.0, 2.5),
        long_factor=(2.0, 3.0, 4.0, 5.0),
        original_max_position_embeddings=20,
    )
    model = build(dtype=torch.float32, rope=scaled, rope_theta=500.0)
    ids, indices = prompts(model, [9, 5]), pictures(model, 2)
    logits = model(ids, indices).logits
    for name, read in (
        ("saved", TextToImage.from_pretrained),
        ("released", lambda folder: TextToImage.from_original(folder, None, model.tokenizer)),
    ):
        (model.save_pretrained if name == "saved" else model.save_original)(tmp_path / name)
        again = read(tmp_path / name)
        assert again.config.backbone.rope == scaled
        assert torch.equal(again(ids, indices).logits, logits)
    # Where transformers 4 looks for it.
    header = json.loads((tmp_path / "released" / "config.json").read_text())
    assert header["rope_theta"] == 500.0
    assert header["rope_scaling"]["type"] == "longrope"
    plain = build(dtype=torch.float32, rope_theta=500.0)
    assert not torch.allclose(plain(ids, indices).logits, logits, atol=1e-3)


def test_damaged_released_folders(tmp_path):
    state, config = tiny_original()
    tokenizer = image_tokenizer()
    folder = released_folder(tmp_path / "released", state, 2)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    key = "lm_head.weight"

    def refused(message, error=CheckpointError):
        with pytest.raises(error, match=message):
            TextToImage.from_original(folder, None, tokenizer)

    places = {k: v for k, v in whole["weight_map"].items() if k != key}
    index.write_text(json.dumps({"weight_map": places}))
    refused(r"the index of .* does not say that .*\.safetensors has lm_head\.weight")
    places = whole["weight_map"] | {"stranger": whole["weight_map"][key]}
    index.write_text(json.dumps({"weight_map": places}))
    refused(r"has stranger, which it has not")
    index.write_text("{}")
    refused("is no index: it must have a weight_map")
    index.write_text(json.dumps(whole))
    (folder / "config.json").write_text(json.dumps(HEADER | {"hidden_size": "32"}))
    refused("hidden_size", ConfigError)
    (folder / "config.json").write_text(json.dumps(HEADER | {"vocab_size": None}))
    refused("vocab_size", ConfigError)
    (folder / "config.json").write_text(json.dumps(HEADER))
    first = folder / "model-00001-of-00002.safetensors"
    content = first.read_bytes()
    first.write_bytes(content[:-10])
    refused("00001-of-00002.safetensors is truncated")
    first.unlink()
    refused("00001-of-00002.safetensors is missing")
    part = load(content)
    name = next(iter(part))
    save_file({**part, name: torch.full_like(part[name], math.inf)}, first, {"format": "pt"})
    refused(f"numbers that are not finite, as in {name}")
    first.unlink()
    for place in ("../other.safetensors", str(tmp_path / "other.safetensors"), 3):
        index.write_text(json.dumps({"weight_map": {key: place}}))
        refused(r"which is not below|must name files below .*, got 3")
    index.write_text(json.dumps(whole))
    first.write_bytes(content)
    (folder / "config.json").write_text(json.dumps(HEADER | {"model_type": "mistral"}))
    refused("model_type must be one of llava_llama, llama, got 'mistral'", ConfigError)
    (folder / "config.json").write_text("[1]")
    refused(r"config\.json must hold a mapping, got list")
    (folder / "config.json").write_text("{")
    refused(r"config\.json is not JSON")
    index.unlink()
    refused("holds neither model.safetensors nor pytorch_model.bin, nor an index of either")
    with pytest.raises(CheckpointError, match=r"gone\.pt is missing"):
        TextToImage.from_original(tmp_path / "gone.pt", config, tokenizer)
    with pytest.raises(ConfigError, match="llama_config must be given for a state dict, got None"):
        TextToImage.from_original(state, None, tokenizer)


def test_original_weights_that_do_not_fit():
    state, config = tiny_original()
    tokenizer = image_tokenizer()

    def load(changes, **options):
        return TextToImage.from_original({**state, **changes}, config, tokenizer, **options)

    missing = {
        k: v for k, v in state.items() if k != "model.layers.1.self_attn.qknorm.key_norm.weight"
    }
    with pytest.raises(CheckpointError, match=r"1 missing.*layers.1.self_attn.qknorm.key_norm"):
        TextToImage.from_original(missing, config, tokenizer)
    with pytest.raises(CheckpointError, match=r"1 unknown \(model.extra\)"):
        load({"model.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"model.pos_1LC is \(3, 32\).*\(30, 32\)"):
        load({"model.pos_1LC": torch.zeros(3, 32)})
    with pytest.raises(CheckpointError, match="image_token_start is 49"):
        load({"image_token_start": torch.tensor(WORDS - 1)})
    load({"model.image_token_end": torch.tensor(WORDS + CODES - 1)})
    with pytest.raises(CheckpointError, match="has 2 layers, the configuration asks for 9"):
        TextToImage.from_original(state, llama_config(**TINY | {"num_hidden_layers": 9}), tokenizer)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is torch\.(bfloat16|float32)"):
        load({"lm_head.weight": state["lm_head.weight"].bfloat16()})
    whole = {key: value.to(torch.int8) for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"one floating-point type, .* is torch\.int8"):
        TextToImage.from_original(whole, config, tokenizer)
    config.vocab_size = CODES
    with pytest.raises(ConfigError, match="vocab_size must hold text"):
        TextToImage.from_original(state, config, tokenizer)
