"""How a conversation is written as text, and which part of it a model learns.

The three forms of the paper's training: ``vicuna`` (Vicuna v1), ``chatml`` (Qwen) and ``plain``
(a caption after the picture, nothing else). The same form is a template of transformers for
inference and a list of pieces for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenflow_ext.models.serialization.config import ConfigError
from tokenflow_ext.models.serialization.files import shown

IMAGE = "<image>"
"""Where a picture stands in a text."""

FORMS = ("vicuna", "chatml", "plain")

SYSTEM = {
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions.",
    "chatml": "You are a helpful assistant.",
    "plain": "",
}
"""What stands before a conversation unless something else is asked for."""

# The content of a message is a text, or a list of parts: the pictures come first.
_CONTENT = (
    "{%- macro written(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)

_TEMPLATES = {
    "vicuna": "{%- set said = namespace(system=SYSTEM) -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set said.system = written(message['content']) -%}{%- endfor -%}"
    "{{ said.system + ' ' if said.system else '' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + written(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' + written(message['content']) + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}",
    "chatml": "{%- if messages[0]['role'] != 'system' and SYSTEM -%}"
    "{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + written(message['content']) + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}",
    "plain": "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ written(message['content']) + '\\n' }}"
    "{%- else -%}{%- if message['content'] is string -%}"
    "{{ '<image>' if '<image>' in message['content'] else '' }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- endfor -%}{%- endif -%}{%- endif -%}{%- endfor -%}",
}


def template(form: str, system: str | None = None) -> str:
    """A form as a chat template of transformers.

    Args:
        form: one of ``FORMS``.
        system: what stands before a conversation without a system message; None is ``SYSTEM``'s.

    Raises:
        ConfigError: another form.
    """
    check_form(form)
    said = SYSTEM[form] if system is None else system
    quoted = "'" + said.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return _CONTENT + _TEMPLATES[form].replace("SYSTEM", quoted)


def with_parts(own: str) -> str:
    """A language model's own chat template, for messages whose content is a list of parts too."""
    return (
        _CONTENT
        + "{%- set plain = namespace(messages=[]) -%}{%- for message in messages -%}"
        + "{%- set plain.messages = plain.messages"
        + " + [dict(message, content=written(message['content']))] -%}{%- endfor -%}"
        + "{%- set messages = plain.messages -%}"
        + own
    )


def check_form(form: str) -> None:
    """That a form is one of ``FORMS``.

    Raises:
        ConfigError: it is not.
    """
    if form not in FORMS:
        raise ConfigError(f"template must be one of {', '.join(FORMS)}, got {shown(form)}")


class Turn(NamedTuple):
    """What is said: by the ``user`` or the ``assistant``."""

    role: str
    text: str


class Piece(NamedTuple):
    """A part of a written conversation.

    Attributes:
        text: as it is written.
        answer: whether it is an answer, or the end of one.
        own: whether it is the assistant's, its header included.
    """

    text: str
    answer: bool = False
    own: bool = False


def pieces(turns: Sequence[Turn], form: str, eos: str, system: str | None = None) -> list[Piece]:
    """A conversation as pieces; their texts in a row are what :func:`template` writes.

    Args:
        turns: by turns, the user first.
        form: one of ``FORMS``.
        eos: the text tokenizer's end of a sequence (``vicuna`` ends an answer with it).
        system: as for :func:`template`.

    Raises:
        ConfigError: another form.
        ValueError: turns out of order, or more than one of each in ``plain``.
    """
    check_form(form)
    roles = ["user", "assistant"] * (len(turns) // 2 + 1)
    if not turns or [turn.role for turn in turns] != roles[: len(turns)]:
        raise ValueError("the turns must go from user to assistant and so on")
    said = SYSTEM[form] if system is None else system
    if form == "plain":
        if len(turns) > 2:
            raise ValueError(f"the plain form has one question and one answer, got {len(turns)}")
        found = [Piece(IMAGE * (IMAGE in turns[0].text))]
        return found + [Piece(turn.text + "\n", True, True) for turn in turns[1:]]
    if form == "vicuna":
        found = [Piece(said + " " if said else "")]
        for turn in turns:
            if turn.role == "user":
                found.append(Piece(f"USER: {turn.text} "))
            else:
                # The space is the answer's: most text tokenizers make one id of it and the word.
                found += [Piece("ASSISTANT:", own=True), Piece(f" {turn.text}{eos}", True, True)]
        return found
    found = [Piece(f"<|im_start|>system\n{said}<|im_end|>\n")] if said else []
    for turn in turns:
        if turn.role == "user":
            found.append(Piece(f"<|im_start|>user\n{turn.text}<|im_end|>\n"))
        else:
            found += [
                Piece("<|im_start|>assistant\n", own=True),
                Piece(f"{turn.text}<|im_end|>", True, True),
                Piece("\n", own=True),
            ]
    return found
