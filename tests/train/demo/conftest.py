"""What the tests of the page share."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from pathlib import Path

import demo_browser
import pytest
import tiny_models
import torch
import understanding_models

from tokenflow_ext.models import (
    VAR,
    TokenFlowTokenizer,
    VarConfig,
    build_processor,
    build_understanding,
)
from tokenflow_ext.train import text_to_image, understanding
from tokenflow_ext.train.demo.temporary import folder_of_gradio

# Gradio decides where it writes when it is imported, and writes there later too.
_folder = ExitStack()
_folder.enter_context(folder_of_gradio())
atexit.register(_folder.close)


@pytest.fixture(scope="session")
def classes_run(image_tokenizer, tmp_path_factory) -> Path:
    """A saved VAR of three named classes, of random weights."""
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    torch.manual_seed(0)
    shape = VarConfig.for_tokenizer(
        tokenizer, depth=1, width=32, heads=2, classes=3, class_names=("ant", "bee", "cow")
    )
    model = VAR(shape, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.save_pretrained(tmp_path_factory.mktemp("demo") / "var")


@pytest.fixture(scope="session")
def brief() -> tuple[str, ...]:
    """Settings of a run of a step."""
    return ("optim.steps=1", "output.eval_every=1", "output.checkpoint_every=1")


@pytest.fixture(scope="session")
def text_run(micro, brief, image_tokenizer, pairs, tmp_path_factory) -> Path:
    """A run of text to image, of one step."""
    run = tmp_path_factory.mktemp("demo") / "text"
    text_to_image.main(micro.text_overrides(run, image_tokenizer, pairs, *brief))
    return run


@pytest.fixture(scope="session")
def asked_run(micro, brief, image_tokenizer, questions, tmp_path_factory) -> Path:
    """A run of understanding, of one step."""
    run = tmp_path_factory.mktemp("demo") / "asked"
    understanding.main(micro.understanding_overrides(run, image_tokenizer, questions, *brief))
    return run


@pytest.fixture(scope="session")
def answers_run(tmp_path_factory) -> Path:
    """A saved understanding model of random weights. Its answers are words, as many as there may be
    tokens, and the longest take seconds."""
    text = understanding_models.text_tokenizer()
    language = understanding_models.language_model(
        text=text, max_position_embeddings=2048, num_hidden_layers=12
    )
    model = build_understanding(
        language, understanding_models.image_tokenizer(), "last", text_tokenizer=text
    )
    words = (text.decode([number]) for number in range(len(text)))
    model.generation_config.suppress_tokens = [
        number
        for number, word in enumerate(words)
        if not (word.startswith(" ") and word[1:].isalpha() and word.isascii())
    ]
    folder = tmp_path_factory.mktemp("demo") / "answers"
    model.save_pretrained(folder)
    build_processor(model, text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_runs(tmp_path_factory) -> dict[str, Path]:
    """Saved tokenizers of the family: of several groups and rounds, and of signs."""
    root = tmp_path_factory.mktemp("family")
    rounds = tiny_models.FAMILY["groups"]["family"] | {"depth": 2}
    made = {
        "groups": tiny_models.family_tokenizer("groups", scales=(2, 4), family=rounds),
        "signs": tiny_models.family_tokenizer("signs"),
    }
    return {name: one.save_pretrained(root / name) for name, one in made.items()}


@pytest.fixture(scope="session")
def blind_run(tmp_path_factory) -> Path:
    """A saved tokenizer without a pixel branch."""
    tokenizer = tiny_models.image_tokenizer(pixel=False)
    return tokenizer.save_pretrained(tmp_path_factory.mktemp("blind") / "blind")


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    with demo_browser.browser() as found:
        yield found
