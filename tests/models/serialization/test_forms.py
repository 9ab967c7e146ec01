"""Every form of weights, by every model's from_pretrained: the same numbers come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
import var_models
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from tokenflow_ext.models import VAR, CheckpointError, TextToImage, TokenFlowTokenizer

PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
MODELS = {
    "tokenizer": (TokenFlowTokenizer, tiny_models.image_tokenizer),
    "text to image": (TextToImage, lambda: tiny_models.build(dtype=torch.float32)),
    "VAR": (VAR, lambda: var_models.build(torch.float32)),
}


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """(its class, a saved folder, its state dict)"""
    kind, build = MODELS[request.param]
    torch.manual_seed(0)
    folder = build().save_pretrained(tmp_path / "saved")
    state = load_file(folder / "model.safetensors")
    # Earlier versions of safetensors map the file, which tests write over.
    return kind, folder, {key: value.clone() for key, value in state.items()}


def cast(state, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def check(kind, place, state, **options):
    """What is read is the state dict; of a tokenizer as float32."""
    found = kind.from_pretrained(place, **options).state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        if kind is TokenFlowTokenizer and value.is_floating_point():
            value = value.float()
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case, dtype):
    kind, folder, state = case
    half = cast(state, dtype)
    save_file(half, folder / "model.safetensors")
    check(kind, folder, half)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(case, prefix):
    kind, folder, state = case
    save_file({prefix + key: value for key, value in state.items()}, folder / "model.safetensors")
    check(kind, folder, state)


def test_several_files(case):
    kind, folder, state = case
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(state, folder, max_shard_size="30KB")
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    check(kind, folder, state)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} is missing"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("container", [None, "ema", "model", "state_dict"])
def test_containers(case, container):
    kind, folder, state = case
    (folder / "model.safetensors").unlink()
    wrapped = {f"module.{key}": value for key, value in cast(state, torch.float16).items()}
    content = wrapped if container is None else {"optimizer": {"lr": 1.0}, container: wrapped}
    torch.save(content, folder / "pytorch_model.bin")
    check(kind, folder, cast(state, torch.float16))


def test_objects_in_a_torch_file_are_not_made(case):
    kind, folder, state = case
    (folder / "model.safetensors").unlink()
    torch.save({"model": state, "more": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["ema", "model", "state_dict"])
def test_original_files(tmp_path, prefix, container):
    """Of VAR and its tokenizer; TokenFlow's differ in names alone."""
    model = var_models.build(torch.float32)
    form = {
        "tokenizer": model.tokenizer.save_original(tmp_path / "vae.pth"),
        "model": model.save_released(tmp_path / "var.pth"),
    }
    for file in form.values():
        content = torch.load(file, weights_only=True)
        content = content.get("model", content)
        half = cast(content, torch.bfloat16)
        torch.save({container: {prefix + k: v for k, v in half.items()}}, file)
    own = cast(model.tokenizer.state_dict(), torch.bfloat16)
    own |= {
        key: torch.zeros_like(value)
        for key, value in own.items()
        if key in ("quantizer.usage_ema", "quantizer.codebook_sums")
    }
    check(TokenFlowTokenizer, form["tokenizer"], own, config=model.tokenizer.config)
    expected = cast(model.state_dict(), torch.bfloat16)
    check(VAR, form["model"], expected, tokenizer=var_models.var_tokenizer())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_original_text_to_image(tmp_path, prefix):
    state, config = tiny_models.tiny_original()
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    half = cast(state, torch.float16)
    named = {prefix + key: value for key, value in half.items()}
    save_torch_state_dict(named, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check(TextToImage, tmp_path, half, tokenizer=tiny_models.image_tokenizer())
