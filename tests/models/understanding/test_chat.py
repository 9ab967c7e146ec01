"""Conversations as text: what a model is trained on is what it is asked with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from understanding_models import text_tokenizer

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.understanding import chat
from tokenflow_ext.models.understanding.chat import Turn

TEXT = text_tokenizer()
WORDS = st.text("abc?\n' \\{}%é", min_size=1, max_size=12)


def conversation(words):
    return [Turn(("user", "assistant")[i % 2], word) for i, word in enumerate(words)]


def rendered(turns, form, system, **options):
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    template = chat.template(form, system)
    return TEXT.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def written(turns, form, system):
    return "".join(piece.text for piece in chat.pieces(turns, form, "</s>", system))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["vicuna", "chatml"]),
    st.lists(WORDS, min_size=1, max_size=5),
    st.none() | st.just("") | WORDS,
)
def test_training_and_inference_write_the_same(form, words, system):
    turns = conversation(words)
    assert rendered(turns, form, system) == written(turns, form, system)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            "vicuna",
            chat.SYSTEM["vicuna"] + " USER: <image>\nhi ASSISTANT: yes</s>USER: b ASSISTANT:",
        ),
        (
            "chatml",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<image>\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_the_forms_by_value(form, text):
    turns = conversation(["<image>\nhi", "yes", "b"])
    assert rendered(turns, form, None, add_generation_prompt=True) == text


def test_the_plain_form():
    turns = conversation(["<image>\nDescribe it.", "A cat."])
    assert rendered(turns, "plain", None) == "<image>A cat.\n"
    assert written(turns, "plain", None) == "<image>A cat.\n"
    assert rendered(turns[:1], "plain", None, add_generation_prompt=True) == "<image>"


@pytest.mark.parametrize("form", chat.FORMS)
def test_parts_are_the_same_as_text(form):
    parts = [{"type": "text", "text": "hi"}, {"type": "image"}]
    found = TEXT.apply_chat_template(
        [{"role": "user", "content": parts}], chat_template=chat.template(form), tokenize=False
    )
    assert found == rendered([Turn("user", "<image>\nhi")], form, None)


def test_a_models_own_template_takes_parts_too():
    own = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.name }}{% endfor %}"
    parts = [{"type": "image"}, {"type": "text", "text": "hi"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts, "name": "!"}, {"role": "b", "content": "so"}]
    found = TEXT.apply_chat_template(messages, chat_template=chat.with_parts(own), tokenize=False)
    assert found == "[user]<image>\n<image>\nhi![b]so"


def test_a_system_message_is_taken():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    for form, text in (
        ("vicuna", "be brief USER: hi "),
        ("chatml", "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"),
    ):
        found = TEXT.apply_chat_template(
            messages, chat_template=chat.template(form), tokenize=False
        )
        assert found == text


@pytest.mark.parametrize(
    ("form", "answers", "own"),
    [
        ("vicuna", " yes</s> no</s>", "ASSISTANT: yes</s>ASSISTANT: no</s>"),
        (
            "chatml",
            "yes<|im_end|>no<|im_end|>",
            "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
        ),
    ],
)
def test_what_is_learned(form, answers, own):
    found = chat.pieces(conversation(["a", "yes", "b", "no"]), form, "</s>")
    assert "".join(piece.text for piece in found if piece.answer) == answers
    assert "".join(piece.text for piece in found if piece.own) == own


def test_bad_conversations():
    with pytest.raises(ConfigError, match="template must be one of vicuna, chatml, plain"):
        chat.template("llama")
    with pytest.raises(ConfigError, match="template must be one of"):
        chat.pieces([Turn("user", "a")], "none", "")
    for turns in ([], [Turn("assistant", "a")], [Turn("user", "a"), Turn("user", "b")]):
        with pytest.raises(ValueError, match="user to assistant"):
            chat.pieces(turns, "vicuna", "")
    with pytest.raises(ValueError, match="one question and one answer"):
        chat.pieces(conversation(["a", "b", "c"]), "plain", "")
