"""Language models and text tokenizers from folders of any make: whole, or refused in one line;
nothing of theirs is run, nothing is fetched."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenflow_ext.models import CheckpointError, ConfigError, WeightsError
from tokenflow_ext.train.tasks import language

# What a folder's own code would be: importing it leaves a file.
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Text
"""


@pytest.fixture(autouse=True)
def network(monkeypatch) -> list:
    """The addresses that were asked for: none of them answers."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder: Path, edit) -> None:
    """The weights file after ``edit(weights)``."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return language.load_language_model(folder)[0].state_dict()


@pytest.mark.parametrize("place", ["evil", "somebody/evil--evil"])
def test_no_code_of_the_folder_is_run(backbone, tmp_path, network, place):
    marker = tmp_path / "ran"
    expected = weights_of(backbone)
    (backbone / "evil.py").write_text(CODE.format(marker=str(marker)))
    change(
        backbone / "config.json",
        auto_map={"AutoConfig": f"{place}.Config", "AutoModelForCausalLM": f"{place}.Model"},
        attn_implementation="somebody/kernels",
        _attn_implementation="somebody/kernels",
    )
    change(backbone / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{place}.Text"]})
    for key, value in weights_of(backbone).items():
        assert torch.equal(value, expected[key])
    change(backbone / "tokenizer_config.json", tokenizer_class="Text")
    with pytest.raises(
        WeightsError, match=r"the text tokenizer of .*code of its own, which is not run"
    ):
        language.load_language_model(backbone)
    change(backbone / "config.json", model_type="evil")
    with pytest.raises(ConfigError, match="model_type must be one of llama, qwen2, qwen3, got 'ev"):
        language.load_language_model(backbone)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(backbone, checkpoint / language.TEXT_FOLDER)
    with pytest.raises(CheckpointError, match="code of its own, which is not run"):
        language.load_text_tokenizer(checkpoint)
    assert not marker.exists()
    assert network == []


def test_no_pickle_is_run(backbone, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (backbone / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, backbone / "pytorch_model.bin")
    with pytest.raises(
        WeightsError,
        match=r"cannot load .*: it holds objects other than tensors and plain containers$",
    ):
        language.load_language_model(backbone)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["torch", "tied", "without a prefix"])
def test_other_forms_of_the_same_weights(backbone, form):
    expected = weights_of(backbone)
    file = backbone / "model.safetensors"
    if form == "torch":
        torch.save(load_file(file), backbone / "pytorch_model.bin")
        file.unlink()
    else:
        change(backbone / "config.json", tie_word_embeddings=True)
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        rewrite(backbone, lambda weights: weights.pop("lm_head.weight"))
    if form == "without a prefix":
        rewrite(
            backbone,
            lambda weights: [
                weights.update({key.removeprefix("model."): weights.pop(key)})
                for key in list(weights)
            ],
        )
    found = weights_of(backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weights_that_are_missing(backbone):
    """Of a model that would train from random numbers in their place."""

    def refused(message):
        with pytest.raises(WeightsError, match=message) as caught:
            language.load_language_model(backbone)
        assert "\n" not in str(caught.value)

    whole = load_file(backbone / "model.safetensors")
    rewrite(backbone, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    refused(r"has 11 of the 12 weights .*: model\.layers\.0\.mlp\.up_proj\.weight$")
    save_file({"other": torch.zeros(2)}, backbone / "model.safetensors", {"format": "pt"})
    refused(r"has 0 of the 12 weights of its model; missing .*lm_head\.weight.*, and 7 more$")
    save_file(whole, backbone / "model.safetensors", {"format": "pt"})
    change(backbone / "config.json", num_hidden_layers=2)
    refused(r"has 12 of the 21 weights .*model\.layers\.1\.input_layernorm\.weight")
    change(backbone / "config.json", num_hidden_layers=1, intermediate_size=50)
    refused(r"has 9 of the 12 weights .*another shape: model\.layers\.0\.mlp\.down_proj\.weight")
    for name, value in (("vocab_size", 10**9), ("num_hidden_layers", 2**30)):
        change(backbone / "config.json", intermediate_size=48, **{name: value})
        refused(r"asks for [\d,]{11,} weights, its files can hold no more than")


def test_weights_that_are_not_finite(backbone):
    rewrite(backbone, lambda weights: weights["model.norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(WeightsError, match=r"not finite, first in model\.norm\.weight"):
        language.load_language_model(backbone)


@pytest.mark.parametrize("way", ["../other.safetensors", "/etc/other.safetensors", 3])
def test_nothing_outside_the_folder_is_read(backbone, tmp_path, way):
    file = backbone / "model.safetensors"
    names = list(load_file(file))
    file.rename(tmp_path / "other.safetensors")
    index = backbone / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, way)}))
    with pytest.raises(WeightsError, match=r"not below|must name files below"):
        language.load_language_model(backbone)
    index.unlink()
    change(backbone / "tokenizer_config.json", tokenizer_file=way)
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json (names|must name)"):
        language.load_language_model(backbone)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_pipes_are_not_waited_for(backbone, name):
    (backbone / name).unlink()
    os.mkfifo(backbone / name)
    with pytest.raises(WeightsError, match=f"{name} is no file but a pipe"):
        language.load_language_model(backbone)


def test_weights_too_many_are_told(backbone, capsys):
    rewrite(backbone, lambda weights: weights.update({"score.weight": torch.zeros(2, 2)}))
    language.load_language_model(backbone)
    assert "1 weights are not the model's, not used: score.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[" * 100_000, r"config\.json is nested too deeply"),
        ("config.json", "[]", r"model_type must be one of llama, qwen2, qwen3, got None"),
        ("config.json", {"hidden_size": "x"}, r"config\.json: hidden_size must be int, got 'x'"),
        ("config.json", {"vocab_size": 2.5}, r"config\.json: vocab_size must be int, got 2\.5"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ("config.json", {"mlp_bias": "no"}, "mlp_bias must be bool, got 'no'"),
        ("config.json", {"rms_norm_eps": [1]}, "rms_norm_eps must be float"),
        ("config.json", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type must be one of"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised .*'gptq'"),
        ("adapter_config.json", "{}", "holds an adapter of another model: merge the two"),
        ("model.safetensors.index.json", "[]", "is no index: it must have a weight_map"),
        ("tokenizer_config.json", "[]", "must hold a mapping, got list"),
        ("tokenizer.json", "{}", "cannot load the text tokenizer of"),
        ("tokenizer.json", None, r"holds no text tokenizer: none of tokenizer\.json, "),
        ("model.safetensors", "x" * 50, "cannot load"),
        ("model.safetensors", None, "no file named model.safetensors"),
    ],
)
def test_damaged_folders(backbone, file, content, message):
    if content is None:
        (backbone / file).unlink()
    elif isinstance(content, dict):
        change(backbone / file, **content)
    else:
        (backbone / file).write_text(content)
    with pytest.raises((WeightsError, ConfigError), match=message) as caught:
        language.load_language_model(backbone)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_gguf_file_says_what_it_needs(tmp_path, monkeypatch):
    find = language.importlib.util.find_spec
    monkeypatch.setattr(
        language.importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n)
    )
    with pytest.raises(WeightsError, match=r"needs gguf.*pip install 'tokenflow_ext\[gguf\]'"):
        language.load_language_model(tmp_path / "a.gguf")
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda n: True)
    with pytest.raises(WeightsError, match=r"a\.gguf is missing"):
        language.load_language_model(tmp_path / "a.gguf")
