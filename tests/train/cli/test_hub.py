"""Commands with a model on the hub, and the type of their arithmetic."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import hub_server
import pytest
import tiny_models
import torch
import var_models
from PIL import Image
from safetensors.torch import load_file
from understanding_models import picture, text_tokenizer, understanding

from tokenflow_ext.models import (
    CheckpointError,
    ConfigError,
    TextToImage,
    TextToImageConfig,
    TokenFlowTokenizer,
)
from tokenflow_ext.train.cli import commands, entry
from tokenflow_ext.train.cli.commands.reconstruct import reconstruct
from tokenflow_ext.train.data.image_files import read_square
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.precision import arithmetic, find_dtype
from tokenflow_ext.train.evaluation.analyse import names_of
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator


@pytest.fixture
def hub(monkeypatch, tmp_path, image_tokenizer):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.repository("some/tokenizer", image_tokenizer)
        yield server


def pictures(images: Path) -> list[str]:
    return sorted(str(path) for path in images.glob("*.png"))


def test_commands_take_hub_ids(hub, images, image_tokenizer, tmp_path, capsys):
    expected = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    file, folder = pictures(images)[0], str(images)
    for name, *more in (
        ("reconstruct", file),
        ("tokenize", folder),
        ("evaluate", "--data", folder),
        ("analyse", "--data", folder),
    ):
        out = ["--out", str(tmp_path / name), "--device", "cpu"]
        entry.main([name, *more, "--checkpoint", "some/tokenizer", *out])
    tokens = load_file(tmp_path / "reconstruct" / f"{Path(file).stem}.safetensors")["tokens"]
    square = read_square(Path(file), expected.config.image_size)
    assert torch.equal(tokens.long(), expected.encode(square[None]))
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert metrics["tokenizer"]["sha256"] == checkpoint.weights_digest(image_tokenizer)
    analysis = json.loads((tmp_path / "analyse" / "analysis.json").read_text())
    assert [each["name"] for each in analysis["tokenizers"]] == ["tokenizer"]
    assert hub.downloads().count("model.safetensors") == 1


def test_a_file_and_a_revision(hub, images, image_tokenizer, tmp_path):
    repository = hub.repositories["some/tokenizer"]
    first = repository.branches["main"]
    broken = {"model.safetensors": b"no", "vae.pth": b"no"}
    repository.commit(broken)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--checkpoint", "some/tokenizer"]
    for options, message in (
        ([], "model.safetensors is truncated or no safetensors"),
        (["--filename", "vae.pth"], "vae.pth cannot be read as a torch file"),
        (["--filename", "gone.pt"], "has no file gone.pt"),
        (["--revision", "gone"], "has no revision gone"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            entry.main(["reconstruct", pictures(images)[0], *out, *options])
    entry.main(["reconstruct", pictures(images)[0], *out, "--revision", first])
    local = ["--checkpoint", str(image_tokenizer), "--filename", "x"]
    with pytest.raises(SystemExit, match=r"^error: filename is for models on the hub, not for"):
        entry.main(["reconstruct", pictures(images)[0], *out[:4], *local])
    hub.status = 500
    with pytest.raises(SystemExit, match=r"^error: .*cannot be reached.*500"):
        entry.main(["reconstruct", pictures(images)[0], "--checkpoint", "some/other"])


def test_a_generator_on_the_hub(hub, tmp_path):
    model = var_models.build(torch.float32)
    model.push_to_hub("some/var", token="hf_writer")
    for dtype in ("float32", "bfloat16"):
        sheet = ["--sheet", str(tmp_path / f"{dtype}.png"), "--dtype", dtype, "--device", "cpu"]
        entry.main(["sample", "1", "--checkpoint", "some/var", "--seed", "5", *sheet])
        generator = ClassImageGenerator.load("some/var", "cpu", dtype=dtype)
        with Image.open(tmp_path / f"{dtype}.png") as made:
            facts = {"dtype": dtype} if dtype != "float32" else {}
            assert {k: v for k, v in made.info.items() if k in ("dtype", "weights")} == {
                **facts,
                "weights": generator.weights,
            }
        assert next(generator.model.parameters()).dtype == getattr(torch, dtype)
        assert next(generator.model.tokenizer.parameters()).dtype == torch.float32


def test_prompts_and_questions_of_models_on_the_hub(hub, image_tokenizer, tmp_path, capsys):
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    text, own = text_tokenizer(), tiny_models.image_tokenizer()
    shape = TextToImageConfig.for_tokenizer(tiny_models.backbone(), own, len(text), 7)
    drawing = TextToImage(shape, own)
    drawing.push_to_hub("some/drawing", text_tokenizer=text, token="hf_writer")
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "one"]
    entry.main(["generate", "red", "--checkpoint", "some/drawing", "--dtype", "bfloat16", *out])
    with Image.open(tmp_path / "out" / "00000_red.png") as made:
        assert made.info["dtype"] == "bfloat16"
    model, processor = understanding(tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "answers")
    processor.save_pretrained(tmp_path / "answers")
    hub.repository("some/answers", tmp_path / "answers")
    picture(1).save(tmp_path / "one.png")
    ask = ["ask", str(tmp_path / "one.png"), "color?", "--max-tokens", "4", "--device", "cpu"]
    capsys.readouterr()
    answers = []
    for place in ("some/answers", str(tmp_path / "answers")):
        entry.main([*ask, "--checkpoint", place])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_without_huggingface_hub(monkeypatch, image_tokenizer):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match=r"^error: .*need huggingface_hub: pip install"):
        entry.main(["tokenize", "folder", "--checkpoint", "some/tokenizer"])
    TokenFlowTokenizer.from_pretrained(image_tokenizer)  # on the disk: none is needed


def test_where_a_checkpoint_is(hub, image_tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="nothing at some/gone on the disk, and http"):
        checkpoint.find("some/gone")
    found, place = checkpoint.load_tokenizer("some/tokenizer")
    assert place.parent.name == "snapshots"
    assert found.config == TokenFlowTokenizer.from_pretrained(image_tokenizer).config
    assert names_of([str(place)]) == ["tokenizer"]
    # Beside a config.json, what is no part of a folder is a file of weights on its own.
    for name, alone in (("model.safetensors", False), ("config.json", False), ("vae.pth", True)):
        (tmp_path / name).touch()
        (tmp_path / "config.json").touch()
        assert checkpoint.is_released(tmp_path / name) is alone


def test_the_digest_of_several_files(tmp_path):
    from huggingface_hub import save_torch_state_dict

    state = {f"w{i}": torch.full((64, 64), float(i)) for i in range(4)}
    for size in ("20KB", "1GB"):
        (tmp_path / size).mkdir()
        save_torch_state_dict(state, tmp_path / size, max_shard_size=size)
    several, one = (checkpoint.weights_digest(tmp_path / size) for size in ("20KB", "1GB"))
    assert one == checkpoint.digest(tmp_path / "1GB" / "model.safetensors")
    assert several != one
    state["w3"] = state["w3"] + 1
    save_torch_state_dict(state, tmp_path / "20KB", max_shard_size="20KB")
    assert checkpoint.weights_digest(tmp_path / "20KB") != several


# ------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_networks_alone(image_tokenizer, dtype):
    model = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    seen = []
    model.encoder.conv_in.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    with torch.no_grad(), arithmetic(torch.device("cpu"), dtype):
        h = model.features(images)
        codes = model.encode(images)
    assert set(seen) == {getattr(torch, dtype)}
    with torch.no_grad():  # the search, in float32, of the same features
        assert torch.equal(model.quantizer.encode(h.float()), codes)


def test_reconstruct_in_half_precision_and_in_batches(images, image_tokenizer, tmp_path, capsys):
    names = pictures(images)
    values = {}
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 2):
            out = tmp_path / f"{dtype}-{batch}"
            reconstruct(names, str(image_tokenizer), str(out), "cpu", dtype=dtype, batch=batch)
            said = capsys.readouterr().out
            assert said.count(" dB") == len(names)
            values[dtype, batch] = [float(found) for found in re.findall(r"([-\d.]+) dB", said)]
            assert len(list(out.glob("*.safetensors"))) == len(names)
    for batch in (1, 2):
        assert values["float32", batch] == pytest.approx(values["float32", 1], abs=0.05)
        assert values["bfloat16", batch] == pytest.approx(values["float32", 1], abs=3.0)


def test_evaluations_say_their_arithmetic(images, image_tokenizer, tmp_path):
    for name, file in (("evaluate", "metrics.json"), ("analyse", "analysis.json")):
        out = tmp_path / name
        common = ["--checkpoint", str(image_tokenizer), "--data", str(images), "--device", "cpu"]
        entry.main([name, *common, "--out", str(out), "--dtype", "bfloat16"])
        assert json.loads((out / file).read_text())["environment"]["dtype"] == "bfloat16"
    out = tmp_path / "tokens"
    entry.main(["tokenize", str(images), *common[:2], "--out", str(out), "--dtype", "bfloat16"])
    assert "bfloat16" in (out / "index.json").read_text()


def test_other_words_are_refused():
    with pytest.raises(
        ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'h"
    ):
        find_dtype("half")


MODELS = set(commands.COMMANDS) - {"fetch-easy-vqa", "fetch-emoji", "fid"}


def test_every_command_with_a_model_has_the_same_options():
    import argparse

    for name in MODELS:
        parser = argparse.ArgumentParser(name)
        commands.COMMANDS[name].add_arguments(parser)
        options = {option for action in parser._actions for option in action.option_strings}
        wanted = {"--checkpoint", "--filename", "--revision", "--device", "--dtype"}
        wanted |= set() if name in ("ask", "demo") else {"--batch-size"}
        assert wanted <= options, name
        assert parser.get_default("device") == "auto"
        assert parser.get_default("dtype") == "float32"
