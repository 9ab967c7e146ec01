"""The tab *ask*: questions about a picture, answered word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.image_files import to_square
from tokenflow_ext.train.data.text_files import check_text
from tokenflow_ext.train.evaluation.answering import Answerer, Message

from . import html
from .parts import EVENT, KEPT, Examples, number, read_upload, told, upload
from .streaming import streamed

LEAD = (
    "The model reads a picture's tokens as it reads words, and answers. Pick a picture and ask. "
    "Another picture begins a new conversation."
)
_SHOWN = 320


class Ask:
    """What the tab does, without Gradio's components."""

    def __init__(self, answerer: Answerer, examples: Examples) -> None:
        self.answerer, self.examples = answerer, examples

    def answer(
        self, picture: Image.Image | None, said: list[Message], question: str, longest: int
    ) -> Iterator[list[Message]]:
        """The conversation with the question, again and again as the answer grows.

        Raises:
            DataError: no picture or question, or the conversation has become too long.
        """
        if picture is None:
            raise DataError("pick a picture first")
        check_text(question, "the question")
        if not question.strip():
            raise DataError("the question is empty")
        question = question.replace(IMAGE, "")  # a place for a picture that there is not
        asked = [*said, {"role": "user", "content": question}]
        model = [dict(message) for message in asked]
        model[0]["content"] = f"{IMAGE}\n{model[0]['content']}"

        def work(emit: Callable[[str], None]) -> None:
            self.answerer.answer([model], [[picture]], longest, stream=emit)

        answer = ""
        for word in streamed(work):
            answer += word
            yield [*asked, {"role": "assistant", "content": answer.strip()}]


def _view(picture: Image.Image) -> str:
    pixels = np.asarray(to_square(picture, _SHOWN))
    return html.framed(html.picture(pixels, "the picture that is asked about"))


def build(answerer: Answerer, examples: Examples) -> None:
    """Lay the tab out, inside its ``gr.Tab``."""
    tab = Ask(answerer, examples)
    picture, said = gr.State(None, time_to_live=KEPT), gr.State([], time_to_live=KEPT)
    gr.HTML(html.lead(LEAD))
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            shelf = examples.show()
            view = gr.HTML()
            file = upload()
        with gr.Column(scale=4, min_width=420):
            chat = gr.Chatbot(label="conversation", render_markdown=False, buttons=[], height=420)
            question = gr.Textbox(label="question", max_length=2000)
            with gr.Row():
                button = gr.Button("Ask", variant="primary")
                longest = gr.Slider(1, 512, 64, step=1, label="longest answer, in tokens")

    def begin(image: Image.Image) -> tuple[Any, ...]:
        return image, [], _view(image), []

    @told
    def on_example(event: gr.EventData) -> tuple[Any, ...]:
        return begin(examples.open(number(event, len(examples.paths))))

    @told
    def on_upload(content: bytes) -> tuple[Any, ...]:
        return begin(read_upload(content))

    @told
    def on_ask(
        image: Image.Image | None, before: list[Message] | None, text: str, count: float
    ) -> Iterator[tuple[Any, ...]]:
        for talk in tab.answer(image, before or [], text or "", int(count)):
            yield talk, talk, ""

    begun = [picture, said, view, chat]
    shelf.click(on_example, None, begun, **EVENT)
    file.upload(on_upload, file, begun, **EVENT)
    chat.clear(lambda: [], None, said, **EVENT)
    for event in (button.click, question.submit):
        event(on_ask, [picture, said, question, longest], [said, chat, question], **EVENT)
