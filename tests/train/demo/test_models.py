"""Which models get a tab, and what the command refuses."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tokenflow_ext.models import CheckpointError
from tokenflow_ext.train import unified
from tokenflow_ext.train.cli import entry
from tokenflow_ext.train.demo import models
from tokenflow_ext.train.demo.temporary import folder_of_gradio

pytest.importorskip("gradio", reason="the demo needs gradio")

from tokenflow_ext.train.demo import page

CPU = torch.device("cpu")


def test_each_kind_is_recognised(image_tokenizer, classes_run, text_run, asked_run):
    found = models.load(
        [str(image_tokenizer), str(classes_run), str(text_run), str(asked_run)], CPU
    )
    assert list(found.tokenizers) == ["saved"]
    assert list(found.drawing) == ["var", "text"]
    assert list(found.answering) == ["asked"]


def test_a_model_that_draws_brings_its_tokenizer(classes_run, asked_run):
    found = models.load([str(classes_run)], CPU)
    assert list(found.tokenizers) == ["var"]
    assert found.tokenizers["var"] is found.drawing["var"].model.tokenizer
    assert not models.load([str(asked_run)], CPU).tokenizers


def test_a_model_both_ways(micro, brief, image_tokenizer, questions, pairs, tmp_path):
    run = tmp_path / "both"
    unified.main(micro.unified_overrides(run, image_tokenizer, questions, pairs, *brief))
    found = models.load([str(run)], CPU)
    assert list(found.tokenizers) == list(found.drawing) == list(found.answering) == ["both"]


def test_the_page_has_a_tab_for_each_kind(
    image_tokenizer, classes_run, text_run, asked_run, images, tmp_path
):
    import gradio as gr

    def tabs(*sources):
        with folder_of_gradio():
            made = page.build(models.load(list(map(str, sources)), CPU), str(images), 2)
        return [block.label for block in made.blocks.values() if isinstance(block, gr.Tab)]

    assert tabs(image_tokenizer) == ["Reconstruct", "Codebook"]
    assert tabs(asked_run) == ["Ask"]
    assert tabs(classes_run) == ["Reconstruct", "Draw", "Codebook"]
    shutil.copytree(image_tokenizer, tmp_path / "other")
    assert tabs(image_tokenizer, tmp_path / "other", classes_run, text_run, asked_run) == [
        "Reconstruct",
        *("saved", "other"),
        "Draw",
        *("var", "text"),
        "Ask",
        "Codebook",
        *("saved", "other"),
    ]


def test_the_family_has_all_tabs_of_a_tokenizer(family_runs, images):
    import gradio as gr

    with folder_of_gradio():
        found = models.load(list(map(str, family_runs.values())), CPU)
        made = page.build(found, str(images), 2)
    labels = [block.label for block in made.blocks.values() if isinstance(block, gr.Tab)]
    names = ["groups", "signs"]
    assert labels == ["Reconstruct", *names, "Codebook", *names]
    [group] = [block for block in made.blocks.values() if isinstance(block, gr.Radio)][:1]
    assert [name for name, _ in group.choices] == ["semantic 1", "semantic 2", "pixel 1", "pixel 2"]


def test_a_tokenizer_that_decodes_no_pictures_has_its_codes_shown(
    blind_run, image_tokenizer, images
):
    import gradio as gr

    def built(*sources):
        with folder_of_gradio():
            made = page.build(models.load(list(map(str, sources)), CPU), str(images), 2)
        blocks = made.blocks.values()
        told = [one.value for one in blocks if isinstance(one, gr.HTML) and one.value]
        labels = [one.label for one in blocks if isinstance(one, gr.Tab)]
        return labels, [piece for piece in told if "decodes no pictures" in piece]

    labels, said = built(blind_run)
    assert labels == ["Codebook"]
    assert len(said) == 1
    assert "<b>blind</b> decodes no pictures (its pixel.enabled is false)" in said[0]
    labels, said = built(image_tokenizer, blind_run)
    assert labels == ["Reconstruct", "Codebook", "saved", "blind"]
    assert len(said) == 1
    assert built(image_tokenizer)[1] == []


def test_weights_without_a_decoder_are_refused_by_what_is_missing(image_tokenizer, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(image_tokenizer, folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"torn.*decoder\."):
        models.load([str(folder)], CPU)


def test_two_tokenizers_of_one_name(image_tokenizer, tmp_path):
    shutil.copytree(image_tokenizer, tmp_path / "other" / "saved")
    found = models.load([str(image_tokenizer), str(tmp_path / "other" / "saved")], CPU)
    assert list(found.tokenizers) == ["saved", "saved~2"]


def test_a_kind_without_a_tab_is_refused_by_name(tmp_path):
    shape = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"llama has no tab in the demo: .*config\.json"):
        models.load([str(tmp_path / "llama")], CPU)


def test_nothing_there(tmp_path, image_tokenizer):
    with pytest.raises(CheckpointError, match="nothing at"):
        models.load([str(image_tokenizer), str(tmp_path / "none")], CPU)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--known", "0"), "--known must be 1 or more"),
        (("--port", "70000"), "--port must be 65535 or less"),
        (("--port", "-1"), "--port must be 0 or more"),
    ],
)
def test_options_that_do_not_fit(image_tokenizer, words, said):
    with pytest.raises(SystemExit, match=said):
        entry.main(["demo", "--checkpoint", str(image_tokenizer), *words])


def test_without_gradio_its_extra_is_named(image_tokenizer, monkeypatch):
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else plain(name)
    )
    with pytest.raises(SystemExit, match=r"gradio: pip install 'tokenflow_ext\[demo\]'"):
        entry.main(["demo", "--checkpoint", str(image_tokenizer)])
