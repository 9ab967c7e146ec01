"""The tab *ask*: questions about a picture, answered word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.train.data import DataError
from tokenflow_ext.train.data.text_files import check_text
from tokenflow_ext.train.evaluation.answering import Answerer, Message

from . import html
from .parts import EVENT, KEPT, Examples, number, on_upload, read_upload, told, upload
from .streaming import streamed

LEAD = (
    "The model reads a picture's tokens as it reads words, and answers. Pick a picture and ask. "
    "Another picture begins a new conversation."
)


class Ask:
    """What the tab does, without Gradio's components."""

    def __init__(self, answerer: Answerer, examples: Examples) -> None:
        self.answerer, self.examples = answerer, examples

    def answer(
        self, picture: Image.Image | None, said: list[Message], question: str, longest: int
    ) -> Iterator[list[Message]]:
        """The conversation with the question, again and again as the answer grows.

        Args:
            picture: what the model reads of one, see :meth:`Answerer.square`.
            said: the conversation so far.
            longest: ids of the answer, at most.

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


def _shown(talk: list[Message]) -> list[Message]:
    """A conversation as Gradio shows it to the letter: it takes texts for HTML."""
    return [message | {"content": escape(message["content"], quote=False)} for message in talk]


def _view(picture: Image.Image) -> str:
    about = "the picture that is asked about, as the model reads it"
    return html.framed(f'<div class="tf-asked">{html.picture(np.asarray(picture), about)}</div>')


def build(answerer: Answerer, examples: Examples) -> None:
    """Lay the tab out, inside its ``gr.Tab``."""
    tab = Ask(answerer, examples)
    picture, said = gr.State(None, time_to_live=KEPT), gr.State([], time_to_live=KEPT)
    gr.HTML(html.lead(LEAD))
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            shelf = examples.show()
            view = gr.HTML(elem_classes="tf-asked-about")
            file = upload()
        with gr.Column(scale=4, min_width=420):
            chat = gr.Chatbot(label="conversation", render_markdown=False, buttons=[], height=420)
            question = gr.Textbox(label="question", max_length=2000)
            with gr.Row():
                button = gr.Button("Ask", variant="primary")
                longest = gr.Slider(1, 512, 64, step=1, label="longest answer, in tokens")

    def begin(image: Image.Image) -> tuple[Any, ...]:
        # Kept for a session: the whole of a large picture would be hundreds of megabytes.
        square = answerer.square(image)
        return square, [], _view(square), []

    @told
    def on_example(event: gr.EventData) -> tuple[Any, ...]:
        return begin(examples.open(number(event, len(examples.paths))))

    @told
    def on_ask(
        image: Image.Image | None, before: list[Message] | None, text: str, count: float
    ) -> Iterator[tuple[Any, ...]]:
        emptied: Any = ""  # once: the next question may be typed while this one is answered
        for talk in tab.answer(image, before or [], text or "", int(count)):
            yield talk, _shown(talk), emptied
            emptied = gr.skip()

    asked = [
        event(on_ask, [picture, said, question, longest], [said, chat, question], **EVENT)
        for event in (button.click, question.submit)
    ]
    # What begins a new conversation ends an answer that is still being written. The page calls what
    # an event is for in the order below, each after the one before.
    for event in (shelf.click, file.upload, chat.clear):
        event(None, None, None, cancels=asked, api_visibility="private", queue=False)
    begun = [picture, said, view, chat]
    shelf.click(on_example, None, begun, **EVENT)
    on_upload(file, lambda content: begin(read_upload(content)), begun)
    chat.clear(lambda: ([], []), None, [said, chat], **EVENT)
